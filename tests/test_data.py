"""Named sets, pairs and domains, subsets, the way to floats and back, batches."""
import collections
import gzip
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, processes, synthetic
from tests.helpers import CACHE

LAST = {"mnist": "MNIST/raw", "fashion": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}
STEMS = [f"{name}-ubyte" for name in (
    "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1",
)]


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(path, array):
    """Write an array of bytes in the format of MNIST."""
    head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture(scope="module")
def fashion_files(tmp_path_factory):
    """A data folder whose FashionMNIST has the published shapes, and the images in it."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / LAST["fashion"]
    raw.mkdir(parents=True)
    arrays = []
    for m, stem in ((60_000, "train"), (10_000, "t10k")):
        arrays += [noise(m, m, 28, 28), np.arange(m, dtype=np.int64).astype(np.uint8) % 10]
    for stem, array in zip(STEMS, arrays):
        idx(raw / stem, array)
    return folder, arrays


@pytest.fixture
def offline(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "")


# ---- named sets ----


def test_digits_have_the_two_splits_of_the_contract_and_no_image_twice():
    digits = data.load_images("digits", cache_dir=CACHE)
    assert digits.name == "digits" and digits.channels == 1
    assert digits.images.shape == (20000, 1, 32, 32) and digits.images.dtype == torch.uint8
    assert digits.test.images.shape == (4000, 1, 32, 32)
    assert digits.labels.bincount().tolist() == [2000] * 10
    assert digits.test.labels.bincount().tolist() == [400] * 10
    both = torch.cat([digits.images, digits.test.images])
    assert len({image.numpy().tobytes() for image in both}) == 24000


def test_digits_are_drawn_once_for_a_cache(monkeypatch):
    first = data.load_images("digits", cache_dir=CACHE)
    monkeypatch.setattr(synthetic, "digits", None)
    assert data.load_images("digits", cache_dir=CACHE).fingerprint == first.fingerprint


def test_sets_of_28_pixels_are_padded_with_black_not_resized(fashion_files, tmp_path):
    folder, (images, labels, test_images, test_labels) = fashion_files
    fashion = data.load_images("fashion", folder, cache_dir=tmp_path)
    assert fashion.images.shape == (60000, 1, 32, 32)
    assert np.array_equal(fashion.images[:, 0, 2:30, 2:30].numpy(), images)
    assert np.array_equal(fashion.test.images[:, 0, 2:30, 2:30].numpy(), test_images)
    assert fashion.images.sum() == images.sum(dtype=np.int64)
    assert fashion.labels.dtype == torch.int64 and np.array_equal(fashion.labels.numpy(), labels)
    assert np.array_equal(fashion.test.labels.numpy(), test_labels)
    three = data.load_images("fashion", folder, channels=3, cache_dir=tmp_path)
    assert three.channels == three.test.channels == 3
    assert all(torch.equal(three.images[:, c], fashion.images[:, 0]) for c in range(3))


def test_other_sizes_are_resized_from_the_padded_32(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DIGITS", (20, 10))
    at_32 = data.load_images("digits", cache_dir=tmp_path).test.images[7, 0]
    for size in (16, 64):
        digits = data.load_images("digits", image_size=size, cache_dir=tmp_path)
        expected = Image.fromarray(at_32.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        assert np.array_equal(digits.test.images[7, 0].numpy(), np.asarray(expected))
        assert digits.images.shape == (20, 1, size, size)
    monkeypatch.setattr(data, "DIGITS", (8, 4))
    assert len(data.load_images("digits", cache_dir=tmp_path)) == 8


@pytest.mark.parametrize("stem, spoil", [
    (STEMS[0], lambda f, content: f.write_bytes(content[:-20])),
    (STEMS[1], lambda f, content: f.write_bytes(content[:-20])),
    (STEMS[3], lambda f, content: f.write_bytes(content + b"\1" * 20)),
    (STEMS[0], lambda f, content: f.write_bytes(b"")),
    (STEMS[0], lambda f, content: f.write_bytes(gzip.compress(content[:1000]))),
    (STEMS[0], lambda f, content: f.write_bytes(struct.pack(">IIII", 0x0D03, 1, 1, 1) + b"1234")),
    (STEMS[2], lambda f, content: idx(f, noise(0, 10_000, 27, 28))),
    (STEMS[2], lambda f, content: idx(f, noise(0, 9_999, 28, 28))),
    (STEMS[3], lambda f, content: idx(f, np.full(10_000, 10, np.uint8))),
], ids=["cut", "labels cut", "longer", "empty", "packed", "floats", "27 x 28", "fewer", "class 10"])
def test_cut_and_foreign_files_are_refused_in_one_line(
    stem, spoil, fashion_files, tmp_path, offline
):
    raw = tmp_path / LAST["fashion"]
    raw.mkdir(parents=True)
    for other in STEMS:
        (raw / other).symlink_to(fashion_files[0] / LAST["fashion"] / other)
    (raw / stem).unlink()
    spoil(raw / stem, (fashion_files[0] / LAST["fashion"] / stem).read_bytes())
    before = {f: f.read_bytes() for f in raw.iterdir() if f.name == stem}
    with pytest.raises(ValueError, match="fashion") as e:
        data.load_images("fashion", tmp_path, cache_dir=tmp_path / "cache")
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert "urlopen" not in str(e.value)  # what a person put there is not replaced
    assert before == {f: f.read_bytes() for f in raw.iterdir() if f.name == stem}


def test_loading_a_set_writes_nothing_where_it_lies(fashion_files, tmp_path):
    before = sorted(fashion_files[0].rglob("*"))
    data.load_images("fashion", fashion_files[0], cache_dir=tmp_path)
    assert sorted(fashion_files[0].rglob("*")) == before


@pytest.mark.parametrize("name", LAST)
def test_offline_and_absent_is_one_line_and_leaves_no_folder(name, tmp_path, offline):
    with pytest.raises(ValueError) as e:
        data.load_images(name, tmp_path / "absent" / "data", cache_dir=tmp_path / "cache")
    assert name in str(e.value) and str(tmp_path / "absent" / "data") in str(e.value)
    assert "--dataset digits" in str(e.value) and "\n" not in str(e.value)
    assert "urlopen" in str(e.value)  # the reason, where torchvision puts a headline before it
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_a_download_comes_whole_and_what_was_brought_is_not_fetched(
    fails, tmp_path, monkeypatch
):
    raw = tmp_path / LAST["fashion"]
    raw.mkdir(parents=True)
    (raw / "brought.gz").write_bytes(b"here")

    class Dataset:
        """Stands for torchvision's, which fetches x.gz and unpacks it to x."""

        def __init__(self, root, train=True, download=False):
            here = Path(root) / LAST["fashion"]
            if download:
                assert [f.name for f in here.iterdir()] == ["brought.gz"] and here != raw
                (here / "unpacked").write_bytes(b"whole")
                if fails:
                    raise OSError("the connection ended")
            if not (here / "unpacked").exists():
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            self.data = torch.zeros(60_000 if train else 10_000, 28, 28, dtype=torch.uint8)
            self.targets = torch.zeros(len(self.data), dtype=torch.int64)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Dataset)
    there = {"brought.gz": b"here"}
    if fails:
        with pytest.raises(ValueError, match="the connection ended"):
            data.load_images("fashion", tmp_path, cache_dir=tmp_path / "cache")
    else:
        assert len(data.load_images("fashion", tmp_path, cache_dir=tmp_path / "cache")) == 60_000
        there["unpacked"] = b"whole"
    assert {f.name: f.read_bytes() for f in raw.iterdir()} == there
    assert [f.name for f in tmp_path.iterdir()] == ["FashionMNIST"]


def test_the_real_mnist(data_dir, tmp_path):
    mnist = data.load_images("mnist", data_dir, cache_dir=tmp_path)
    assert len(mnist) == 60000 and len(mnist.test) == 10000
    assert mnist.labels[:5].tolist() == [5, 0, 4, 1, 9] and mnist.test.labels[0] == 7
    assert mnist.images.float().mean().item() == pytest.approx(33.318 * 28**2 / 32**2, abs=0.01)


def test_the_published_cifar10(data_dir, tmp_path):
    if not (data_dir / LAST["cifar10"]).is_dir():
        pytest.skip("there is no published CIFAR-10 in the data folder")
    cifar = data.load_images("cifar10", data_dir, cache_dir=tmp_path)
    assert cifar.images.shape == (50000, 3, 32, 32)
    assert cifar.test.images.shape == (10000, 3, 32, 32)
    assert cifar.labels.bincount().tolist() == [5000] * 10
    means = cifar.images.double().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)


@pytest.mark.parametrize("name, words", [
    ("minst", "did you mean mnist"), ("MNIST", "did you mean mnist"), ("fasion", "mean fashion"),
    ("no/such/folder", "no/such/folder"), ("", "digits, mnist, fashion, cifar10"),
    ("facades", "has pairs; wanted images"), ("stripes", "has two domains; wanted images"),
])
def test_an_unknown_set_is_named_with_what_there_is(name, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        data.load_images(name, cache_dir=tmp_path)


@pytest.mark.parametrize("load, name, words", [
    (data.load_pairs, "digits", "has images; wanted pairs: blueprints, facades"),
    (data.load_pairs, "horse2zebra", "has two domains; wanted pairs"),
    (data.load_pairs, "facade", "did you mean facades"),
    (data.load_domains, "blueprints", "has pairs; wanted two domains: stripes, horse2zebra"),
    (data.load_pairs, "facades", "facades is not in .*train and test inside.*CMP"),
    (data.load_domains, "horse2zebra", "is not in .*trainA, trainB, testA and testB.*CycleGAN"),
])
def test_sets_of_another_kind_and_missing_ones_are_refused_in_one_line(load, name, words, tmp_path):
    with pytest.raises(ValueError, match=words) as e:
        load(name, tmp_path / "data", 16, tmp_path / "cache")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [2, 4, -1])
def test_channels_are_as_in_the_data_or_one_or_three(channels, tmp_path):
    with pytest.raises(ValueError, match=f"channels is {channels}"):
        data.load_images("digits", channels=channels, cache_dir=tmp_path)


# ---- pairs and domains ----


def numbered(n, seed, size):
    """Stands for a drawing: picture i of the first tensor is all i, of the second all 255 - i."""
    first = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, size, size)
    return first, 255 - first


def test_built_in_pairs_keep_their_sides_together(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "blueprints", numbered)
    monkeypatch.setattr(data, "BLUEPRINTS", (20, 5))
    pairs = data.load_pairs("blueprints", "none", 16, tmp_path)
    assert pairs.images.shape == (20, 6, 16, 16) and pairs.channels == (3, 3)
    assert pairs.images[:, 0, 0, 0].tolist() == list(range(20))
    assert pairs.test.images[:, 2, 0, 0].tolist() == list(range(20, 25))
    for split in (pairs, pairs.test):
        assert (split.images[:, :3] + split.images[:, 3:] == 255).all()
    few = data.subset(pairs, 7)
    assert len(few) == 7 and few.channels == (3, 3) and few.test is pairs.test
    monkeypatch.setattr(synthetic, "blueprints", None)
    assert data.load_pairs("blueprints", "none", 16, tmp_path).fingerprint == pairs.fingerprint


def test_no_scene_of_the_built_in_domains_is_in_both_or_in_two_splits(monkeypatch, tmp_path):
    monkeypatch.setattr(synthetic, "stripes", numbered)
    monkeypatch.setattr(data, "STRIPES", (20, 5))
    a, b = data.load_domains("stripes", "none", 16, tmp_path)
    plain, striped = (domain.images[:, 0, 0, 0] for domain in (a, b))
    scenes = [plain, 255 - striped, a.test.images[:, 0, 0, 0], 255 - b.test.images[:, 0, 0, 0]]
    assert sorted(torch.cat(scenes).tolist()) == list(range(50))
    assert [len(s) for s in scenes] == [20, 20, 5, 5] and a.channels == b.channels == 3
    assert torch.equal(a.counterpart, 255 - a.test.images)
    assert torch.equal(b.counterpart, 255 - b.test.images)


def test_the_real_built_in_pairs_and_domains_at_a_small_size(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "BLUEPRINTS", (6, 2))
    monkeypatch.setattr(data, "STRIPES", (6, 2))
    pairs = data.load_pairs("blueprints", image_size=16, cache_dir=tmp_path)
    labels, fronts = synthetic.blueprints(8, 0, 16)
    assert torch.equal(torch.cat([pairs.images, pairs.test.images]), torch.cat([labels, fronts], 1))
    a, b = data.load_domains("stripes", image_size=16, cache_dir=tmp_path)
    plain, striped = synthetic.stripes(16, 0, 16)
    assert torch.equal(a.images, plain[:6]) and torch.equal(b.images, striped[6:12])
    assert torch.equal(a.counterpart, striped[12:14]) and torch.equal(b.test.images, striped[14:])


def test_the_real_facades(data_dir, tmp_path):
    if not (data_dir / "facades").is_dir():
        pytest.skip("there are no facades in the data folder")
    pairs = data.load_pairs("facades", data_dir, 64, tmp_path)
    assert pairs.images.shape == (400, 6, 64, 64) and pairs.test.images.shape == (106, 6, 64, 64)
    with Image.open(data_dir / "facades" / "test" / "1.jpg") as image:  # the first by name
        for part, box in ((slice(0, 3), (0, 0, 256, 256)), (slice(3, 6), (256, 0, 512, 256))):
            half = image.crop(box).resize((64, 64), Image.Resampling.BICUBIC)
            found = pairs.test.images[0, part].permute(1, 2, 0).int().numpy()
            assert np.abs(found - np.asarray(half)).max() <= 1
    wall, label = pairs.images[:, :3].float(), pairs.images[:, 3:].float()
    assert saturation(label) > 2 * saturation(wall)  # A is the photograph, B the label map


def saturation(pixels):
    return (pixels.amax(1) - pixels.amin(1)).mean()


def test_the_real_horses_and_zebras(data_dir, tmp_path):
    if not (data_dir / "horse2zebra").is_dir():
        pytest.skip("there is no horse2zebra in the data folder")
    a, b = data.load_domains("horse2zebra", data_dir, 64, tmp_path)
    sizes = [len(images) for images in (a, b, a.test, b.test)]
    assert sizes == [1067, 1334, 120, 140] and a.channels == b.channels == 3
    assert a.counterpart is None and b.counterpart is None


# ---- Images ----


def test_the_fingerprint_follows_pixels_and_shape_alone():
    pixels = torch.from_numpy(noise(0, 6, 1, 4, 4))
    one = data.Images(pixels, name="a").fingerprint
    assert one == data.Images(pixels.clone(), torch.zeros(6), name="b").fingerprint
    changed = pixels.clone()
    changed[5, 0, 3, 3] ^= 1
    others = [changed, pixels.view(6, 1, 2, 8), pixels.flip(0), pixels[:5]]
    assert len({one, *(data.Images(p).fingerprint for p in others)}) == 5


def test_a_subset_is_drawn_once_and_for_all_with_its_labels():
    pixels = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1)
    held_out = data.Images(pixels[:7])
    images = data.Images(pixels, torch.arange(100), held_out, "set")
    some = data.subset(images, 30)
    torch.manual_seed(5)
    assert torch.equal(some.images, data.subset(images, 30).images)
    assert len(set(some.labels.tolist())) == 30 and some.labels.max() > 40
    assert torch.equal(some.images.flatten().long(), some.labels)
    assert set(data.subset(images, 10).labels.tolist()) <= set(some.labels.tolist())
    assert some.test is held_out and some.name == "set"
    assert some.fingerprint != images.fingerprint
    assert data.subset(images, 0) is images
    assert data.subset(data.Images(pixels), 3).labels is None


@pytest.mark.parametrize("n", [-1, 101])
def test_a_subset_larger_than_the_set_is_refused(n):
    with pytest.raises(ValueError, match=f"subset is {n}.*100 images"):
        data.subset(data.Images(torch.zeros(100, 1, 2, 2, dtype=torch.uint8)), n)


def test_bytes_survive_the_way_to_floats_and_back():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(u8)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1 and x[51] == pytest.approx(-0.6)
    assert torch.equal(data.to_uint8(x), u8)
    assert u8[3] == 3  # untouched


def test_floats_are_rounded_to_bytes_and_clamped():
    step = 1 / 127.5
    x = torch.tensor([-7, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 7])
    kept = x.clone()
    assert data.to_uint8(x).tolist() == [0, 0, 1, 254, 255]
    assert torch.equal(x, kept)
    assert data.to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


# ---- Batches ----

NUMBERED = torch.arange(103, dtype=torch.uint8).view(103, 1, 1, 1)


def stream(batch_size=10, seed=0, start=0, domain=0, pixels=NUMBERED):
    batches = data.Batches(pixels, batch_size, seed, "cpu", domain)
    batches.drawn = start
    return batches


def drawn(n, *args, **kwargs):
    """The numbers of the images in the next n batches."""
    batches = itertools.islice(stream(*args, **kwargs), n)
    return [data.to_uint8(x).flatten().tolist() for x in batches]


def test_batches_are_floats_of_the_images():
    pixels = torch.from_numpy(noise(0, 8, 3, 4, 4))
    for given in (pixels, data.Images(pixels)):
        x = next(data.Batches(given, 8, 0, "cpu"))
        assert x.dtype == torch.float32 and x.shape == (8, 3, 4, 4) and x.is_contiguous()
        assert {image.numpy().tobytes() for image in data.to_uint8(x)} == {
            image.numpy().tobytes() for image in pixels
        }


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_tail():
    numbers = drawn(20)
    for epoch in (numbers[:10], numbers[10:]):
        counts = collections.Counter(sum(epoch, []))
        assert len(counts) == 100 and set(counts.values()) == {1}
    assert numbers[:10] != numbers[10:]


def test_every_image_is_seen_in_time():
    assert len(set(sum(drawn(100), []))) == 103


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_order_is_the_one_permutation_of_seed_and_epoch(epoch):
    """The order of every run there is: changing it would change every result."""
    order = torch.randperm(103, generator=synthetic.generator(3, epoch)).tolist()
    assert sum(drawn(10, seed=3, start=10 * epoch), []) == order[:100]
    order = torch.randperm(103, generator=synthetic.generator(3, 1, epoch)).tolist()
    assert sum(drawn(10, seed=3, start=10 * epoch, domain=1), []) == order[:100]


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 25, 10**9])
def test_batches_go_on_at_any_number(start):
    here = drawn(12, start=start)
    assert here[3:] == drawn(9, start=start + 3)
    if start < 30:
        assert here == drawn(start + 12)[start:]


def test_the_order_follows_from_seed_and_epoch_alone():
    torch.manual_seed(3)
    first = drawn(10, seed=1)
    torch.manual_seed(4)
    assert drawn(10, seed=1) == first
    assert drawn(10, seed=0, start=10) != first  # epoch 1 of seed 0 is not epoch 0 of seed 1
    assert drawn(10, seed=1 + 2**32) != first


def test_two_domains_of_one_length_are_not_paired():
    """Batch by batch, a picture meets each of the other domain equally often."""
    pairs = collections.Counter()
    for a, b in zip(drawn(1030, seed=1), drawn(1030, seed=1, domain=1)):
        pairs.update(zip(a, b))
    assert max(pairs.values()) < 10 and len(pairs) > 103 * 60  # 10,300 draws of 10,609 pairs


def test_the_state_is_how_many_were_drawn_and_of_what():
    batches = stream(start=0)
    for _ in range(13):
        next(batches)
    state = batches.state_dict()
    assert batches.drawn == 13 and batches.batch_size == 10 and state["drawn"] == 13
    expected = [next(batches).tolist() for _ in range(12)]
    again = stream()
    next(again)
    again.load_state_dict(state)
    assert [next(again).tolist() for _ in range(12)] == expected
    images = data.Images(NUMBERED, name="elsewhere")
    assert state["fingerprint"] == images.fingerprint


def test_the_state_of_other_pixels_is_refused():
    state = stream().state_dict()
    changed = NUMBERED.clone()
    changed[102] ^= 1
    batches = stream(pixels=changed)
    with pytest.raises(ValueError, match="training images have changed"):
        batches.load_state_dict(state | {"drawn": 5})
    assert batches.drawn == 0


def test_drawing_batches_leaves_the_default_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    drawn(3)
    assert torch.equal(torch.rand(1), expected)


def test_the_slices_of_all_processes_make_up_the_global_batch(monkeypatch):
    whole = drawn(15, batch_size=12, start=4)
    monkeypatch.setattr(processes, "ranks", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda: rank)  # noqa: B023
        parts.append(drawn(15, batch_size=12, start=4))
    assert [sum(batch, []) for batch in zip(*parts)] == whole
    assert {len(batch) for part in parts for batch in part} == {4}


def test_a_batch_may_be_overwritten():
    batches = stream(103)
    next(batches).zero_()
    assert NUMBERED.sum() == 103 * 102 // 2 and next(batches).unique().numel() == 103


@pytest.mark.parametrize("batch_size, ranks, words", [
    (104, 1, "batch_size is 104.*only 103 training images"),
    (0, 1, "batch_size is 0"),
    (10, 4, "batch_size is 10.*4 processes"),
])
def test_batches_that_cannot_be_drawn_are_refused_at_once(batch_size, ranks, words, monkeypatch):
    monkeypatch.setattr(processes, "ranks", lambda: ranks)
    with pytest.raises(ValueError, match=words):
        stream(batch_size)


@pytest.mark.gpu
@pytest.mark.parametrize("fits", [True, False])
def test_batches_on_the_gpu_are_those_of_the_cpu(fits, monkeypatch):
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    pixels = torch.from_numpy(noise(0, 50, 3, 4, 4))
    gpu = data.Batches(pixels, 8, 0, "cuda")
    places = set()
    for expected, x in itertools.islice(zip(data.Batches(pixels, 8, 0, "cpu"), gpu), 14):
        places.add(x.data_ptr())
        torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=1e-6)
    assert len(places) == 1 or not fits  # a captured update reads from one place
