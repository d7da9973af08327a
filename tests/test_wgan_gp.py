"""wgan_gp.py: closed forms, the slope and its points, routing, five to one, weight clipping."""
import dataclasses

import pytest
import torch
from torch import nn

import lsgan
import wgan_gp
from common import cli
from tests.helpers import ROOT, LinearCritic, Recorder, tiny, trained
from wgan_gp import critic_loss, generator_loss, gradient_penalty, interpolate


def penalty_of(d, x, target=1.0):
    """What update_d makes of a critic at x."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    return gradient_penalty(grad, target)


def recorded(nets=None, real=None, **changes):
    """(nets, calls, logs) of one update of each network."""
    args = tiny("wgan_gp", **changes)
    torch.manual_seed(0)
    nets, ops = wgan_gp.build(args) | (nets or {}), Recorder("wgan_gp")
    update_d, update_g, _ = wgan_gp.updates(nets, args, ops)
    logs = update_d(torch.rand(8, 1, 32, 32) if real is None else real)
    return nets, ops.calls, logs | update_g()


# ---- losses


def test_losses_by_hand():
    d_real, d_fake = torch.tensor([1.0, 4.0]), torch.tensor([-2.0, 3.0])
    assert critic_loss(d_real, d_fake).item() == -2.0
    assert critic_loss(d_fake, d_real).item() == 2.0
    assert generator_loss(d_fake).item() == -0.5


def test_gradients_of_the_losses():
    d_real, d_fake = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    critic_loss(d_real, d_fake).backward()
    assert d_real.grad.tolist() == [-0.25] * 4 and d_fake.grad.tolist() == [0.25] * 4
    d_fake.grad = None
    generator_loss(d_fake).backward()
    assert d_fake.grad.tolist() == [-0.25] * 4


def test_losses_are_means_over_the_batch():
    a, b = torch.randn(2, 7, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(critic_loss(a, b), critic_loss(torch.cat([a, a]), torch.cat([b, b])))
    torch.testing.assert_close(critic_loss(a, b), critic_loss(a[order], b[order.flip(0)]))
    torch.testing.assert_close(generator_loss(b), generator_loss(torch.cat([b, b])))
    g = torch.randn(7, 1, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(gradient_penalty(g), gradient_penalty(torch.cat([g, g])))
    torch.testing.assert_close(gradient_penalty(g), gradient_penalty(g[order]))


# ---- the penalty


def test_a_linear_critic_has_one_slope_everywhere():
    d = LinearCritic(torch.tensor([3.0, 4.0], dtype=torch.float64))
    penalty = penalty_of(d, torch.randn(5, 2, dtype=torch.float64))
    assert penalty.item() == pytest.approx(16, abs=1e-12)
    penalty.backward()
    torch.testing.assert_close(d.w.grad, torch.tensor([4.8, 6.4], dtype=torch.float64))
    with torch.no_grad():
        d.w.div_(5)
    d.w.grad = None
    penalty_of(d, torch.randn(5, 2, dtype=torch.float64)).backward()
    torch.testing.assert_close(d.w.grad, torch.zeros(2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_norm_is_over_all_pixels_and_channels(channels):
    n = channels * 32 * 32  # a norm over channels alone would leave 0.938 of one channel
    d = LinearCritic(torch.full((n,), n**-0.5))
    assert penalty_of(d, torch.randn(4, channels, 32, 32)).item() == pytest.approx(0, abs=1e-10)


def test_a_critic_of_weight_zero_costs_one_and_gets_no_gradient():
    d = LinearCritic(torch.zeros(1024))
    penalty = penalty_of(d, torch.randn(4, 1, 32, 32))
    penalty.backward()
    assert penalty.item() == 1
    assert torch.equal(d.w.grad, torch.zeros(1024))


def test_slope_is_taken_at_the_point_between():
    """D(x) = |x|^2 / 2 has slope |y| at y = e x + (1 - e) f."""
    x, f, e = torch.tensor([[4.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0.25])
    for real, fake, want in ((x, f, 0.0), (f, x, 4.0)):
        y = interpolate(real, fake, e)
        assert penalty_of(lambda v: 0.5 * v.square().sum(1), y).item() == want


def test_the_best_linear_critic_overshoots_slope_one_by_the_gap():
    """min_w w.(m_f - m_x) + lambda (|w| - 1)^2: w along m_x - m_f, |w| = 1 + |m_x - m_f| / (2 lambda)."""
    d = LinearCritic(torch.tensor([0.3, 0.5], dtype=torch.float64))
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    f = torch.zeros(1, 2, dtype=torch.float64)
    optimiser = torch.optim.SGD(d.parameters(), 0.05)
    for _ in range(150):
        optimiser.zero_grad()
        (critic_loss(d(x), d(f)) + 10 * penalty_of(d, x)).backward()
        optimiser.step()
    assert d.w.tolist() == pytest.approx([1.1, 0], abs=1e-5)


# ---- networks


def test_critic_is_that_of_lsgan_without_its_normalisation():
    d, other = wgan_gp.Critic(1, 32, 32), lsgan.Discriminator(1, 32, 32)
    kinds = {type(m) for m in d.modules()}
    assert kinds == {wgan_gp.Critic, nn.Sequential, nn.Conv2d, nn.LeakyReLU, nn.Linear}
    assert not any(hasattr(m, "parametrizations") for m in d.modules())
    assert sorted(p.numel() for p in d.parameters()) == sorted(p.numel() for p in other.parameters())
    assert sum(p.numel() for p in d.parameters()) == 166_625


# ---- the update


def test_losses_and_logs_of_a_linear_critic():
    w = torch.randn(1024)
    real = torch.rand(8, 1, 32, 32)
    fakes, nets = [], {"discriminator": LinearCritic(w)}
    args = tiny("wgan_gp", lambda_gp=3.0)
    nets = wgan_gp.build(args) | nets
    nets["generator"].register_forward_hook(lambda m, z, y: fakes.append(y.detach()))
    update_d, _, _ = wgan_gp.updates(nets, args)
    logs = update_d(real)
    gap = (real.flatten(1).mean(0) - fakes[0].flatten(1).mean(0)) @ w
    torch.testing.assert_close(logs["wasserstein"], gap)
    torch.testing.assert_close(logs["grad_norm"], w.norm())
    torch.testing.assert_close(logs["penalty"], (w.norm() - 1).square())
    torch.testing.assert_close(logs["loss_d"], 3 * (w.norm() - 1).square() - gap)
    want = fakes[0].flatten(1).mean(0) - real.flatten(1).mean(0) + 6 * (w.norm() - 1) * w / w.norm()
    torch.testing.assert_close(nets["discriminator"].w.grad, want)  # the penalty has its gradient


def test_a_constant_critic_costs_lambda():
    nets = {"discriminator": LinearCritic(torch.zeros(1024))}
    args = tiny("wgan_gp")
    nets = wgan_gp.build(args) | nets
    update_d, update_g, _ = wgan_gp.updates(nets, args)
    assert update_d(torch.zeros(8, 1, 32, 32))["loss_d"].item() == 10
    assert nets["discriminator"].w.isfinite().all()
    with torch.no_grad():
        nets["discriminator"].w.zero_()
    assert update_g()["loss_g"].item() == 0


@pytest.mark.parametrize("off", [{"lambda_gp": 0.0}, {"clip": 0.01}])
def test_a_penalty_that_is_off_is_not_computed(off):
    sizes = []
    d = wgan_gp.Critic(1, 32, 4)
    d.register_forward_hook(lambda m, x, y: sizes.append(len(x[0])))
    _, calls, logs = recorded(nets={"discriminator": d}, **off)
    assert not calls and sizes == [16, 8]
    assert set(logs) == {"loss_d", "wasserstein", "loss_g"}
    assert logs["loss_d"] == -logs["wasserstein"]


def test_bf16_penalty_is_within_two_percent_and_its_norm_in_float32():
    """At slopes near 3: at those of fresh weights, near 0, the penalty is 1 whatever bf16 does."""
    logs, dtypes, real = {}, {}, torch.rand(32, 1, 32, 32).mul(2).sub(1)
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        d = wgan_gp.Critic(1, 32, 16)
        with torch.no_grad():
            for p in d.parameters():
                p.mul_(3.2)
        _, calls, logs[precision] = recorded({"discriminator": d}, real, precision=precision, batch_size=32)
        dtypes[precision] = calls[1][1][0].dtype
    assert dtypes == {"fp32": torch.float32, "bf16": torch.float32}
    assert 2 < logs["fp32"]["grad_norm"] < 5
    for key in ("grad_norm", "penalty"):
        assert logs["bf16"][key].item() == pytest.approx(logs["fp32"][key].item(), rel=2e-2)
        assert logs["bf16"][key] != logs["fp32"][key]
    assert logs["bf16"]["penalty"].dtype == logs["bf16"]["loss_d"].dtype == torch.float32


# ---- weight clipping


def test_defaults_follow_clip():
    plain, cut = wgan_gp.Args(), wgan_gp.Args(clip=0.01)
    assert (plain.lambda_gp, plain.clip, plain.n_critic) == (10, 0, 5)
    assert (cut.lambda_gp, cut.lr, cut.n_critic) == (0, 5e-5, 5)
    assert plain.lr != cut.lr and wgan_gp.Args(clip=0.01, lr=1e-4).lr == 1e-4
    assert wgan_gp.Args(lambda_gp=3.0).lambda_gp == 3 and wgan_gp.Args(lambda_gp=0.0).lambda_gp == 0
    for args in (plain, cut):  # as --resume and load read them back
        assert wgan_gp.Args(**dataclasses.asdict(args)) == args


def test_clip_beside_a_penalty_is_bad_input():
    with pytest.raises(ValueError, match="clip 0.01.*lambda_gp 10"):
        cli.parse(wgan_gp.Args, "--clip 0.01 --lambda-gp 10".split())
    assert cli.parse(wgan_gp.Args, "--clip 0.01 --lambda-gp 0".split()) == wgan_gp.Args(clip=0.01)


@pytest.mark.parametrize("key, value", [("clip", -0.1), ("clip", float("nan")), ("lambda_gp", -1.0), ("lambda_gp", float("inf")), ("lr", 0.0)])
def test_bad_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        cli.check(wgan_gp.Args(**{key: value}))


def test_weights_of_d_alone_stay_within_clip_after_each_update():
    args = tiny("wgan_gp", clip=0.01)
    nets = wgan_gp.build(args)
    update_d, update_g, state = wgan_gp.updates(nets, args)
    for key in ("opt_g", "opt_d"):
        (group,) = state[key].param_groups
        assert type(state[key]) is torch.optim.RMSprop and group["lr"].item() == pytest.approx(5e-5)
        assert (group["alpha"], group["momentum"], group["centered"]) == (0.99, 0, False)
    for _ in range(2):
        before = [p.clone() for p in nets["discriminator"].body.parameters()]
        update_d(torch.rand(8, 1, 32, 32))
        assert any((p != b).any() for p, b in zip(nets["discriminator"].body.parameters(), before))
        assert max(p.abs().max().item() for p in nets["discriminator"].parameters()) == pytest.approx(0.01)
        update_g()
    assert max(p.abs().max() for p in nets["generator"].parameters()) > 0.1
    assert type(wgan_gp.updates(nets, tiny("wgan_gp"))[2]["opt_d"]) is torch.optim.Adam


# ---- the loop


def test_d_is_updated_five_times_before_each_update_of_g_across_epochs(tmp_path, monkeypatch):
    order = []
    make = wgan_gp.updates

    def noted(nets, args, ops=None):
        update_d, update_g, state = make(nets, args)

        def d(real):
            order.append("d")
            return update_d(real)

        def g():
            order.append("g")
            return update_g()

        return d, g, state

    monkeypatch.setattr(wgan_gp, "updates", noted)  # main is watched, not changed
    args = tiny("wgan_gp", steps=4, subset=27, out_dir=str(tmp_path), cache_dir=str(ROOT / "data" / "cache"))
    folder = wgan_gp.main(args)
    assert "".join(order) == "dddddg" * 4  # 20 batches of 8 from 27 images: an epoch ends every third
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["state"]["batches"]["drawn"]) == (4, 20)
    steps = {key: {int(s["step"]) for s in saved["state"][key]["state"].values()} for key in ("opt_d", "opt_g")}
    assert steps == {"opt_d": {20}, "opt_g": {4}}


def test_all_losses_stay_finite_over_a_few_steps():
    for changes in ({}, {"clip": 0.01}, {"precision": "bf16"}):
        _, losses = trained("wgan_gp", 4, **changes)
        assert all(torch.isfinite(v) for row in losses for v in row.values())
