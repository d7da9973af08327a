"""began.py: closed forms of k, M and the stall rule; who gets which gradient; the inversion of G.

Each of the mistakes that the docstring lists is computed here too, and seen to give something else.
"""
import math

import pytest
import torch
from torch import nn

import began
from began import after_look, convergence_measure, discriminator_loss, recon_loss, update_k
from common import files
from tests.helpers import TinyGenerator, central_difference, resume, states, still_losses
from tests.helpers import tiny, train


def images(n=8, channels=1, size=32, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


def made(seed=0, **changes):
    """(nets, update_d, update_g, state, args) of a small run."""
    torch.manual_seed(seed)
    args = tiny("began", **changes)
    nets = began.build(args)
    return nets, *began.updates(nets, args), args


def scalars(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


# ---- the auto-encoder's loss


def test_reconstruction_loss_is_a_mean_over_every_element():
    x_rec, x = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    pairs = zip(x_rec.flatten().tolist(), x.flatten().tolist())
    want = sum(abs(a - b) for a, b in pairs) / x.numel()
    found = recon_loss(x_rec, x)
    assert found.shape == () and found.item() == pytest.approx(want)
    tiled = [v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (x_rec, x)]
    torch.testing.assert_close(recon_loss(*tiled), found)
    torch.testing.assert_close(recon_loss(x_rec.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1)), found)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(recon_loss(x_rec[order], x[order]), found)


def test_gradient_of_the_loss_goes_through_the_target_too():
    """AE = identity: none is left. AE = 0: sign(v) / d, where a target that is detached gives 0."""
    v = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(recon_loss(v, v), v)
    assert not grad.any()
    (grad,) = torch.autograd.grad(recon_loss(0 * v, v), v)
    torch.testing.assert_close(grad, v.detach().sign() / 48)
    (wrong,) = torch.autograd.grad(recon_loss(0 * v, v.detach()), v)
    assert not wrong.any()


def test_loss_of_bf16_images_is_taken_in_float32():
    x_rec, x = torch.rand(2, 4, 1, 8, 8).bfloat16()
    found = recon_loss(x_rec, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, recon_loss(x_rec.double(), x.double()).float())


def test_loss_of_d_weighs_generated_images_by_k():
    real, fake, k = scalars(0.2, 0.05, 0.4)
    fake.requires_grad_()
    loss = discriminator_loss(real, fake, k)
    assert loss.item() == pytest.approx(0.18)
    assert torch.autograd.grad(loss, fake)[0].item() == pytest.approx(-0.4)
    assert discriminator_loss(real, fake, 0 * k) == real


# ---- k and M


@pytest.mark.parametrize(
    "k, real, fake, gamma, lambda_k, want",
    [
        (0.0, 0.2, 0.05, 0.5, 0.001, 5e-5),
        (0.0, 0.2, 0.15, 0.5, 0.001, 0.0),  # would be -5e-5: the clamp that some leave out
        (1.0, 0.4, 0.1, 0.5, 0.001, 1.0),  # would be 1.0001
        (0.3, 0.4, 0.2, 0.5, 0.001, 0.3),  # in equilibrium
        (0.3, 0.0, 0.0, 0.5, 0.001, 0.3),
        (0.5, 0.2, 0.3, 0.7, 0.1, 0.484),
    ],
)
def test_k_by_hand(k, real, fake, gamma, lambda_k, want):
    found = update_k(*scalars(k, real, fake), gamma, lambda_k)
    assert found.item() == pytest.approx(want, abs=1e-12)


def test_update_of_k_makes_a_new_tensor_without_a_gradient():
    k, real, fake = scalars(0.25, 0.2, 0.05)
    for v in (real, fake):
        v.requires_grad_()
    new = update_k(k, real, fake, 0.5, 0.1)
    assert new.item() == pytest.approx(0.255) and k == 0.25
    assert not new.requires_grad and new.shape == () and new.data_ptr() != k.data_ptr()


def test_k_rises_when_generated_images_are_rebuilt_too_well():
    """D then heeds them more. With gamma at the other loss, or the sign turned, k would fall."""
    k, real, fake = scalars(0.5, 0.2, 0.02)  # fake / real is .1, below gamma
    assert update_k(k, real, fake, 0.5, 0.1) > k
    assert 0.5 * fake - real < 0 and fake - 0.5 * real < 0


def test_k_settles_where_the_ratio_is_gamma():
    """l(G) that rises with k, as D heeds generated images more: in the end l(G) / l(x) is gamma."""
    k, real = scalars(0.0, 0.2)
    for _ in range(2000):
        fake = 0.05 + 0.15 * k
        k = update_k(k, real, fake, 0.5, 0.1)
    assert (fake / real).item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    "real, fake, gamma, want",
    [(0.2, 0.05, 0.5, 0.25), (0.2, 0.15, 0.5, 0.25), (0.2, 0.1, 0.5, 0.2), (0.0, 0.0, 0.5, 0.0)],
)
def test_convergence_measure_by_hand(real, fake, gamma, want):
    found = convergence_measure(*scalars(real, fake), gamma)
    assert found.item() == pytest.approx(want) and found.shape == ()
    without_absolute_value = real + gamma * real - fake
    assert (without_absolute_value == pytest.approx(want)) == (fake <= gamma * real)


# ---- the stall rule


def test_rate_halves_when_m_is_not_below_its_best_by_a_thousandth():
    best, rate = torch.tensor(math.inf), torch.tensor(1.0)
    found = []
    for m in (0.3, 0.2, 0.1999, 0.19, 0.25, 0.18):
        best, rate = after_look(torch.tensor(m), best, rate)
        found.append((round(best.item(), 4), rate.item()))
    assert found == [(0.3, 1), (0.2, 1), (0.1999, 0.5), (0.19, 0.5), (0.19, 0.25), (0.18, 0.25)]


def test_rate_does_not_fall_below_a_sixteenth():
    best, rate = torch.tensor(0.1), torch.tensor(1.0)
    for want in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16):
        best, rate = after_look(torch.tensor(0.2), best, rate)
        assert rate == want and best == torch.tensor(0.1)


def test_m_is_looked_at_every_few_updates_whatever_is_logged():
    """best and rate of a run, against the rule in Python on the values of M that it logs."""
    nets, update_d, update_g, state, _ = made(stall_steps=3, lr=3e-2, log_every=1)
    best, rate, since = math.inf, 1.0, []
    rates = set()
    for i in range(1, 31):
        logs = update_d(images(seed=i)) | update_g()
        since.append(logs["convergence"].item())
        if i % 3 == 0:
            m = sum(since) / 3
            rate = rate if m < best * (1 - 1e-3) else max(rate / 2, 1 / 16)
            best, since = min(m, best), []
        assert state["rate"] == logs["rate"] == rate
        assert state["best"].item() == pytest.approx(best)
        rates.add(rate)
    assert len(rates) > 2  # it has stalled, and it has not


def test_the_mean_of_m_is_of_all_updates_at_first():
    _, update_d, update_g, state, _ = made(lr=3e-2)
    found = []
    for i in range(5):
        update_d(images(seed=i))
        found.append(update_g()["convergence"])
    torch.testing.assert_close(state["m_mean"], torch.stack(found).mean())


def test_without_looks_the_rate_stays():
    _, update_d, update_g, state, _ = made(stall_steps=0, lr=3e-2)
    for _ in range(8):
        update_d(images())
        update_g()
    assert state["rate"] == 1 and state["m_sum"] == 0


# ---- networks


@pytest.mark.parametrize("image_size, channels", [(8, 1), (16, 3), (32, 1), (64, 3), (128, 1)])
def test_networks_of_every_size(image_size, channels):
    nets = began.build(tiny("began", image_size=image_size, channels=channels))
    d = nets["discriminator"]
    x = nets["generator"](torch.rand(3, 8))
    assert x.shape == d(x).shape == (3, channels, image_size, image_size)
    code = d.encoder(x)
    assert code.shape == (3, 8)
    torch.testing.assert_close(d(x), d.decoder(code))


@pytest.mark.parametrize(
    "size, channels, width, z_dim, g, d",
    [
        (64, 3, 128, 64, 1_716_611, 13_405_379),
        (32, 1, 64, 64, 488_385, 2_308_673),
        (32, 1, 32, 32, 123_361, 578_849),
    ],
)
def test_networks_have_as_many_parameters_as_the_papers(size, channels, width, z_dim, g, d):
    with torch.device("meta"):
        kinds = began.Generator, began.AutoEncoder
        found = [kind(z_dim, channels, size, width) for kind in kinds]
    assert [sum(p.numel() for p in net.parameters()) for net in found] == [g, d]


def test_g_and_the_decoder_of_d_are_alike_and_share_no_weight():
    nets = began.build(tiny("began"))
    g, decoder = nets["generator"], nets["discriminator"].decoder
    for a, b in zip(g.parameters(), decoder.parameters(), strict=True):
        assert a.shape == b.shape and a.data_ptr() != b.data_ptr()


def test_networks_have_no_normalisation_and_no_activation_at_the_end():
    for net in began.build(tiny("began")).values():
        kinds = {type(m) for m in net.modules() if not list(m.children())}
        assert kinds <= {nn.Linear, nn.Conv2d, nn.ELU, nn.Upsample, nn.Flatten}
    g = began.Generator(8, 1, 32, 4)
    with torch.no_grad():
        g.to_image.bias.fill_(7)
    assert g(torch.zeros(1, 8)).mean() > 5


def test_samples_lie_in_the_range_of_images():
    args = tiny("began")
    nets = began.build(args)
    with torch.no_grad():
        nets["generator_ema"].to_image.weight.mul_(1000)
    x = began.sample(nets, args, began.latents(4, args))
    assert x.min() == -1 and x.max() == 1


def test_latents_are_uniform_and_their_path_is_straight():
    args = tiny("began", z_dim=64)
    z = began.latents(2000, args, torch.Generator().manual_seed(0))
    assert z.shape == (2000, 64) and z.abs().max() <= 1
    assert z.mean().item() == pytest.approx(0, abs=0.01)
    assert z.var().item() == pytest.approx(1 / 3, rel=0.02)  # N(0, I) has 1
    a, b = z[:2], z[2:4]
    assert torch.equal(began.between(a, b, 0), a) and torch.equal(began.between(a, b, 1), b)
    torch.testing.assert_close(began.between(a, b, 0.25), 0.75 * a + 0.25 * b)


# ---- updates


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def test_d_update_leaves_g_alone_and_the_other_way_round():
    nets, update_d, update_g, state, _ = made()
    g, d = nets["generator"], nets["discriminator"]
    before = weights(g)
    update_d(images())
    assert all(p.grad is None for p in g.parameters())
    assert all(p.grad.any() for p in d.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(g)))
    before, grads = weights(d), [p.grad.clone() for p in d.parameters()]
    update_g()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(d)))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, d.parameters()))
    assert all(p.grad.any() for p in g.parameters())


def test_d_is_not_taught_to_rebuild_generated_images():
    """Its gradient on them is -k times that of l: with k = 0 none. In one backward pass of both

    losses it would be 1 - k times that, and D learn to rebuild whatever G makes."""
    gradients = {}
    for k in (0.0, 0.5, 1.0):
        nets, update_d, _, state, args = made()
        state["k"].fill_(k)
        update_d(images())
        gradients[k] = torch.cat([p.grad.flatten() for p in nets["discriminator"].parameters()])
    nets, _, _, _, args = made()
    d, x = nets["discriminator"], images()
    recon_loss(d(x), x).backward()
    of_real = torch.cat([p.grad.flatten() for p in d.parameters()])
    torch.testing.assert_close(gradients[0.0], of_real)
    d.zero_grad()
    torch.manual_seed(0)
    began.build(args)  # the draws before those of the update
    fake = nets["generator"](torch.rand(8, args.z_dim) * 2 - 1).detach()
    recon_loss(d(fake), fake).backward()
    of_fake = torch.cat([p.grad.flatten() for p in d.parameters()])
    for k in (0.5, 1.0):
        torch.testing.assert_close(gradients[k], of_real - k * of_fake, rtol=1e-4, atol=1e-7)
    assert (gradients[0.5] - (of_real + 0.5 * of_fake)).abs().max() > 1e-3


def test_losses_and_k_are_those_of_the_definitions():
    nets, update_d, update_g, state, args = made(gamma=0.9, lambda_k=0.5)
    inputs, outputs, fakes = [], [], []
    d = nets["discriminator"]
    nets["generator"].register_forward_hook(lambda net, z, y: fakes.append(y.detach()))
    d.register_forward_pre_hook(lambda net, x: inputs.append(x[0].detach()))
    d.register_forward_hook(lambda net, x, y: outputs.append(y.detach()))
    k = 0.0
    for _ in range(3):
        logs = update_d(images())
        error = (outputs[-1] - inputs[-1]).abs()
        real, fake = error[:8].mean(), error[8:].mean()
        assert torch.equal(inputs[-1], torch.cat([images(), fakes[-1]]))  # real first
        torch.testing.assert_close(logs["loss_d"], real - k * fake)
        torch.testing.assert_close(logs["loss_real"], real)
        logs = update_g()
        assert torch.equal(inputs[-1], fakes[-1])
        loss_g = (outputs[-1] - inputs[-1]).abs().mean()
        torch.testing.assert_close(logs["loss_g"], loss_g)
        k = min(1, max(0, k + 0.5 * (0.9 * real.item() - loss_g.item())))  # of G's own images
        assert state["k"].item() == logs["k"].item() == pytest.approx(k, abs=1e-6)
        m = real + abs(0.9 * real - loss_g)
        torch.testing.assert_close(logs["convergence"], m)
    assert [len(x) for x in inputs] == [16, 8] * 3  # one call of D in each update
    assert 0 < k < 1


def test_z_is_uniform_and_drawn_anew_for_each_network():
    nets, update_d, update_g, _, _ = made(batch_size=64)
    seen = []
    nets["generator"].register_forward_pre_hook(lambda net, z: seen.append(z[0]))
    update_d(images(64))
    update_g()
    z = torch.cat(seen)
    assert len(z[:, 0].unique()) == 128
    assert z.abs().max() <= 1 and z.var().item() == pytest.approx(1 / 3, rel=0.15)


def test_what_is_logged_is_no_view_of_the_state():
    _, update_d, update_g, _, _ = made(lambda_k=0.2, gamma=1.0)
    logs = []
    for _ in range(3):
        update_d(images())
        logs.append(update_g())
    assert len({v["k"].item() for v in logs}) == 3


class TinyAutoEncoder(nn.Module):
    """Images [N, 1, 2, 2] -> the same in float64, smooth; 22 weights."""

    def __init__(self):
        super().__init__()
        layers = nn.Flatten(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)
        self.body = nn.Sequential(*layers).double()

    def forward(self, x):
        return self.body(x).view(-1, 1, 2, 2)


@pytest.mark.parametrize("key", ["discriminator", "generator"])
def test_every_derivative_agrees_with_differences_on_small_smooth_networks(key, monkeypatch):
    monkeypatch.setattr(began, "update_k", lambda k, *_: torch.full_like(k, 0.4))  # k stands still
    torch.manual_seed(0)
    g, average = TinyGenerator(), TinyGenerator()
    small = dict(generator=g, discriminator=TinyAutoEncoder(), generator_ema=average)
    real = torch.rand(8, 1, 2, 2, dtype=torch.float64) * 2 - 1
    nets, losses = still_losses("began", real, small, z_dim=2)
    losses["generator"]()  # sets k
    for p in nets[key].parameters():
        losses[key]()  # the differences before have left gradients of beside the point
        grad = p.grad.clone()
        for i in range(p.numel()):
            unit = torch.zeros_like(p)
            unit.view(-1)[i] = 1
            found = central_difference(losses[key], [p], [unit], 1e-7)
            assert grad.view(-1)[i].item() == pytest.approx(found.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("precision, wanted", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_convolutions_and_not_of_the_losses(precision, wanted):
    nets, update_d, update_g, state, _ = made(precision=precision)
    seen = []
    d = nets["discriminator"]
    for net in (nets["generator"].body, d.encoder, d.decoder):
        net.register_forward_hook(lambda net, x, y: seen.append(y.dtype))
    logs = update_d(images()) | update_g()
    assert set(seen) == {wanted} and len(seen) == 6
    assert {v.dtype for v in logs.values()} == {torch.float32}
    assert all(state[key].dtype == torch.float32 for key in ("k", "best", "rate", "loss_real"))


def test_k_and_m_of_several_processes_come_from_the_mean_of_their_losses(monkeypatch):
    """Another process has losses of .5 and .1, and the sum of both comes back."""
    _, update_d, update_g, state, _ = made(lambda_k=1.0, gamma=0.9)
    monkeypatch.setattr(began.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(began.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(began.dist, "all_reduce", lambda v: v.add_(torch.tensor([0.5, 0.1])))
    logs = update_d(images()) | update_g()
    real, fake = (logs["loss_real"] + 0.5) / 2, (logs["loss_g"] + 0.1) / 2
    torch.testing.assert_close(state["k"], (0.9 * real - fake).clamp(0, 1))
    torch.testing.assert_close(logs["convergence"], real + (0.9 * real - fake).abs())
    assert 0 < state["k"] < 1


# ---- inversion


def test_encode_finds_the_latents_of_generated_images():
    """A linear G of 64 pixels and 8 latents has one z for each of its images."""
    torch.manual_seed(0)
    args = tiny("began")
    matrix = torch.linalg.qr(torch.randn(64, 8))[0].T * 3

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(matrix, requires_grad=False)

        def forward(self, z):
            return (z @ self.matrix).view(-1, 1, 8, 8)

    nets = {"generator_ema": Linear()}
    z = began.latents(5, args)
    with torch.no_grad():
        x = nets["generator_ema"](z)
    with torch.no_grad():  # as it is called while pictures are drawn
        found = began.encode(nets, args, x)
    torch.testing.assert_close(found, z, atol=0.02, rtol=0)
    assert not found.requires_grad
    alone = began.encode(nets, args, x[:1])
    torch.testing.assert_close(alone, found[:1], atol=0.01, rtol=0)  # no image knows of the others
    beyond = began.encode(nets, args, nets["generator_ema"](5 * z))
    assert beyond.abs().max() <= 1  # cut to the prior's cube


def test_encode_leaves_the_networks_and_the_random_numbers_alone():
    args = tiny("began")
    nets = began.build(args)
    before = {key: v.clone() for key, v in states(nets).items()}
    random = torch.get_rng_state()
    x = images(2)
    z = began.encode(nets, args, x, steps=5)
    assert all(torch.equal(v, before[key]) for key, v in states(nets).items())
    assert all(p.grad is None for net in nets.values() for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
    left = began.residual(nets, args, x, z)
    torch.testing.assert_close(left, (x - began.sample(nets, args, z)).abs().mean((1, 2, 3)))
    assert (left < began.residual(nets, args, x, torch.zeros_like(z))).all()


# ---- runs


def kept(folder):
    """What a checkpoint holds of networks and state."""
    found = torch.load(folder / "checkpoint.pt")
    return found["nets"], {k: v for k, v in found["state"].items() if k != "batches"}


def test_a_run_that_goes_on_ends_in_the_same_bits(tmp_path):
    short = dict(stall_steps=2, lambda_k=0.2, gamma=0.9, lr=3e-2, lr_decay=0.0, eval_every=0)
    whole = train("began", tmp_path, steps=7, **short)
    state = kept(whole)[1]
    assert 0 < state["k"] < 1 and state["rate"] < 1 and state["m_sum"] > 0
    assert state["opt_g"]["param_groups"][0]["lr"] == pytest.approx(3e-2 * state["rate"].item())
    part = train("began", tmp_path / "part", steps=3, **short)
    resume("began", part, steps=7)
    torch.testing.assert_close(kept(part), kept(whole), rtol=0, atol=0)


def test_a_run_shows_mirror_images_and_scores_m_and_the_residual(tmp_path):
    folder = train("began", tmp_path, sample_every=1)
    for name in ("samples", "reconstructions", "mirrored"):
        assert (folder / f"{name}.png").exists() and (folder / name / "000002.png").exists()
    (row,) = files.read_csv(folder / "metrics.csv")
    assert float(row["residual"]) > 0
    m = kept(folder)[1]["m_mean"].item()
    assert float(row["convergence"]) == pytest.approx(m, abs=1e-6) and m > 0.1


@pytest.mark.parametrize("name, value", [("gamma", 1.5), ("gamma", -0.5), ("stall_steps", -1)])
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        began.Args(**{name: value})
