"""pix2pix.py: closed forms, gradients, routing, networks, jitter, degenerate settings."""
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

import pix2pix
from common.run import Run
from pix2pix import PatchDiscriminator, UNetGenerator
from tests.helpers import assert_same, central_difference, states

LN2 = math.log(2)


def arguments(**changes):
    tiny = dict(steps=2, batch_size=3, image_size=16, width=4, patch_layers=1, device="cpu")
    tiny |= dict(precision="fp32", channels_a=3, channels_b=3, jitter=True)
    return pix2pix.Args(**(tiny | changes))


def pairs(args, seed=1):
    rng = torch.Generator().manual_seed(seed)
    shape = args.batch_size, args.channels_a + args.channels_b, args.image_size, args.image_size
    return torch.rand(shape, generator=rng) * 2 - 1


def trained(iterations=2, **changes):
    """(nets, args, losses) after that many updates on pairs that do not change."""
    args = arguments(**changes)
    torch.manual_seed(0)
    nets = pix2pix.build(args)
    update, _ = pix2pix.updates(nets, args)
    return nets, args, [update(pairs(args)) for _ in range(iterations)]


def count(net):
    return sum(p.numel() for p in net.parameters())


# ---- losses ----


def test_losses_of_a_discriminator_that_says_nothing():
    d = torch.zeros(2, 1, 5, 5)
    assert pix2pix.discriminator_loss(d, d).item() == pytest.approx(LN2)
    assert pix2pix.generator_adv_loss(d).item() == pytest.approx(LN2)


def test_half_of_the_discriminators_loss_reaches_its_gradient():
    d_real = torch.tensor([0.0, 2.0], requires_grad=True)
    d_fake = torch.tensor([0.0, -1.0], requires_grad=True)
    pix2pix.discriminator_loss(d_real, d_fake).backward()
    half = 0.5 / 2  # of a mean over two
    sigmoid = torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.0])
    sigmoid[0][1], sigmoid[1][1] = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(1))
    torch.testing.assert_close(d_real.grad, -half * sigmoid[0])
    torch.testing.assert_close(d_fake.grad, half * sigmoid[1])


def test_generator_loss_does_not_saturate():
    d = torch.tensor([-5.0], requires_grad=True)
    pix2pix.generator_adv_loss(d).backward()
    assert d.grad.item() == pytest.approx(-0.9933071, abs=1e-6)
    assert pix2pix.generator_adv_loss(torch.tensor([-1e4])).item() == 1e4


def test_l1_is_a_mean_over_every_element_and_so_is_its_gradient():
    real = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    fake = (real + 0.1 * torch.where(torch.rand_like(real) < 0.5, 1, -1)).requires_grad_()
    loss = pix2pix.l1_loss(fake, real)
    loss.backward()
    assert loss.item() == pytest.approx(0.1)
    torch.testing.assert_close(fake.grad, (fake.detach() - real).sign() / real.numel())
    tiled = pix2pix.l1_loss(*(x.detach().repeat(2, 1, 2, 2) for x in (fake, real)))
    assert tiled.item() == pytest.approx(0.1)


def test_losses_are_means_over_images_and_patches():
    a, b = torch.randn(2, 5, 1, 3, 3, dtype=torch.float64)
    d, g = pix2pix.discriminator_loss, pix2pix.generator_adv_loss
    torch.testing.assert_close(d(a, b), d(torch.cat([a, a]), torch.cat([b, b])))
    torch.testing.assert_close(d(a, b), d(a.flip(0), b.flip(2)))
    torch.testing.assert_close(g(b), g(b.repeat(1, 1, 2, 2)))


def test_loss_of_g_is_that_of_the_paper_in_numbers():
    """D = 0 and |b - G(a)| = .1 everywhere: ln 2 + 100 x .1; then each term by itself."""

    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.1))

        def forward(self, a):
            return a + self.shift

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.zero * x.mean((1, 2, 3), keepdim=True)

    a = torch.rand(3, 3, 16, 16) / 2
    settings = {}, {"lambda_adv": 0.5}, {"lambda_l1": 0}
    for changes, expected in zip(settings, (LN2 + 10, LN2 / 2 + 10, LN2)):
        args = arguments(jitter=False, mirror=False, lr=1e-9, **changes)
        nets = dict(generator=Off(), discriminator=Silent(), generator_ema=Off())
        found = pix2pix.updates(nets, args)[0](torch.cat([a, a], 1))
        assert found["loss_g"].item() == pytest.approx(expected, rel=1e-5)
        assert found["loss_d"].item() == pytest.approx(LN2)
        assert found["d_real"].item() == found["d_fake"].item() == 0.5


# ---- networks ----


def test_parameters_of_the_generator_are_those_of_the_paper():
    assert count(UNetGenerator(3, 3, 256, 64)) == 54_413_955
    assert count(UNetGenerator(3, 3, 128, 64)) == 41_828_995
    assert count(UNetGenerator(3, 3, 64, 16)) == 1_830_563
    assert count(UNetGenerator(1, 1, 32, 16)) == 1_042_081


@pytest.mark.parametrize(
    "norm, width, counts",
    [
        ("batch", 16, {1: 10_321, 2: 43_729, 3: 176_081}),
        ("instance", 16, {1: 10_289, 2: 43_633, 3: 175_857}),
        ("batch", 64, {0: 9_025, 3: 2_768_705}),
        ("instance", 64, {3: 2_767_809}),
    ],
)
def test_parameters_of_the_discriminator(norm, width, counts):
    for n_layers, expected in counts.items():
        assert count(PatchDiscriminator(6, width, n_layers, norm)) == expected


@pytest.mark.parametrize(
    "n_layers, size, side",
    [(0, 64, 64), (1, 64, 30), (2, 64, 14), (3, 64, 6), (4, 64, 2), (3, 256, 30)],
)
def test_maps_of_scores(n_layers, size, side):
    d = PatchDiscriminator(2, 2, n_layers)
    assert d(torch.zeros(2, 2, size, size)).shape == (2, 1, side, side)


@pytest.mark.parametrize("n_layers, field", [(0, 1), (1, 16), (2, 34), (3, 70), (4, 142), (5, 286)])
def test_a_score_sees_a_square_of_the_image(n_layers, field):
    torch.manual_seed(0)
    d = PatchDiscriminator(1, 1, n_layers).double().eval()
    for p in d.parameters():
        nn.init.constant_(p, 0.5)  # positive, so that no path cancels another
    size = 2 * (field + 2**n_layers)
    x = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    scores = d(x)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    rows, columns = (x.grad[0, 0] != 0).nonzero().T
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == field


@pytest.mark.parametrize("n_layers, size", [(2, 8), (3, 16), (5, 64), (6, 512)])
def test_patches_that_leave_no_map_are_bad_input(n_layers, size):
    with pytest.raises(ValueError, match="patch_layers|image_size"):
        arguments(patch_layers=n_layers, image_size=size)
    assert arguments(patch_layers=4, image_size=64).patch_layers == 4


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_normalised_layers_have_one_shift(norm):
    for net in (UNetGenerator(3, 3, 32, 4, norm), PatchDiscriminator(6, 4, 3, norm)):
        layers = [m for m in net.modules() if not list(m.children())]
        for layer, after in zip(layers, layers[1:]):
            if isinstance(after, nn.BatchNorm2d):
                assert layer.bias is None and after.affine
                assert (after.eps, after.momentum) == (1e-5, 0.1)
            if isinstance(after, nn.InstanceNorm2d):
                assert layer.bias is not None and not after.affine
                assert not after.track_running_stats


@pytest.mark.parametrize("size, layers", [(16, 2), (32, 3), (64, 3), (256, 3)])
def test_dropout_is_on_the_innermost_layers_of_the_decoder(size, layers):
    g = UNetGenerator(1, 1, size, 1)
    noisy = [any(isinstance(m, nn.Dropout) for m in up) for up in g.ups]
    assert noisy == [True] * layers + [False] * (len(g.ups) - layers)
    assert not any(isinstance(m, nn.Dropout) for m in g.downs.modules())


def test_skips_carry_detail_past_the_bottleneck():
    """With the bottleneck silenced, a U-Net still answers to its input, the other one does not."""
    x, y = torch.rand(2, 1, 3, 32, 32)
    for skips in (True, False):
        g = UNetGenerator(3, 3, 32, 4, skips=skips).eval()
        nn.init.zeros_(g.ups[0][1].weight)
        assert torch.equal(g(x), g(y)) is not skips
    assert count(UNetGenerator(3, 3, 32, 4)) > count(UNetGenerator(3, 3, 32, 4, skips=False))


def test_each_skip_joins_the_layer_of_its_resolution():
    g, seen = UNetGenerator(3, 3, 32, 4).eval(), []
    for layer in [*g.ups, g.to_image]:
        layer.register_forward_pre_hook(lambda m, x: seen.append(tuple(x[0].shape[1:])))
    g(torch.rand(1, 3, 32, 32))
    assert seen == [(32, 1, 1), (64, 2, 2), (32, 4, 4), (16, 8, 8), (8, 16, 16)]


def test_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    nets = pix2pix.build(arguments(image_size=64, width=16))
    for net in (nets["generator"], nets["discriminator"]):
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert layer.bias is None or not layer.bias.any()
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert 0 < layer.weight.std() < 0.04 and not layer.bias.any()


def test_the_generator_exports_and_loads_alone():
    g = UNetGenerator(3, 1, 16, 4).eval()
    x = torch.rand(2, 3, 16, 16)
    exported = torch.export.export(g, (x,)).module()
    torch.testing.assert_close(exported(x), g(x))


# ---- the update ----


def test_gradients_reach_the_network_of_each_loss_and_no_other():
    args = arguments()
    torch.manual_seed(0)
    nets = pix2pix.build(args)
    g, d = nets["generator"], nets["discriminator"]
    update, state = pix2pix.updates(nets, args)
    steps = []

    def note(name):
        of_g = [p.grad is not None and bool(p.grad.any()) for p in g.parameters()]
        steps.append((name, of_g, [p.grad.clone() for p in d.parameters()]))

    state["opt_d"].register_step_pre_hook(lambda *_: note("d"))
    state["opt_g"].register_step_pre_hook(lambda *_: note("g"))
    update(pairs(args))
    (first, before, of_d), (second, after, later) = steps
    assert (first, second) == ("d", "g")
    assert all(grad.any() for grad in of_d) and not any(before)  # D's loss leaves nothing for G
    assert all(after) and all(torch.equal(a, b) for a, b in zip(of_d, later))  # nor G's for D


def test_gradients_of_one_update_do_not_add_to_those_of_the_last():
    args = arguments(lr=0.0)
    nets = pix2pix.build(args)
    update, grads = pix2pix.updates(nets, args)[0], []
    for _ in range(2):
        torch.manual_seed(0)
        update(pairs(args))
        trained = [*nets["generator"].parameters(), *nets["discriminator"].parameters()]
        grads.append([p.grad.clone() for p in trained])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_g_meets_the_discriminator_after_its_step_and_one_translation_serves_both():
    args = arguments()
    nets = pix2pix.build(args)
    calls, versions = [], []

    def note(d, *_):
        versions.append(d.head.weight.detach().clone())

    nets["generator"].register_forward_hook(lambda m, x, y: calls.append(y))
    nets["discriminator"].register_forward_hook(note)
    pix2pix.updates(nets, args)[0](pairs(args))
    assert len(calls) == 1 and len(versions) == 3
    assert torch.equal(versions[0], versions[1]) and not torch.equal(versions[1], versions[2])


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("condition", [True, False])
def test_what_d_is_shown(direction, condition):
    still = dict(jitter=False, mirror=False, channels_b=1)
    args = arguments(direction=direction, condition=condition, **still)
    pair, seen, made = pairs(args), [], []
    a, b = pair.split((3, 1), 1)
    if direction == "BtoA":
        a, b = b, a
    nets = pix2pix.build(args)
    nets["discriminator"].register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    nets["generator"].register_forward_hook(lambda m, x, y: made.append((x[0], y.detach())))
    pix2pix.updates(nets, args)[0](pair)
    (source, fake), = made
    assert torch.equal(source, a)
    for shown, image in zip(seen, (b, fake, fake)):  # real pairs first, and one order for all
        assert torch.equal(shown, torch.cat([a, image], 1) if condition else image)


def test_the_input_alone_moves_the_scores_of_a_conditioned_discriminator():
    a, other, b = torch.rand(3, 2, 3, 16, 16)
    d = pix2pix.build(arguments())["discriminator"].eval()
    assert not torch.equal(d(torch.cat([a, b], 1)), d(torch.cat([other, b], 1)))


def test_without_an_adversarial_term_it_is_plain_regression_to_the_bit():
    args = arguments(lambda_adv=0)
    torch.manual_seed(0)
    nets = pix2pix.build(args)
    initial = {k: v.clone() for k, v in nets["discriminator"].state_dict().items()}
    nets["discriminator"].register_forward_pre_hook(lambda *_: pytest.fail("D was evaluated"))
    update, state = pix2pix.updates(nets, args)
    assert [sorted(update(pairs(args))) for _ in range(5)] == [["loss_g", "loss_l1", "lr"]] * 5
    assert_same(nets["discriminator"].state_dict(), initial)

    torch.manual_seed(0)
    g = pix2pix.build(args)["generator"]
    optimiser = torch.optim.Adam(g.parameters(), torch.tensor(args.lr), (0.5, 0.999), fused=True)
    for _ in range(5):
        a, b = pix2pix.jittered(pairs(args)).split(3, 1)
        optimiser.zero_grad()
        (100 * (g(a) - b).abs().mean()).backward()
        optimiser.step()
    assert_same(g.state_dict(), nets["generator"].state_dict())


def test_without_l1_the_targets_reach_g_through_d_alone():
    assert "loss_l1" not in trained(1, lambda_l1=0)[2][0]
    with pytest.raises(ValueError, match="nothing"):
        arguments(lambda_adv=0, lambda_l1=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"skips": False},
        {"norm": "instance"},
        {"norm": "instance", "batch_size": 1},
        {"condition": False},
        {"patch_layers": 0},
        {"patch_layers": 2},
        {"channels_b": 1, "direction": "BtoA"},
    ],
)
def test_every_setting_trains_both_networks(changes):
    args = arguments(**changes)
    torch.manual_seed(0)
    initial = pix2pix.build(args)
    nets, _, losses = trained(1, **changes)
    for name in ("generator", "discriminator"):
        for (key, before), after in zip(initial[name].named_parameters(), nets[name].parameters()):
            assert not torch.equal(before, after), (name, key)
    assert all(math.isfinite(v) for v in losses[0].values())


def test_batches_of_one_ask_for_instance_norm():
    with pytest.raises(ValueError, match="--norm instance"):
        arguments(batch_size=1)


def test_a_seed_repeats_a_run():
    assert_same(states(trained(seed=0)[0]), states(trained(seed=0)[0]))


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_gradients_are_those_of_central_differences(name):
    """In float64, along a random direction, through networks of fewer than 20 weights."""
    args = arguments(jitter=False, mirror=False, lr=0.0)
    torch.manual_seed(0)

    def small(channels, out):
        layers = nn.Conv2d(channels, 2, 1), nn.Softplus(), nn.Conv2d(2, out, 1), nn.Tanh()
        return nn.Sequential(*layers).double()

    nets = dict(generator=small(3, 3), discriminator=small(6, 1), generator_ema=small(3, 3))
    update, state = pix2pix.updates(nets, args)
    for key in ("opt_g", "opt_d"):
        state[key].param_groups[0]["lr"].fill_(0.0)
    pair = pairs(args).double()
    weights = list(nets[name].parameters())
    directions = [torch.randn_like(w) for w in weights]
    key = {"generator": "loss_g", "discriminator": "loss_d"}[name]
    update(pair)
    found = sum((w.grad * v).sum() for w, v in zip(weights, directions))
    expected = central_difference(lambda: update(pair)[key], weights, directions, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


# ---- jitter ----


def test_jitter_treats_both_images_of_a_pair_alike():
    image = torch.rand(6, 3, 32, 32) * 2 - 1
    a, b = pix2pix.jittered(torch.cat([image, image], 1)).split(3, 1)
    assert torch.equal(a, b) and a.shape == image.shape
    assert not torch.equal(a, image)
    assert a.abs().max() <= 1


def test_every_pair_is_moved_by_its_own_amount():
    x = (torch.rand(1, 1, 64, 64) * 2 - 1).expand(50, -1, -1, -1)
    places = {tuple(image.flatten()[:9].tolist()) for image in pix2pix.jittered(x, mirror=False)}
    assert len(places) > 25  # of 81
    places = {tuple(image.flatten()[:9].tolist()) for image in pix2pix.jittered(x, enlarge=False)}
    assert len(places) == 2


def test_jitter_cuts_from_the_enlarged_image():
    """A linear ramp gets flatter by 256/286."""
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 128).expand(8, 2, 128, 128)  # 143 px when enlarged
    out = pix2pix.jittered(ramp, mirror=False)
    slope = (out[..., 100] - out[..., 20]) / 80
    expected = torch.full_like(slope, 2 / 127 * 128 / 143)
    torch.testing.assert_close(slope, expected, rtol=1e-2, atol=0)
    mirrored = pix2pix.jittered(ramp, enlarge=False)
    for image in mirrored:
        assert torch.equal(image, ramp[0]) or torch.equal(image, ramp[0].flip(-1))


def test_jitter_reaches_both_ends_of_its_room():
    x = torch.zeros(400, 1, 32, 32)
    x[:, :, 0], x[:, :, -1] = 1, -1
    out = pix2pix.jittered(x, mirror=False)
    first, last = (out[:, 0, 0] > 0.5).any(1), (out[:, 0, -1] < -0.5).any(1)
    assert first.any() and last.any() and not (first & last).any()


def test_jitter_that_is_off_draws_nothing():
    x = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(pix2pix.jittered(x, False, False), x)
    assert torch.equal(torch.rand(3), expected)


# ---- translations ----


def test_dropout_stays_on_at_test_unless_told_otherwise():
    nets, args, _ = trained(2, image_size=32)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    one, two = (pix2pix.sample(nets, args, x) for _ in range(2))
    still, again = (pix2pix.sample(nets, args, x, dropout=False) for _ in range(2))
    assert not torch.equal(one, two) and torch.equal(still, again)
    assert not torch.equal(one, pix2pix.sample(nets, args, x))  # on again after it was off


def test_translations_come_from_the_averaged_weights_and_running_statistics():
    nets, args, _ = trained(2)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    y = pix2pix.sample(nets, args, x, dropout=False)
    torch.testing.assert_close(y[:1], pix2pix.sample(nets, args, x[:1], dropout=False))  # no batch
    torch.testing.assert_close(y, nets["generator_ema"](x))
    assert not y.requires_grad and y.abs().max() <= 1


@pytest.mark.parametrize("shape", [(16, 48), (32, 16)])
def test_translations_have_the_size_of_the_input(shape):
    args = arguments(channels_b=1)
    nets = pix2pix.build(args)
    assert pix2pix.multiple(args) == 16
    assert pix2pix.sample(nets, args, torch.zeros(1, 3, *shape)).shape == (1, 1, *shape)


def test_networks_follow_from_args_alone():
    args = arguments(channels_a=1, direction="BtoA", condition=False)
    nets = pix2pix.build(args)
    assert pix2pix.sample(nets, args, torch.zeros(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    assert nets["discriminator"](torch.zeros(2, 1, 16, 16)).shape == (2, 1, 6, 6)


def test_rate_is_constant_then_falls_to_zero():
    args = arguments(lr=2e-4)
    rates = [pix2pix.learning_rate(args, done) for done in (0, 0.5, 0.505, 0.75, 0.995)]
    assert rates == pytest.approx([2e-4, 2e-4, 1.98e-4, 1e-4, 2e-6])
    assert pix2pix.learning_rate(arguments(lr=2e-4, lr_decay=0), 0.9) == 2e-4


def run(folder, **changes):
    """Run folder of two updates on eight pairs of noise, which are written to folder first."""
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        (folder / "pairs" / split).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            pixels = torch.randint(256, (16, 32, 3), dtype=torch.uint8, generator=rng)
            Image.fromarray(pixels.numpy()).save(folder / "pairs" / split / f"{i}.png")
    pairs, cache = folder / "pairs", folder / "cache"
    where = dict(dataset=str(pairs), cache_dir=str(cache), out_dir=str(folder))
    short = dict(steps=2, eval_samples=8, quiet=True, threads=1, channels_a=0, channels_b=0)
    return pix2pix.main(arguments(**(where | short | changes)))


def test_pictures_and_scores_use_up_none_of_the_random_numbers_of_training(tmp_path):
    often, never = (run(tmp_path, sample_every=n, eval_every=n) for n in (1, 0))
    one, two = (torch.load(f / "checkpoint.pt")["nets"]["generator"] for f in (often, never))
    assert_same(one, two)


def test_a_run_says_how_far_it_is_from_its_targets_and_from_doing_nothing(tmp_path):
    folder = run(tmp_path, direction="BtoA", lr=1e-9)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 8 and metrics["features"] == "cifarnet"
    assert metrics["l1"] == pytest.approx(0.5, abs=0.02)  # of grey from uniform noise
    assert metrics["psnr"] == pytest.approx(10 * math.log10(4 * 3), abs=0.1)  # MSE 1/3
    inputs = metrics["baselines"]["input"]
    assert inputs["l1"] == pytest.approx(2 / 3, abs=0.02) and abs(inputs["ssim"]) < 0.1
    assert metrics["baselines"]["mean of training"]["l1"] < inputs["l1"]
    assert set(metrics["baselines"]["training images"]) == {"fid", "kid"}
    args = json.loads((folder / "args.json").read_text())["args"]
    assert (args["channels_a"], args["channels_b"]) == (3, 3)
    weights = torch.load(folder / "generator.pt")
    UNetGenerator(3, 3, 16, 4).load_state_dict(weights)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_run_stopped_past_the_start_of_the_decay_goes_on_to_the_same_bits(norm, tmp_path):
    """Batches that end within an epoch, dropout, jitter and the falling rate."""
    changes = dict(norm=norm, batch_size=3, jitter=True, sample_every=2, log_every=1)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(tmp_path / "a", steps=6, **changes)
    stop = RuntimeError("stopped")

    def at_four(self, losses, step=Run.after_step):
        step(self, losses)
        if self.step == 4:
            raise stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_step", at_four)
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path / "b", steps=6, **changes)
    (part,) = (p for p in (tmp_path / "b").iterdir() if p.name.startswith("pix2pix-"))
    assert pix2pix.main(pix2pix.Args(resume=str(part), quiet=True)) == part
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, part))
    assert a["step"] == b["step"] == 6

    def tensors(value, name=""):
        if isinstance(value, dict):
            return {k: v for key in value for k, v in tensors(value[key], f"{name}.{key}").items()}
        if isinstance(value, list):
            return tensors(dict(enumerate(value)), name)
        return {name: value} if isinstance(value, torch.Tensor) else {}

    x, y = (tensors({k: v[k] for k in ("nets", "state", "ranks")}) for v in (a, b))
    assert x.keys() == y.keys() and len(x) > 50
    assert [k for k in x if not torch.equal(x[k], y[k])] == []
    rows = [(f / "log.csv").read_text().splitlines() for f in (whole, part)]
    cut = [[",".join(r.split(",")[:1] + r.split(",")[2:]) for r in table] for table in rows]
    assert cut[0] == cut[1] and len(cut[0]) == 7
