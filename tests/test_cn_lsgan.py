"""cn_lsgan.py: closed forms without halves, the penalty's target, what the constraint does."""
import pytest
import torch
from torch import nn

import cn_lsgan
import lsgan
from cn_lsgan import discriminator_loss, generator_loss, reconstruction_constraint
from common import cli
from tests.helpers import LinearCritic, Recorder, assert_same, states, tiny, trained

OFF = {"lambda_gp": 0.0, "lambda_rec": 0.0}


def updated(nets=None, real=None, ops=None, **changes):
    """(nets, fakes, logs) of one update of each network; fakes are the images G made, in order."""
    args = tiny("cn_lsgan", **changes)
    torch.manual_seed(0)
    nets = cn_lsgan.build(args) | (nets or {})
    fakes = []
    nets["generator"].register_forward_hook(lambda m, z, y: fakes.append(y.detach()))
    update_d, update_g, _ = cn_lsgan.updates(nets, args, ops)
    logs = update_d(torch.rand(8, 1, 32, 32) if real is None else real)
    return nets, fakes, logs | update_g()


# ---- adversarial losses


@pytest.mark.parametrize("score, d_loss, g_loss", [(0.0, 1.0, 1.0), (0.5, 0.5, 0.25), (1.0, 1.0, 0.0)])
def test_losses_at_constant_scores(score, d_loss, g_loss):
    d = torch.full((5,), score)
    assert discriminator_loss(d, d).item() == pytest.approx(d_loss, abs=1e-7)
    assert generator_loss(d).item() == pytest.approx(g_loss, abs=1e-7)


def test_losses_are_those_of_lsgan_without_halves():
    d_real, d_fake = torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(discriminator_loss(d_real, d_fake), 2 * lsgan.discriminator_loss(d_real, d_fake))
    torch.testing.assert_close(generator_loss(d_fake), 2 * lsgan.generator_loss(d_fake))


def test_gradients_of_the_losses():
    d_real = torch.tensor([1.0, 0.3], requires_grad=True)
    d_fake = torch.tensor([0.0, 3.0], requires_grad=True)
    discriminator_loss(d_real, d_fake).backward()
    torch.testing.assert_close(d_real.grad, torch.tensor([0.0, -0.7]))
    torch.testing.assert_close(d_fake.grad, torch.tensor([0.0, 3.0]))
    d_fake.grad = None
    generator_loss(d_fake).backward()
    torch.testing.assert_close(d_fake.grad, torch.tensor([-1.0, 2.0]))


def test_losses_are_means_over_the_batch():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(discriminator_loss(a, b), discriminator_loss(torch.cat([a, a]), torch.cat([b, b])))
    torch.testing.assert_close(discriminator_loss(a, b), discriminator_loss(a[order], b[order.flip(0)]))
    torch.testing.assert_close(generator_loss(b), generator_loss(torch.cat([b, b])))


# ---- the constraint


def test_constraint_by_hand():
    assert reconstruction_constraint(torch.zeros(2, 1, 32, 32), torch.full((2, 1, 32, 32), -1.0)).item() == 1
    fake = torch.zeros(2, 1, 1, 1, requires_grad=True)
    loss = reconstruction_constraint(fake, torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    loss.backward()
    assert loss.item() == 1
    assert fake.grad.flatten().tolist() == [-1, 1]


def test_constraint_is_a_mean_over_pixels_and_batch():
    a, b = torch.randn(2, 4, 1, 3, 3)
    tiled = [t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (a, b)]
    torch.testing.assert_close(reconstruction_constraint(a, b), reconstruction_constraint(*tiled))
    torch.testing.assert_close(reconstruction_constraint(a, b), reconstruction_constraint(torch.cat([a, a]), torch.cat([b, b])))


def test_expected_constraint_is_distance_of_means_and_both_variances():
    """Over all pairs of independent G(z) and x: (|E G - m|^2 + tr Cov G + tr Cov x) / d."""
    g = torch.randn(5, 1, 3, 4, dtype=torch.float64)
    x = 1 + 2 * torch.randn(7, 1, 3, 4, dtype=torch.float64)
    pairs = reconstruction_constraint(g.repeat_interleave(7, 0), x.repeat(5, 1, 1, 1))
    want = (g.mean(0) - x.mean(0)).square().mean() + g.var(0, correction=0).mean() + x.var(0, correction=0).mean()
    torch.testing.assert_close(pairs, want)


def test_a_bias_feels_the_same_pull_however_real_images_are_paired():
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    grads = []
    for order in (torch.arange(6), torch.randperm(6)):
        bias = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        reconstruction_constraint(bias.expand(6, 1, 2, 2), x[order]).backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(grads[0], -2 * x.mean(0, keepdim=True) / 4)


def test_the_constraint_alone_shrinks_variance_and_finds_the_mean():
    """What it does to a generator m + s z whose data are N(3, 1): m to 3, s to 0."""
    torch.manual_seed(0)
    m, s = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimiser = torch.optim.SGD([m, s], 0.1)
    for _ in range(60):
        optimiser.zero_grad()
        z, x = torch.randn(2, 512, 1, 1, 1)
        reconstruction_constraint(m + s * z, 3 + x).backward()
        optimiser.step()
    assert m.item() == pytest.approx(3, abs=0.1) and s.item() == pytest.approx(0, abs=0.1)


# ---- networks


def test_d_has_no_normalisation_no_dropout_and_no_sigmoid():
    kinds = {type(m) for m in cn_lsgan.Discriminator().modules()}
    assert kinds == {cn_lsgan.Discriminator, nn.Sequential, nn.Conv2d, nn.LeakyReLU, nn.Linear}
    assert not any(hasattr(m, "parametrizations") for m in cn_lsgan.Discriminator().modules())


# ---- the update


def test_a_discriminator_of_weight_zero_costs_one_and_the_penalty():
    """D = 0: L_D = 1 + lambda_gp target^2, L_G = 1 + lambda_rec R."""
    for target in (1.0, 0.0, 3.0):
        nets = {"discriminator": LinearCritic(torch.zeros(1024))}
        args = tiny("cn_lsgan", lambda_gp=2.0, gp_target=target, lambda_rec=0.5)
        nets = cn_lsgan.build(args) | nets
        update_d, update_g, state = cn_lsgan.updates(nets, args)
        state["opt_d"].param_groups[0]["lr"].fill_(0.0)
        logs = update_d(torch.rand(8, 1, 32, 32))
        assert logs["loss_d"].item() == 1 + 2 * target**2 and logs["lsgan"].item() == 1
        assert nets["discriminator"].w.isfinite().all()
        logs = update_g()
        torch.testing.assert_close(logs["loss_g"], 1 + 0.5 * logs["constraint"])


def test_losses_and_logs_of_a_linear_discriminator():
    w, real = 0.1 * torch.randn(1024), torch.rand(8, 1, 32, 32)
    nets = {"discriminator": LinearCritic(w)}
    args = tiny("cn_lsgan", lambda_gp=3.0, gp_target=0.5)
    nets = cn_lsgan.build(args) | nets
    fakes = []
    nets["generator"].register_forward_hook(lambda m, z, y: fakes.append(y.detach()))
    logs = cn_lsgan.updates(nets, args)[0](real)
    x, f = real.flatten(1), fakes[0].flatten(1)
    torch.testing.assert_close(logs["lsgan"], ((x @ w - 1) ** 2).mean() + ((f @ w) ** 2).mean())
    torch.testing.assert_close(logs["grad_norm"], w.norm())
    torch.testing.assert_close(logs["penalty"], (w.norm() - 0.5).square())
    torch.testing.assert_close(logs["loss_d"], logs["lsgan"] + 3 * logs["penalty"])
    want = 2 * ((x @ w - 1) @ x + (f @ w) @ f) / 8 + 6 * (w.norm() - 0.5) * w / w.norm()
    torch.testing.assert_close(nets["discriminator"].w.grad, want)  # the penalty has its gradient


def test_the_constraint_compares_with_the_last_real_images_and_bypasses_d():
    real = torch.rand(8, 1, 32, 32) * 2 - 1
    d = LinearCritic(torch.zeros(1024))  # through it no gradient passes
    nets, fakes, logs = updated({"discriminator": d}, real, lambda_gp=0.0, lambda_rec=0.5, lr=1e-9)
    torch.testing.assert_close(logs["constraint"], (fakes[1] - real).square().mean())
    pull = 0.5 * 2 * (fakes[1] - real) / real.numel() * (1 - fakes[1].square())  # back through tanh
    torch.testing.assert_close(nets["generator"].to_image.bias.grad, pull.sum((0, 2, 3)), rtol=1e-3, atol=1e-6)


def test_z_of_the_constraint_is_fresh():
    _, (of_d, of_g), _ = updated()
    assert (of_d - of_g).abs().max() > 1e-3


def test_gradients_without_penalty_and_constraint_are_twice_those_of_lsgan():
    args, base = tiny("cn_lsgan", **OFF), tiny("lsgan")
    grads = []
    for m, a in ((cn_lsgan, args), (lsgan, base)):
        torch.manual_seed(0)
        nets = cn_lsgan.build(args)
        update_d, update_g, state = m.updates(nets, a)
        state["opt_d"].param_groups[0]["lr"].fill_(0.0)
        logs = update_d(torch.full((8, 1, 32, 32), 0.5)) | update_g()
        named = {f"{n}.{k}": p.grad for n in ("generator", "discriminator") for k, p in nets[n].named_parameters()}
        grads.append(named | {k: logs[k] for k in ("loss_d", "loss_g")})
    assert_same(grads[0], {k: 2 * v for k, v in grads[1].items()})


@pytest.mark.parametrize("off, gone, sizes", [("lambda_gp", {"penalty", "grad_norm"}, [16, 8]), ("lambda_rec", {"constraint"}, [16, 8, 8])])
def test_a_term_that_is_off_is_not_computed_and_one_that_is_on_changes_the_run(off, gone, sizes):
    seen, d = [], cn_lsgan.Discriminator(1, 32, 4)
    d.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    _, _, logs = updated({"discriminator": d}, **{off: 0.0})
    assert not gone & set(logs) and seen == sizes
    assert gone < set(updated()[2])
    on, base = (states(trained("cn_lsgan", 2, **changes)[0]) for changes in (OFF | {off: 1.0}, OFF))
    assert any(not torch.equal(on[k], base[k]) for k in on)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_the_target_reaches_the_update(target):
    ops = Recorder("cn_lsgan")
    _, _, logs = updated(ops=ops, gp_target=target)
    (_, (grad, given)) = ops.calls[1]
    assert given == target
    torch.testing.assert_close(logs["penalty"], (grad.flatten(1).norm(dim=1) - target).square().mean().detach())


@pytest.mark.parametrize("key", ["lambda_gp", "gp_target", "lambda_rec"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        cli.check(cn_lsgan.Args(**{key: value}))
