"""The feature networks: accuracy of the stored weights, what is refused, one image one feature."""
import socket
import urllib.request

import pytest
import torch
import torch.nn.functional as F

from common import data, features, files, synthetic
from common.weights import train_cifarnet, train_lenet

BOTH = [("lenet", 1), ("cifarnet", 3)]


def noise(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=draw, dtype=torch.uint8)


def right(images, labels):
    name = features.resolve("auto", images.shape[1])
    found = features.logits(features.extract(images), name)
    return (found.argmax(1) == labels).double().mean().item()


@pytest.fixture(scope="module")
def digits():
    """Digits of another seed than those of the training, as images of 32 pixels, and labels."""
    images, labels = synthetic.digits(1000, seed=1)
    return F.pad(images, (2, 2, 2, 2)), labels


# ---- the stored weights ----


def test_lenet_reads_digits_that_it_was_not_trained_on(digits):
    assert right(*digits) >= 0.99


def test_lenet_reads_mnist(data_dir, tmp_path):
    test = data.load_images("mnist", data_dir, 32, 1, tmp_path).test
    assert right(test.images, test.labels) >= 0.993


def test_cifarnet_tells_the_classes_of_cifar10_apart(data_dir, tmp_path):
    folder = data_dir / "cifar10-png" / "test"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    test = data.load_images(folder, data_dir, 32, 3, tmp_path)
    assert right(test.images[::4], test.labels[::4]) >= 0.85


def test_no_feature_of_digits_is_silent_or_drowns_the_others(digits):
    found = features.extract(digits[0])
    assert found.std(0).min() > 0.3 and found.std(0).max() < 3
    assert 0.3 < (found < 0).double().mean() < 0.7  # a ReLU would leave none


@pytest.mark.parametrize("name, most", [("lenet", 600_000), ("cifarnet", 1_200_000)])
def test_stored_weights_are_small(name, most):
    assert (features.WEIGHTS / f"{name}.pt").stat().st_size < most


def test_missing_and_foreign_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(features.FILES, "lenet", tmp_path / "lenet.pt")
    with pytest.raises(OSError, match="lenet.pt.*cannot be read"):
        features.version("lenet")
    files.save_tensors(tmp_path / "lenet.pt", {"conv": torch.zeros(3)})
    with pytest.raises(ValueError, match="lenet.pt does not hold the weights of lenet"):
        features.extract(noise(1, 1, 32, 32))


def test_other_weights_have_another_version(tmp_path, monkeypatch):
    before = features.version("lenet")
    assert features.version("cifarnet") != before
    monkeypatch.setitem(features.FILES, "lenet", tmp_path / "lenet.pt")
    content = (features.WEIGHTS / "lenet.pt").read_bytes()
    (tmp_path / "lenet.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert features.version("lenet") != before


def test_weights_that_cannot_be_downloaded_are_one_line_that_says_where_they_belong(
    tmp_path, monkeypatch
):
    def offline(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(OSError) as e:
        features.version("inception")
    for part in ("pt_inception-2015-12-05-6726825d.pth", str(tmp_path), "--weights", "not known"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)


# ---- names and images that are taken ----


def test_auto_goes_by_the_channels():
    for name, channels in BOTH:
        assert features.resolve("auto", channels) == features.resolve(name, channels) == name


def test_unknown_features_and_wrong_channels_are_refused():
    with pytest.raises(ValueError, match="'lenet5'.*auto, lenet, cifarnet"):
        features.resolve("lenet5", 1)
    with pytest.raises(ValueError, match="lenet takes 1-channel images, got 3"):
        features.extract(noise(2, 3, 32, 32), "lenet")
    with pytest.raises(ValueError, match="cifarnet takes 3-channel images, got 1"):
        features.extract(noise(2, 1, 32, 32), "cifarnet")
    with pytest.raises(ValueError, match="4 channels; wanted 1 or 3"):
        features.extract(noise(2, 4, 32, 32))


@pytest.mark.parametrize("images", [
    torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.int64), noise(1, 32, 32),
    noise(1, 1, 1, 32, 32), noise(2, 1, 32, 32).numpy(), [0, 255],
])  # fmt: skip
def test_only_quantised_images_are_taken(images):
    with pytest.raises(ValueError, match=r"wanted images as uint8 \[M, C, H, W\]"):
        features.extract(images)


def test_images_without_pixels_are_refused():
    with pytest.raises(ValueError, match="no pixels"):
        features.extract(noise(2, 1, 0, 32))


# ---- features ----


@pytest.mark.parametrize("name, channels", BOTH)
def test_features_are_rows_of_float32_on_the_cpu(name, channels):
    for n in (0, 1, 5):
        found = features.extract(noise(n, channels, 32, 32), name, batch_size=2)
        assert found.shape == (n, 128) and found.dtype == torch.float32
        assert found.device.type == "cpu" and not found.requires_grad
        assert found.isfinite().all()
    assert features.logits(found, name).shape == (5, 10)


@pytest.mark.parametrize("name, channels", BOTH)
def test_an_image_has_its_features_whatever_stands_beside_it(name, channels):
    images = noise(37, channels, 32, 32)
    together = features.extract(images, name, batch_size=16)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    assert torch.equal(features.extract(images[order], name, batch_size=16), together[order])
    assert torch.equal(features.extract(images[9:10], name, batch_size=16), together[9:10])
    other = features.extract(images, name, batch_size=7)
    torch.testing.assert_close(other, together, rtol=1e-4, atol=1e-4)


def test_different_images_have_different_features(digits):
    found = features.extract(digits[0][:100])
    assert (torch.cdist(found, found) + 1e3 * torch.eye(100)).min() > 0.1


def test_features_are_fp32_whatever_the_process_has_chosen():
    images = noise(4, 3, 32, 32)
    expected = features.extract(images, batch_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features.extract(images, batch_size=4), expected)
        assert torch.is_autocast_enabled("cpu")


def test_cudnn_is_exact_meanwhile_and_as_before_afterwards(monkeypatch):
    def settings():
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision

    def look(self, x):
        seen.append(settings())
        return x.new_zeros(len(x), 128)

    seen, before = [], settings()
    monkeypatch.setattr(features.Lenet, "features", look)
    features.extract(noise(1, 1, 32, 32))
    assert seen == [(True, True, False, "ieee")]
    assert settings() == before


@pytest.mark.gpu
def test_features_are_the_same_on_the_gpu():
    for _, channels in BOTH:
        images = noise(300, channels, 48, 48)
        found = features.extract(images, device="cuda")
        torch.testing.assert_close(found, features.extract(images), rtol=1e-3, atol=1e-3)


# ---- other sizes ----


def test_small_digits_are_padded_as_the_data_are(digits):
    padded = digits[0][:8]
    assert torch.equal(features.extract(padded[..., 2:-2, 2:-2]), features.extract(padded))


@pytest.mark.parametrize("name, channels", BOTH)
def test_a_fine_pattern_is_averaged_and_not_sampled(name, channels):
    lines = (torch.arange(160) % 5 == 2).to(torch.uint8) * 255  # those that sampling would hit
    lines = lines.expand(1, channels, 160, 160)
    grey = torch.full((1, channels, 32, 32), 51, dtype=torch.uint8)
    found = features.extract(torch.cat([lines, lines.mT]), name)
    torch.testing.assert_close(found, features.extract(grey, name).expand(2, -1), rtol=0, atol=0.1)


def test_enlarged_digits_keep_their_class(digits):
    images, labels = digits
    large = images[:200].repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert right(large, labels[:200]) >= 0.97


def test_resized_pixels_stay_in_the_range_of_the_others():
    stripes = (noise(3, 3, 20, 20) > 127).to(torch.uint8) * 255
    x = features._floats(stripes, features.Cifarnet)
    assert x.shape == (3, 3, 32, 32) and x.min() == -1 and x.max() == 1


def test_resizing_in_parts_changes_nothing(monkeypatch):
    images = noise(5, 3, 64, 64)
    whole = features._floats(images, features.Cifarnet)
    monkeypatch.setattr(features, "MOST", 2 * images[0].numel())
    assert torch.equal(features._floats(images, features.Cifarnet), whole)


# ---- inception and vgg16 ----

SIZES = 32, 299, 340
# For each size, of two images: the sum of all features, of their squares, and of the logits'
# absolute values, as pytorch-fid 0.3.0's InceptionV3 (and its fc without bias) gives them with
# `made_up(Inception)` loaded; `test_pytorch_fid_agrees` computes them anew where it is installed.
RECORDED = {
    32: [1475.766321600514, 1669.0704577371475, 1435.6154692415148],
    299: [1502.6390925537553, 1730.3467324903606, 1461.753480842337],
    340: [1501.7156794840998, 1728.3785732985482, 1460.8637480530888],
}


def uniform(shape, seed):
    """Numbers in [0, 1) by integer arithmetic alone, so the same with every release."""
    n = torch.arange(torch.Size(shape).numel())
    return (((n * n * 1103515245 + n * 12345 + seed * 7919) % 2**31) / 2**31).float().view(shape)


def made_up(net):
    """A state dict of net with layers that keep the scale of what goes through."""
    state = net.state_dict()
    for seed, (key, value) in enumerate(state.items()):
        if key.endswith("num_batches_tracked"):
            continue
        u = uniform(value.shape, seed)
        if value.dim() > 1:
            state[key] = (u - 0.5) * (24 / value[0].numel()) ** 0.5  # variance 2 / inputs
        else:
            state[key] = u + 0.5 if key.endswith(("bn.weight", "var")) else (u - 0.5) / 5
    return state


def scenes(size):
    """Two smooth colour images, uint8 [2, 3, size, size]."""
    x = F.interpolate(uniform((2, 3, 5, 5), size) * 255, (size, size), mode="bicubic")
    return x.round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file with the made-up weights of Inception, at the place of the real ones meanwhile."""
    pytest.importorskip("torchvision")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(made_up(features.Inception()), path)
    features.FILES["inception"] = path
    yield path
    del features.FILES["inception"]


def sums(found, logits):
    found, logits = found.double(), logits.double()
    return [found.sum().item(), found.square().sum().item(), logits.abs().sum().item()]


@pytest.mark.parametrize("size", SIZES)
def test_inception_gives_the_sums_that_pytorch_fid_gave(size, inception):
    found = features.extract(scenes(size), "inception", batch_size=2)
    assert found.shape == (2, 2048)
    got = sums(found, features.logits(found, "inception"))
    assert got == pytest.approx(RECORDED[size], rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_pytorch_fid_agrees(size, inception, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    state = torch.load(inception)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **k: state)
    net = peer.InceptionV3().eval()
    with torch.no_grad():
        want = net(scenes(size).float() / 255)[0].flatten(1)
    found = features.extract(scenes(size), "inception", batch_size=2)
    assert (found - want).norm() < 1e-5 * want.norm()
    assert (want[0] - want[1]).norm() > 0.05 * want.norm()  # the images are told apart
    assert sums(want, want @ state["fc.weight"].T) == pytest.approx(RECORDED[size], rel=1e-5)


def test_inception_repeats_grey_and_knows_its_bf16_by_name(inception):
    grey = scenes(40)[:, :1]
    found = features.extract(grey, "inception", batch_size=2)
    colour = features.extract(grey.expand(-1, 3, -1, -1), "inception", batch_size=2)
    torch.testing.assert_close(colour, found, rtol=1e-4, atol=1e-4)
    rounded = features.extract(grey, "inception-bf16", batch_size=2)
    assert 1e-4 * found.norm() < (rounded - found).norm() < 0.05 * found.norm()
    assert features.version("inception-bf16") == features.version("inception")


def test_vgg16_is_torchvisions_second_hidden_layer(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.vgg16(init_weights=False).eval()
    torch.save(net.state_dict(), tmp_path / "vgg16.pth")
    monkeypatch.setitem(features.FILES, "vgg16", tmp_path / "vgg16.pth")
    images = scenes(224)
    found = features.extract(images, "vgg16", batch_size=2)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        want = net(((images / 255) - mean) / std)
    torch.testing.assert_close(features.logits(found, "vgg16"), want, rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 4096) and found.min() == 0


# ---- training ----


@pytest.mark.parametrize("name, channels", BOTH)
def test_what_is_stored_is_what_was_trained_but_for_rounding(name, channels, tmp_path):
    torch.manual_seed(0)
    net = features.NETWORKS[name]()
    x = data.to_float(noise(16, channels, 32, 32))
    with torch.no_grad():
        for _ in range(5):  # statistics of BatchNorm that folding has to get right
            net(x)
        expected = net.eval().features(x)
    train_lenet.store(net, tmp_path / "net.pt")
    stored = features.load(name, tmp_path / "net.pt")
    assert not [m for m in stored.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(stored.features(x), expected, rtol=0.02, atol=0.02)


def trained_lenet(images, labels, epochs):
    torch.manual_seed(0)
    net = features.Lenet()
    train_lenet.train(net, images, labels, train_lenet.augment, epochs, seed=0)
    return net.eval()


def test_training_follows_from_its_seed(digits):
    images, labels = (x[:256] for x in digits)
    net, again = (trained_lenet(images, labels, epochs=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_sixteen_steps_of_training_show(digits):
    images, labels = digits
    net = trained_lenet(images[:512], labels[:512], epochs=4)
    with torch.no_grad():
        logits = net(data.to_float(images[512:]))
    assert F.cross_entropy(logits, labels[512:]) < 2  # chance: 2.3


def test_grey_images_are_varied_a_little_and_keep_their_background(digits):
    x = data.to_float(digits[0][:64])
    moved = train_lenet.augment(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape and moved.min() >= -1 and moved.max() <= 1
    assert (moved[..., 0, 0] == -1).all()
    distance = (moved - x).square().mean((1, 2, 3))
    assert (distance > 0).all() and distance.mean() < (x - x.roll(1, 0)).square().mean()


def test_colour_images_are_moved_and_mirrored_as_one():
    """Red is the column and green the row, so that each pixel says where it is from."""
    size, shift = 32, train_cifarnet.SHIFT
    column = torch.arange(size).expand(size, size)
    x = torch.stack([column, column.T, column]).float().expand(200, 3, size, size)
    y = train_cifarnet.augment(x, torch.Generator().manual_seed(0))
    inner = y[:, :, shift:-shift, shift:-shift]
    rows, steps = inner[:, 1, :, 0], inner[:, 0, 0].diff(dim=1)
    assert (rows.diff(dim=1) == 1).all()
    assert torch.equal(y[:, 0], y[:, 2])
    assert (y[:, 0].diff(dim=2).abs() == 1).all()  # reflected beyond the border, not one colour
    assert (steps == steps[:, :1]).all() and (steps.abs() == 1).all()
    assert 60 < (steps[:, 0] == -1).sum() < 140
    down = rows[:, 0] - shift
    assert down.min() == -shift and down.max() == shift
