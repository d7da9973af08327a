"""ebgan.py: closed forms of energy, hinge and pulling-away term; who gets a gradient; warm-up.

Each of the mistakes that the docstring lists is computed here too, and seen to give something else.
"""
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ebgan
from ebgan import discriminator_loss, energy, generator_loss, pulling_away_term
from common.cli import Stopped
from tests.helpers import TinyGenerator, assert_same, central_difference, resume, states
from tests.helpers import still_losses, tiny, train


def images(n=8, channels=1, size=32, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


def made(seed=0, **changes):
    """(nets, update_d, update_g, state, args) of a small run."""
    torch.manual_seed(seed)
    args = tiny("ebgan", **changes)
    nets = ebgan.build(args)
    return nets, *ebgan.updates(nets, args), args


# ---- energy


def test_energy_of_a_black_image_rebuilt_as_grey_is_one():
    x = -torch.ones(2, 3, 4, 4)
    torch.testing.assert_close(energy(torch.zeros_like(x), x), torch.ones(2))


def test_energy_is_the_papers_norm_squared_over_the_pixels():
    """A margin of 10 on the norm is 10^2 / 1024 here; as it stands no energy reaches it."""
    torch.manual_seed(0)
    x_rec, x = torch.rand(2, 5, 1, 32, 32, dtype=torch.float64) * 2 - 1
    norm = (x_rec - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(energy(x_rec, x), norm**2 / 1024)
    assert (energy(-torch.ones(1, 1, 32, 32), torch.ones(1, 1, 32, 32)) == 4).all()
    assert ebgan.Args().margin == pytest.approx(10**2 / 1024, rel=0.05)


def test_energy_is_of_each_sample_and_a_mean_over_its_pixels():
    x_rec, x = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    e = energy(x_rec, x)
    assert e.shape == (6,)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(energy(x_rec[order], x[order]), e[order])
    tiled = [t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (x_rec, x)]
    torch.testing.assert_close(energy(*tiled), e)


def test_energy_of_bf16_images_is_taken_in_float32():
    x_rec, x = torch.rand(2, 4, 1, 8, 8).bfloat16()
    found = energy(x_rec, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, energy(x_rec.double(), x.double()).float())


def test_gradient_of_the_energy_goes_through_the_target_too():
    """AE = identity: none is left. AE = 0: 2 v / d, where a target that is detached gives 0."""
    v = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(energy(v, v).sum(), v)
    assert not grad.any()
    (grad,) = torch.autograd.grad(energy(0 * v, v).sum(), v)
    torch.testing.assert_close(grad, 2 * v.detach() / 16)
    (wrong,) = torch.autograd.grad(energy(0 * v, v.detach()).sum(), v)
    assert not wrong.any()
    torch.autograd.gradcheck(lambda a, b: energy(a, b), (v, torch.randn_like(v).requires_grad_()))


# ---- the hinge


def test_hinge_is_of_each_sample_and_not_of_the_mean():
    e_fake = torch.tensor([0.2, 1.0, 3.0])
    found = discriminator_loss(torch.zeros(3), e_fake, 1.0)
    assert found.item() == pytest.approx(0.8 / 3)
    assert F.relu(1.0 - e_fake.mean()).item() == 0  # the wrong form is blind to the first sample


def test_hinge_is_off_from_the_margin_on():
    e_fake = torch.tensor([0.2, 1.0, 3.0, 0.9], requires_grad=True)
    discriminator_loss(torch.zeros(4), e_fake, 1.0).backward()
    assert e_fake.grad.tolist() == [-0.25, 0, 0, -0.25]


def test_losses_are_means_over_the_batch():
    e_real, e_fake = torch.rand(2, 7, dtype=torch.float64)
    want = discriminator_loss(e_real, e_fake, 0.5)
    torch.testing.assert_close(want, e_real.mean() + (0.5 - e_fake).clamp(min=0).mean())
    torch.testing.assert_close(discriminator_loss(e_real.repeat(2), e_fake.repeat(2), 0.5), want)
    shuffled = discriminator_loss(e_real.flip(0), e_fake.roll(1), torch.tensor(0.5))
    torch.testing.assert_close(shuffled, want)
    torch.testing.assert_close(generator_loss(e_fake.repeat(2)), e_fake.mean())


def test_at_margin_zero_generated_images_teach_d_nothing():
    e_real, e_fake = torch.rand(5), torch.rand(5, requires_grad=True)
    loss = discriminator_loss(e_real, e_fake, 0.0)
    assert loss == e_real.mean() and not torch.autograd.grad(loss, e_fake)[0].any()


# ---- the pulling-away term


def unsquared(s):
    n, s = len(s), F.normalize(s.flatten(1), dim=1)
    return ((s @ s.T).sum() - n) / (n * (n - 1))


def test_pulling_away_of_codes_at_known_angles():
    u = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
    assert pulling_away_term(torch.eye(4).double()).item() == 0
    assert pulling_away_term(u.repeat(5, 1)).item() == pytest.approx(1)
    assert pulling_away_term(torch.cat([u, -u])).item() == pytest.approx(1)
    assert unsquared(torch.cat([u, -u])).item() == pytest.approx(-1)  # wrong: opposites rewarded
    at_60 = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])
    assert pulling_away_term(at_60).item() == pytest.approx(0.25)


def test_pulling_away_is_a_mean_over_pairs_of_two_different_samples():
    s = torch.randn(6, 5, dtype=torch.float64)
    pairs = [(s[i], s[j]) for i in range(6) for j in range(6) if i != j]
    cosines = [F.cosine_similarity(a, b, dim=0) ** 2 for a, b in pairs]
    found = pulling_away_term(s)
    torch.testing.assert_close(found, torch.stack(cosines).mean())
    every = F.normalize(s, dim=1) @ F.normalize(s, dim=1).T
    with_itself = every.square().sum() / 30  # the wrong form: 1 / (N - 1) more
    torch.testing.assert_close(with_itself, found + 1 / 5)
    assert found.item() != pytest.approx(unsquared(s).item(), abs=0.01)


def test_pulling_away_norms_each_code_by_itself():
    """Equal directions give 1 at any lengths. Wrong: a norm of the whole tensor, or over N."""
    u = torch.tensor([3.0, 0.0, 4.0, 0.0, 5.0], dtype=torch.float64)
    s = u * torch.tensor([[0.1], [1.0], [7.0], [300.0]])
    assert pulling_away_term(s).item() == pytest.approx(1)

    def with_norm(norm):
        return ((s / norm) @ (s / norm).T).square().fill_diagonal_(0).sum().item() / 12

    assert with_norm(s.norm(dim=1, keepdim=True)) == pytest.approx(1)
    assert with_norm(s.norm()) < 0.01
    assert with_norm(s.norm(dim=0).clamp(min=1e-8)) < 0.01
    torch.manual_seed(0)
    t = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(pulling_away_term(t * torch.rand(6, 1)), pulling_away_term(t))


def test_pulling_away_of_random_codes_is_one_over_their_length():
    s = torch.randn(2000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert pulling_away_term(s).item() == pytest.approx(1 / 16, rel=0.02)


def test_pulling_away_flattens_codes_that_are_maps():
    s = torch.randn(5, 2, 3, 3)
    torch.testing.assert_close(pulling_away_term(s), pulling_away_term(s.flatten(1)))


def test_pulling_away_of_one_sample_or_of_codes_that_are_zero_is_zero():
    one = torch.randn(1, 4, requires_grad=True)
    assert pulling_away_term(one) == 0
    s = torch.zeros(3, 4, requires_grad=True)
    value = pulling_away_term(s)
    value.backward()
    assert value == 0 and not s.grad.any()  # no NaN
    mixed = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert pulling_away_term(mixed).item() == pytest.approx(2 / 6)


def test_pulling_away_changes_with_copies_as_a_mean_would_not():
    s = torch.eye(3)
    assert pulling_away_term(torch.cat([s, s])).item() == pytest.approx(6 / 30)


def test_pulling_away_pushes_codes_to_right_angles():
    s = torch.tensor([[1.0, 0.0], [1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    codes = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(pulling_away_term, codes)
    for _ in range(200):
        (grad,) = torch.autograd.grad(pulling_away_term(s), s)
        s = (s - 0.5 * grad).detach().requires_grad_()
    assert pulling_away_term(s).item() < 1e-6


def test_pulling_away_is_taken_in_float32_under_autocast():
    s = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = pulling_away_term(s.bfloat16())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(pulling_away_term(s.bfloat16().double()).item(), rel=1e-5)


# ---- networks


@pytest.mark.parametrize("image_size, channels", [(8, 1), (16, 3), (32, 1), (64, 3), (128, 1)])
def test_networks_of_every_size(image_size, channels):
    nets = ebgan.build(tiny("ebgan", image_size=image_size, channels=channels, code_dim=6))
    x = nets["generator"](torch.randn(3, 8))
    assert x.shape == (3, channels, image_size, image_size) and x.abs().max() <= 1
    d = nets["discriminator"].eval()
    code = d.encoder(x)
    assert code.shape == (3, 6)  # the bottleneck
    torch.testing.assert_close(d(x), d.decoder(code))
    assert d(x).shape == x.shape


def test_a_reconstruction_does_not_depend_on_the_other_images():
    d = ebgan.build(tiny("ebgan", channels=3))["discriminator"].double().eval()
    x = images(4, 3).double()
    y = torch.cat([x[:1], 5 * torch.randn_like(x[1:])])
    torch.testing.assert_close(d(x)[0], d(y)[0], rtol=1e-12, atol=1e-14)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.Dropout)) for m in d.modules())


# ---- updates


def test_d_update_leaves_g_alone_and_the_other_way_round():
    nets, update_d, update_g, _, _ = made(lambda_pt=1.0)
    g, d = nets["generator"], nets["discriminator"]

    def weights(net):
        return [p.detach().clone() for p in net.parameters()]

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


def test_every_image_goes_through_d_in_one_call_and_z_is_fresh():
    nets, update_d, update_g, _, _ = made()
    sizes, seen = [], []
    nets["discriminator"].encoder.register_forward_hook(lambda net, x, y: sizes.append(len(x[0])))
    nets["generator"].register_forward_hook(lambda net, z, y: seen.append(z[0]))
    update_d(images())
    update_g()
    assert sizes == [16, 8]
    assert not torch.isin(seen[0], seen[1]).any()
    assert abs(torch.cat(seen).std() - 1) < 0.3  # N(0, I)


def test_losses_are_those_of_the_definitions():
    """Loss of each update against the formula, on the images that D saw and the codes it gave."""
    nets, update_d, update_g, _, args = made(lambda_pt=0.3, margin=0.9)
    d, inputs, codes, outputs, fakes = nets["discriminator"], [], [], [], []
    nets["generator"].register_forward_hook(lambda net, z, y: fakes.append(y.detach()))
    d.encoder.register_forward_pre_hook(lambda net, x: inputs.append(x[0].detach()))
    d.encoder.register_forward_hook(lambda net, x, y: codes.append(y.detach()))
    d.decoder.register_forward_hook(lambda net, x, y: outputs.append(y.detach()))
    logs = update_d(images())
    e_real, e_fake = (outputs[0] - inputs[0]).square().mean((1, 2, 3)).chunk(2)
    assert torch.equal(inputs[0], torch.cat([images(), fakes[0]]))  # real first
    torch.testing.assert_close(logs["loss_d"], e_real.mean() + F.relu(0.9 - e_fake).mean())
    torch.testing.assert_close(logs["energy_real"], e_real.mean())
    torch.testing.assert_close(logs["energy_fake"], e_fake.mean())
    assert logs["active"] == (e_fake < 0.9).float().mean()
    logs = update_g()
    assert torch.equal(inputs[1], fakes[1])
    pt = pulling_away_term(codes[1])
    torch.testing.assert_close(logs["pt"], pt)
    torch.testing.assert_close(logs["loss_g"], (outputs[1] - inputs[1]).square().mean() + 0.3 * pt)


def test_share_of_active_hinges_goes_from_all_to_none():
    for margin, share in ((4.1, 1), (0.0, 0)):
        assert made(margin=margin)[1](images())["active"] == share


def test_the_pulling_away_term_is_in_the_loss_of_g_alone():
    found = {}
    for weight in (0.0, 5.0):
        nets, update_d, update_g, _, _ = made(lambda_pt=weight)
        update_d(images())
        d = {k: v.clone() for k, v in states(nets).items() if k.startswith("discriminator")}
        update_g()
        found[weight] = d, [p.grad for p in nets["generator"].parameters()]
    assert_same(found[0.0][0], found[5.0][0])
    assert all(not torch.equal(a, b) for a, b in zip(found[0.0][1], found[5.0][1]))


def test_without_the_term_its_work_is_left_out(monkeypatch):
    monkeypatch.setattr(ebgan, "pulling_away_term", None)
    logs = made(lambda_pt=0.0)[2]()
    assert "pt" not in logs


def test_at_margin_zero_d_is_an_auto_encoder_of_real_images():
    nets, update_d, _, _, args = made(margin=0.0)
    d = nets["discriminator"].eval()
    energy(d(images()), images()).mean().backward()
    wanted = [p.grad for p in d.parameters()]
    d.zero_grad(set_to_none=True)
    update_d(images())
    for p, want in zip(d.parameters(), wanted):
        torch.testing.assert_close(p.grad, want)


class TinyAutoEncoder(nn.Module):
    """Images [N, 1, 2, 2] -> the same in float64, smooth; 22 weights."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh()).double()
        layers = nn.Linear(2, 4), nn.Tanh(), nn.Unflatten(1, (1, 2, 2))
        self.decoder = nn.Sequential(*layers).double()

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize("key", ["discriminator", "generator"])
def test_every_derivative_agrees_with_differences_on_small_smooth_networks(key):
    torch.manual_seed(0)
    g, average = TinyGenerator(), TinyGenerator()
    small = dict(generator=g, discriminator=TinyAutoEncoder(), generator_ema=average)
    real = torch.rand(8, 1, 2, 2, dtype=torch.float64) * 2 - 1
    nets, losses = still_losses("ebgan", real, small, z_dim=2, margin=0.7, lambda_pt=0.5)
    for p in nets[key].parameters():
        losses[key]()  # the differences before have left gradients of beside the point
        grad = p.grad.clone()
        for i in range(p.numel()):
            unit = torch.zeros_like(p)
            unit.view(-1)[i] = 1
            found = central_difference(losses[key], [p], [unit], 1e-6)
            assert grad.view(-1)[i].item() == pytest.approx(found.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("precision, wanted", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_convolutions_and_not_of_the_losses(precision, wanted):
    nets, update_d, update_g, _, _ = made(precision=precision)
    seen = []
    d = nets["discriminator"]
    for net in (nets["generator"].body, d.encoder, d.decoder):
        net.register_forward_hook(lambda net, x, y: seen.append(y.dtype))
    logs = update_d(images()) | update_g()
    assert set(seen) == {wanted} and len(seen) == 6
    assert {v.dtype for v in logs.values()} == {torch.float32}


def test_reconstructions_leave_d_as_it_is():
    nets = made()[0]
    before = {k: v.clone() for k, v in states(nets).items()}
    random, x = torch.get_rng_state(), images(3)
    assert torch.equal(ebgan.reconstruct(nets, x), ebgan.reconstruct(nets, x))
    assert_same(before, states(nets))
    assert torch.equal(random, torch.get_rng_state()) and nets["discriminator"].training


# ---- margin over the run, warm-up


def test_margin_is_constant_or_falls_over_the_last_part():
    args = tiny("ebgan", margin=0.2)
    assert [ebgan.margin_at(args, done) for done in (0, 0.5, 1)] == [0.2, 0.2, 0.2]
    args = tiny("ebgan", margin=0.2, margin_decay=0.5)
    found = [ebgan.margin_at(args, done) for done in (0, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.2, 0.2, 0.1, 0])


def test_margin_in_the_state_is_what_d_obeys():
    _, update_d, _, state, _ = made(margin=4.1)
    state["margin"].fill_(0.0)
    logs = update_d(images())
    assert logs["loss_d"] == logs["energy_real"]


def test_warm_up_trains_d_on_real_images_alone_and_is_counted():
    nets, _, _, state, args = made()
    d = nets["discriminator"].eval()  # or each call would move the vectors of spectral_norm

    def all_but_d():
        return {k: v.clone() for k, v in states(nets).items() if not k.startswith("discriminator")}

    others = all_but_d()
    energy(d(images()), images()).mean().backward()
    wanted = [p.grad for p in d.parameters()]
    d.zero_grad(set_to_none=True)
    random = torch.get_rng_state()
    warm = ebgan.warm_up(nets, args, state)
    first = warm(images())["energy_real"]
    for p, want in zip(d.parameters(), wanted):
        torch.testing.assert_close(p.grad, want)
    for _ in range(30):
        last = warm(images())["energy_real"]
    assert last < 0.9 * first
    assert state["warmed"] == 31 and state["t"] == 0
    assert torch.equal(random, torch.get_rng_state())
    assert_same(others, all_but_d())


# ---- runs


def kept(folder):
    """What a checkpoint holds of networks and state."""
    found = torch.load(folder / "checkpoint.pt")
    return found["nets"], {k: v for k, v in found["state"].items() if k != "batches"}


def test_a_run_that_is_stopped_while_d_warms_up_ends_in_the_same_bits(tmp_path, monkeypatch):
    short = dict(warmup_steps=4, margin_decay=1.0, eval_every=0)
    whole = train("ebgan", tmp_path, steps=4, **short)
    state = kept(whole)[1]
    assert state["warmed"] == 4 and state["t"] == 4 and 0 < state["margin"] < 0.1
    assert torch.load(whole / "checkpoint.pt")["state"]["batches"]["drawn"] == 8
    make = ebgan.warm_up

    def stopped(nets, args, state):
        warm = make(nets, args, state)

        def warm_and_stop(real):
            if state["warmed"] == 1:
                signal.raise_signal(signal.SIGINT)
            return warm(real)

        return warm_and_stop

    monkeypatch.setattr(ebgan, "warm_up", stopped)
    with pytest.raises(Stopped):
        train("ebgan", tmp_path / "part", steps=2, **short)
    monkeypatch.undo()
    (part,) = (tmp_path / "part").iterdir()
    assert kept(part)[1]["warmed"] == 2 and kept(part)[1]["t"] == 0
    resume("ebgan", part, steps=4)
    torch.testing.assert_close(kept(part), kept(whole), rtol=0, atol=0)


def test_a_run_shows_images_and_what_d_makes_of_them(tmp_path):
    folder = train("ebgan", tmp_path, sample_every=1, eval_every=0)
    for name in ("samples", "reconstructions"):
        assert (folder / f"{name}.png").exists() and (folder / name / "000002.png").exists()


@pytest.mark.parametrize("name, value", [("margin_decay", 1.5), ("warmup_steps", -1), ("code_dim", 0)])
def test_arguments_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        ebgan.Args(**{name: value})
