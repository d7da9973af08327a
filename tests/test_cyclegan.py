"""cyclegan.py: losses, routing, order, pool, networks, degenerate settings, resume."""
import copy
import gc
import io
import json
import shutil
import signal

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import cyclegan
from common import cli, data, files, run
from cyclegan import ImagePool
from tests.helpers import assert_same, central_difference, states

NONE = dict(lambda_cycle=0.0, lambda_identity=0.0, pool_size=0)  # two LSGANs


def tiny(**changes):
    small = dict(width=4, n_blocks=1, patch_layers=1, image_size=16, channels=3, batch_size=2)
    plain = dict(device="cpu", precision="fp32", quiet=True, jitter=False, mirror=False)
    return cyclegan.Args(**(small | plain | changes))


def images(n=2, channels=3, seed=1, size=16):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


def assembled(seed=0, **changes):
    """(nets, update, state) from a fixed seed."""
    torch.manual_seed(seed)
    args = tiny(**changes)
    nets = cyclegan.build(args)
    return nets, *cyclegan.updates(nets, args)


def stand_still(state):
    for key in ("opt_g", "opt_d"):
        state[key].param_groups[0]["lr"].fill_(0.0)


class SmallGenerator(nn.Module):
    """Images [N, 1, 2, 2] -> the same shape in float64, smooth; 20 weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.body(x.flatten(1)).tanh().view(-1, 1, 2, 2)


class SmallCritic(nn.Module):
    """Images [N, 1, 2, 2] -> a map of scores [N, 1, 1, 2] in float64, smooth; 10 weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 2).double()

    def forward(self, x):
        return self.body(x.flatten(1)).sin().view(-1, 1, 1, 2)


def small_nets():
    torch.manual_seed(5)
    g = nn.ModuleDict({"AtoB": SmallGenerator(), "BtoA": SmallGenerator()})
    d = nn.ModuleDict({"A": SmallCritic(), "B": SmallCritic()})
    return dict(generator=g, discriminator=d, generator_ema=copy.deepcopy(g))


# ---- losses


@pytest.mark.parametrize("score, d_loss, adv", [(0, 0.5, 1), (0.5, 0.25, 0.25), (1, 0.5, 0)])
def test_losses_at_constant_scores(score, d_loss, adv):
    d = torch.full((2, 1, 3, 5), float(score))
    assert cyclegan.discriminator_loss(d, d).item() == pytest.approx(d_loss, abs=1e-7)
    assert cyclegan.generator_adv_loss(d).item() == pytest.approx(adv, abs=1e-7)


def test_a_perfect_discriminator_has_loss_zero_and_scores_are_unbounded():
    one, zero = torch.ones(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)
    assert cyclegan.discriminator_loss(one, zero) == 0
    assert cyclegan.discriminator_loss(zero, one) == 1
    d = torch.full((1, 1, 1, 2), 3.0, requires_grad=True)  # after a sigmoid this slope would fade
    cyclegan.generator_adv_loss(d).backward()
    assert d.grad.tolist() == [[[[2.0, 2.0]]]]


def test_every_patch_is_judged_by_itself():
    d = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)  # its mean is 1: a square after it would be 0
    assert cyclegan.generator_adv_loss(d) == 1
    assert cyclegan.discriminator_loss(d, 1 - d) == 0.5 * (1 + 1)


@pytest.mark.parametrize("loss", [cyclegan.cycle_loss, cyclegan.identity_loss])
def test_cycle_and_identity_are_mean_absolute_differences(loss):
    real = images(3).double()
    assert loss(real + 0.1, real).item() == pytest.approx(0.1)
    assert loss(real, real) == 0
    other = real.clone().requires_grad_()
    loss(other, real).backward()
    assert not other.grad.any()  # no pull where nothing is wrong
    signs = real.sign()
    shifted = (real + 0.3 * signs).requires_grad_()
    loss(shifted, real).backward()
    torch.testing.assert_close(shifted.grad, signs / real.numel())


def test_losses_are_means_over_batch_and_patches():
    real, fake = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    twice = [torch.cat([x, x]).repeat(1, 1, 2, 2) for x in (real, fake)]
    for name in ("discriminator_loss", "cycle_loss", "identity_loss"):
        loss = getattr(cyclegan, name)
        torch.testing.assert_close(loss(*twice), loss(real, fake))
    adv = cyclegan.generator_adv_loss
    torch.testing.assert_close(adv(twice[0]), adv(real))


# ---- the update: what it sums, whom it reaches, in which order


class Constant(nn.Module):
    """Scores of one value everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand(len(x), 1, 2, 2) + 0 * x.mean()


class Shift(nn.Module):
    """x -> x + by."""

    def __init__(self, by):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x + self.by


def constant_losses(score, there, back, **changes):
    g = nn.ModuleDict({"AtoB": Shift(there), "BtoA": Shift(back)})
    d = nn.ModuleDict({"A": Constant(score), "B": Constant(score)})
    nets = dict(generator=g, discriminator=d, generator_ema=copy.deepcopy(g))
    update, _ = cyclegan.updates(nets, tiny(**changes))
    return {key: value.item() for key, value in update(images(seed=1), images(seed=2)).items()}


@pytest.mark.parametrize("score, d_loss, adv", [(0.0, 0.5, 2.0), (0.5, 0.25, 0.5), (1.0, 0.5, 0.0)])
def test_sums_at_constant_scores_and_generators_that_do_nothing(score, d_loss, adv):
    logs = constant_losses(score, 0.0, 0.0)
    assert logs["loss_g"] == pytest.approx(adv, abs=1e-6)
    assert (logs["loss_d_a"], logs["loss_d_b"]) == pytest.approx((d_loss, d_loss))
    assert [logs[f"{kind}_{x}"] for kind in ("d_real", "d_fake") for x in "ab"] == [score] * 4
    assert [logs[f"{kind}_{x}"] for kind in ("cycle", "identity") for x in "ab"] == [0] * 4


def test_weights_of_both_cycles_and_of_the_identity():
    logs = constant_losses(1.0, 0.3, -0.2)  # both ways round end .1 too high
    assert logs["cycle_a"] == pytest.approx(0.1) and logs["cycle_b"] == pytest.approx(0.1)
    assert logs["identity_b"] == pytest.approx(0.3) and logs["identity_a"] == pytest.approx(0.2)
    assert logs["loss_g"] == pytest.approx(10 * 0.2 + 5 * 0.5, rel=1e-5)
    logs = constant_losses(1.0, 0.3, -0.2, lambda_cycle=3.0, lambda_identity=0.0)
    assert logs["loss_g"] == pytest.approx(3 * 0.2, rel=1e-5)
    logs = constant_losses(1.0, 0.3, -0.2, lambda_cycle_b=0.0, lambda_identity=0.0)
    assert logs["loss_g"] == pytest.approx(10 * 0.1, rel=1e-5) and "cycle_b" not in logs
    logs = constant_losses(1.0, 0.3, -0.2, lambda_cycle=0.0, lambda_cycle_b=7.0)
    assert logs["loss_g"] == pytest.approx(7 * 0.1 + 5 * 0.5, rel=1e-5) and "cycle_a" not in logs


@pytest.mark.parametrize("changes", [{}, {"lambda_cycle_b": 0.0}, {"lambda_cycle": 0.0}, NONE])
def test_every_derivative_agrees_with_differences_on_small_smooth_networks(changes):
    nets, args = small_nets(), tiny(channels=1, **(dict(pool_size=0) | changes))
    update, state = cyclegan.updates(nets, args)
    stand_still(state)
    a, b = torch.rand(2, 3, 1, 2, 2, dtype=torch.float64) * 2 - 1

    def loss_g():
        return update(a, b)["loss_g"]

    def loss_d():
        logs = update(a, b)
        return logs["loss_d_a"] + logs["loss_d_b"]

    for key, loss in (("generator", loss_g), ("discriminator", loss_d)):
        for p in nets[key].parameters():
            loss()
            grad = p.grad.clone()
            for i in range(p.numel()):
                unit = torch.zeros_like(p)
                unit.view(-1)[i] = 1
                found = central_difference(loss, [p], [unit], 1e-6).item()
                assert grad.view(-1)[i].item() == pytest.approx(found, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("key", ["generator", "discriminator"])
@pytest.mark.parametrize("channels", [1, 3])
def test_derivatives_of_the_scripts_networks_agree_with_differences(key, channels):
    torch.manual_seed(3)
    args = tiny(channels=channels, pool_size=0)
    nets = {name: net.double() for name, net in cyclegan.build(args).items()}
    update, state = cyclegan.updates(nets, args)
    stand_still(state)
    a, b = images(channels=channels, seed=1).double(), images(channels=channels, seed=2).double()

    def loss():
        logs = update(a, b)
        return logs["loss_g"] if key == "generator" else logs["loss_d_a"] + logs["loss_d_b"]

    loss()
    weights = list(nets[key].parameters())
    directions = [torch.randn_like(p) for p in weights]
    want = sum((p.grad * v).sum() for p, v in zip(weights, directions)).item()
    found = central_difference(loss, weights, directions, 1e-9).item()
    assert found == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("cycle", ["cycle_a", "cycle_b"])
def test_a_cycle_pulls_at_both_generators(cycle):
    """Scores that do not depend on the image leave one cycle as the only source of gradients."""
    nets = small_nets()
    nets["discriminator"] = nn.ModuleDict({"A": Constant(0.5), "B": Constant(0.5)})
    on = dict(lambda_cycle=float(cycle == "cycle_a"), lambda_cycle_b=float(cycle == "cycle_b"))
    update, _ = cyclegan.updates(nets, tiny(lambda_identity=0.0, **on))
    update(*torch.rand(2, 3, 1, 2, 2, dtype=torch.float64))
    assert all(p.grad.any() for p in nets["generator"].parameters())


@pytest.mark.parametrize("domain, reached, spared", [("A", "BtoA", "AtoB"), ("B", "AtoB", "BtoA")])
def test_a_discriminator_pulls_at_the_generator_into_its_own_domain(domain, reached, spared):
    nets = small_nets()
    nets["discriminator"]["AB".replace(domain, "")] = Constant(0.5)
    update, _ = cyclegan.updates(nets, tiny(**NONE))
    update(*torch.rand(2, 3, 1, 2, 2, dtype=torch.float64))
    assert all(p.grad.any() for p in nets["generator"][reached].parameters())
    assert not any(p.grad.any() for p in nets["generator"][spared].parameters())


def test_identity_pulls_at_the_generator_into_the_domain_alone():
    """G shifts by .25, F not at all: F(a) is right, and of G(b) alone comes a pull, of weight 5."""
    g = nn.ModuleDict({"AtoB": Shift(0.25), "BtoA": Shift(0.0)})
    d = nn.ModuleDict({"A": Constant(0.5), "B": Constant(0.5)})
    nets = dict(generator=g, discriminator=d, generator_ema=copy.deepcopy(g))
    update, _ = cyclegan.updates(nets, tiny(lambda_cycle=0.0))
    update(images(), images(seed=2))
    assert g["BtoA"].by.grad == 0 and g["AtoB"].by.grad.item() == pytest.approx(5)


def test_gradients_of_the_discriminators_are_those_of_their_own_step():
    nets, update, state = assembled(pool_size=0)
    stand_still(state)
    a, b = images(seed=1), images(seed=2)
    g, d = nets["generator"], nets["discriminator"]
    with torch.no_grad():
        fakes = {"A": g["BtoA"](b), "B": g["AtoB"](a)}
    for domain, real in (("A", a), ("B", b)):
        for_real, for_fake = (d[domain](real) - 1).square(), d[domain](fakes[domain]).square()
        loss = 0.5 * for_real.mean() + 0.5 * for_fake.mean()
        want = torch.autograd.grad(loss, list(d[domain].parameters()))
        update(a, b)
        for p, w in zip(d[domain].parameters(), want):
            torch.testing.assert_close(p.grad, w, rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad for p in d.parameters())


def test_order_of_the_steps_and_what_each_discriminator_sees():
    nets, update, state = assembled(pool_size=0)
    events = []
    for key in ("opt_g", "opt_d"):
        state[key].register_step_post_hook(lambda *_, key=key: events.append(key))
    grads_of_d = []
    state["opt_g"].register_step_post_hook(
        lambda *_: grads_of_d.extend(p.grad for p in nets["discriminator"].parameters())
    )
    seen = {"A": [], "B": []}
    for domain in "AB":
        net = nets["discriminator"][domain]
        net.register_forward_hook(lambda net, x, y, s=seen[domain]: s.append(x[0].detach()))
        net.register_forward_hook(lambda net, x, y, domain=domain: events.append(domain))
    a, b = images(seed=1), images(seed=2)
    with torch.no_grad():
        fakes = {"A": nets["generator"]["BtoA"](b), "B": nets["generator"]["AtoB"](a)}
    update(a, b)
    assert events == ["A", "B", "opt_g", "A", "B", "opt_d"]
    assert grads_of_d and all(grad is None for grad in grads_of_d)  # after G's step too
    for domain, real in (("A", a), ("B", b)):
        in_g_step, in_d_step = seen[domain]
        assert torch.equal(in_g_step, fakes[domain])  # made before G's step, here and below
        assert torch.equal(in_d_step, torch.cat([real, fakes[domain]]))


def test_jitter_and_mirror_reach_both_domains_before_anything_else():
    nets, update, _ = assembled(jitter=True, mirror=True, pool_size=0)
    seen = {"A": [], "B": []}
    for domain in "AB":
        net = nets["discriminator"][domain]
        net.register_forward_hook(lambda net, x, y, s=seen[domain]: s.append(x[0].detach()))
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16).clone()
    for _ in range(8):
        update(ramp, ramp)
    for domain in "AB":
        real = torch.cat([x[:2] for x in seen[domain][1::2]])  # of D's own steps
        rising = real[:, 0, 0, -1] > real[:, 0, 0, 0]
        assert 0 < rising.sum() < len(real)  # mirrored in about half of the cases
        assert (real[:, 0, 0].diff().abs().amax(1) < 2 / 15).all()  # enlarged
    assert not torch.equal(seen["A"][1][:2], seen["B"][1][:2])


def test_terms_that_are_off_are_not_evaluated_and_draw_nothing():
    def calls(**changes):
        nets, update, _ = assembled(**changes)
        count = dict.fromkeys(("AtoB", "BtoA"), 0)

        def note(key):
            def hook(net, x, y):
                count[key] += len(x[0]) // 2  # sets of images

            nets["generator"][key].register_forward_hook(hook)

        note("AtoB"), note("BtoA")
        before = torch.get_rng_state()
        logs = update(images(), images(seed=2))
        return count, torch.equal(before, torch.get_rng_state()), set(logs)

    count, untouched, everything = calls()
    assert count == {"AtoB": 3, "BtoA": 3} and not untouched
    count, untouched, logs = calls(**NONE)
    assert count == {"AtoB": 1, "BtoA": 1} and untouched
    assert everything - logs == {f"{kind}_{x}" for kind in ("cycle", "identity") for x in "ab"}
    count, untouched, _ = calls(pool_size=0, lambda_cycle_b=0.0)
    assert count == {"AtoB": 2, "BtoA": 3} and untouched


@pytest.mark.parametrize("pool_size", [0, 3])
def test_without_cycle_and_identity_it_is_two_lsgans_to_the_bit(pool_size):
    a, b = images(seed=1), images(seed=2)
    nets, update, _ = assembled(**(NONE | dict(pool_size=pool_size, lr=1e-3)))
    alone = copy.deepcopy(nets)
    torch.manual_seed(1)
    for _ in range(5):
        update(a, b)

    torch.manual_seed(1)
    gans = []
    for way, domain, x, real in (("BtoA", "A", b, a), ("AtoB", "B", a, b)):
        g, d = alone["generator"][way], alone["discriminator"][domain]
        adam = [
                torch.optim.Adam(n.parameters(), torch.tensor(1e-3), (0.5, 0.999), fused=True)
                for n in (g, d)
            ]
        gans.append((g, d, *adam, x, real, ImagePool(pool_size)))
    for _ in range(5):
        for g, d, opt_g, opt_d, x, real, pool in gans:
            fake = g(x)
            opt_g.zero_grad()
            cyclegan.generator_adv_loss(d(fake)).backward()
            opt_g.step()
            opt_d.zero_grad()
            d_out = d(torch.cat([real, pool.query(fake)])).chunk(2)
            cyclegan.discriminator_loss(*d_out).backward()
            opt_d.step()
    for key in ("generator", "discriminator"):
        assert_same(nets[key].state_dict(), alone[key].state_dict())


def test_updates_repeat_with_the_seed():
    runs = []
    for _ in range(2):
        nets, update, state = assembled(pool_size=2)
        for i in range(4):
            update(images(seed=i), images(seed=10 + i))
        runs.append(states(nets) | state["pool_a"].state_dict())
    assert_same(*runs)


def test_ema_follows_both_generators():
    nets, update, state = assembled(ema_decay=0.5)
    for t in range(1, 12):
        old = [p.clone() for p in nets["generator_ema"].parameters()]
        update(images(), images(seed=2))
        decay = min(0.5, (1 + t) / (10 + t))
        assert state["t"].item() == t
        pairs = zip(nets["generator_ema"].parameters(), nets["generator"].parameters(), old)
        for e, p, before in pairs:
            torch.testing.assert_close(e, decay * before + (1 - decay) * p)


def test_one_optimiser_holds_both_generators_and_one_both_discriminators():
    nets, _, state = assembled(beta1=0.3, beta2=0.7, lr=0.01)
    for key, net in (("opt_g", "generator"), ("opt_d", "discriminator")):
        (group,) = state[key].param_groups
        assert type(state[key]) is torch.optim.Adam and group["fused"]
        assert group["betas"] == (0.3, 0.7) and group["lr"].item() == pytest.approx(0.01)
        assert {id(p) for p in group["params"]} == {id(p) for p in nets[net].parameters()}


@pytest.mark.parametrize("skip", [True, False])
def test_convolutions_may_be_bf16_while_images_scores_and_losses_are_float32(skip):
    for precision, wanted in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        nets, update, _ = assembled(precision=precision, skip=skip)
        inner, outer = set(), set()
        for key in ("generator", "discriminator"):
            for net in nets[key].values():
                net.body.register_forward_hook(lambda net, x, y: inner.add(y.dtype))
                net.register_forward_hook(lambda net, x, y: outer.add(y.dtype))
        logs = update(images(), images(seed=2))
        assert inner == {wanted} and outer == {torch.float32}
        assert {v.dtype for v in logs.values()} == {torch.float32}


# ---- the pool


def numbered(first, n=1, channels=1):
    """n images, each of one value: first, first + 1, ..."""
    return torch.arange(first, first + n).float().view(n, 1, 1, 1).expand(n, channels, 2, 2).clone()


def test_the_first_images_are_returned_and_stored():
    pool = ImagePool(50)
    for i in range(50):
        assert pool.query(numbered(i)).unique().tolist() == [i]
    assert torch.equal(pool.images, numbered(0, 50))


def test_a_full_pool_returns_the_newest_half_of_the_time_and_else_one_100_queries_old():
    torch.manual_seed(0)
    pool, n = ImagePool(50), 20000
    out = pool.query(numbered(0, n + 50))[50:, 0, 0, 0]
    ages = torch.arange(50, n + 50) - out
    assert (ages >= 0).all() and (out == out.round()).all()
    assert (ages == 0).float().mean().item() == pytest.approx(0.5, abs=0.015)
    old = ages[2000:][ages[2000:] > 0]  # the first old ones come from a pool of young images
    assert old.mean().item() == pytest.approx(100, abs=5)
    assert ages[2000:].mean().item() == pytest.approx(50, abs=3)
    assert old.std().item() == pytest.approx(100, abs=8)  # geometric


def test_what_is_exchanged_takes_the_place_of_what_is_returned():
    torch.manual_seed(0)
    pool = ImagePool(5)
    pool.query(numbered(0, 5))
    for i in range(5, 200):
        before = set(pool.images[:, 0, 0, 0].tolist())
        (out,) = pool.query(numbered(i)).unique().tolist()
        after = set(pool.images[:, 0, 0, 0].tolist())
        assert after == (before if out == i else before - {out} | {i})


@pytest.mark.parametrize("n", [2, 7, 40])
def test_a_batch_goes_in_as_if_its_images_came_one_by_one(n):
    together, single = ImagePool(10), ImagePool(10)
    torch.manual_seed(4)
    a = torch.cat([together.query(numbered(i, n)) for i in range(0, 5 * n, n)])
    torch.manual_seed(4)
    b = torch.cat([single.query(numbered(i)) for i in range(5 * n)])
    assert torch.equal(a, b) and torch.equal(together.images, single.images)
    assert not torch.equal(a, numbered(0, 5 * n)) or n == 2  # old ones came out too


def test_images_of_one_batch_can_meet_in_the_pool():
    torch.manual_seed(0)
    pool = ImagePool(1)
    pool.query(numbered(0))
    out = pool.query(numbered(1, 50))[:, 0, 0, 0]
    assert any(0 < out[i] < i + 1 for i in range(50))


def test_the_pool_keeps_copies_without_graph():
    pool, x = ImagePool(4), numbered(1, 2, 3).requires_grad_()
    y = x * 1
    out = pool.query(y)
    assert not out.requires_grad and not pool.images.requires_grad
    with torch.no_grad():
        y.fill_(-1)
    assert pool.images[:2, 0, 0, 0].tolist() == [1, 2] and out[:, 0, 0, 0].tolist() == [1, 2]


def test_a_pool_of_size_zero_passes_everything_and_draws_nothing():
    pool, before = ImagePool(0), torch.get_rng_state()
    x = images()
    assert torch.equal(pool.query(x), x) and torch.equal(before, torch.get_rng_state())
    assert not pool.query(x.clone().requires_grad_() * 1).requires_grad
    ImagePool(0).load_state_dict(pool.state_dict())


def test_a_restored_pool_goes_on_as_the_first():
    torch.manual_seed(0)
    pool = ImagePool(6)
    for at in (0, 3, 20):  # empty, filling, full
        pool = ImagePool(6)
        if at:
            pool.query(numbered(0, at))
        saved = io.BytesIO()
        torch.save(dict(pool=pool.state_dict(), rng=torch.get_rng_state()), saved)
        want = pool.query(numbered(at, 30))
        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)
        other = ImagePool(6)
        other.load_state_dict(loaded["pool"])
        torch.set_rng_state(loaded["rng"])
        assert torch.equal(other.query(numbered(at, 30)), want)
        assert torch.equal(other.images, pool.images)


def test_the_discriminators_see_the_past_through_pools_of_their_own():
    nets, update, state = assembled(pool_size=2)
    seen = {"A": [], "B": []}
    for domain in "AB":
        nets["discriminator"][domain].register_forward_hook(
            lambda net, x, y, s=seen[domain]: s.append(x[0].detach())
        )
    for i in range(12):
        update(images(1, seed=i), images(1, seed=50 + i))
    for domain in "AB":
        made, judged = seen[domain][0::2], [x[1:] for x in seen[domain][1::2]]
        assert all(any(torch.equal(j, m) for m in made[: i + 1]) for i, j in enumerate(judged))
        assert any(not torch.equal(j, m) for j, m in zip(judged, made))
    assert not torch.equal(state["pool_a"].images, state["pool_b"].images)


# ---- networks


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_numbers_of_parameters_are_those_of_the_paper():
    assert count(cyclegan.ResnetGenerator(3, 9, 64, True)) == 11_378_179
    assert count(cyclegan.ResnetGenerator(3, 6, 64, True)) == 7_837_699
    assert count(cyclegan.ResnetGenerator(1, 6, 64, True)) == 7_825_153
    assert count(cyclegan.ResnetGenerator(1, 3, 32, True)) == 1_073_281
    assert count(cyclegan.PatchDiscriminator(3, 64, 3, "instance")) == 2_764_737


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 16, 36])
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_generators_keep_shape_range_and_dtype(channels, size, paper, skip):
    g = cyclegan.ResnetGenerator(channels, 1, 4, paper, skip)
    x = torch.randn(2, channels, size, 2 * size)
    y = g(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.abs().max() <= 1
    assert g.double()(x.double()).dtype == torch.float64
    assert size % cyclegan.multiple(tiny()) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_borders_are_reflected_by_three_pixels_whatever_the_channels(channels):
    g = cyclegan.ResnetGenerator(channels, 1, 4)
    first, last = g.body[0], g.body[-1]
    for conv, x in ((first, images(1, channels)), (last, torch.randn(1, 4, 16, 16))):
        want = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), conv.weight, conv.bias)
        torch.testing.assert_close(conv(x), want)
        assert conv.kernel_size == (7, 7) and conv(x).shape[2:] == x.shape[2:]


def test_enlarging_a_constant_map_leaves_it_even_and_the_papers_way_does_not():
    def inside(paper):
        layers = cyclegan.ResnetGenerator(3, 1, 4, paper).body
        up = [m for m in layers if isinstance(m, nn.ConvTranspose2d)]
        assert [(m.in_channels, m.out_channels) for m in up] == [(16, 8), (8, 4)]
        values = []
        for layer in up:
            nn.init.constant_(layer.weight, 0.25 / layer.in_channels)
            nn.init.zeros_(layer.bias)
            y = layer(torch.ones(1, layer.in_channels, 6, 6))
            assert y.shape[2:] == (12, 12)
            values += y[0, :, 2:-2, 2:-2].unique().tolist()
        return sorted(set(values))

    assert inside(False) == [1.0]
    assert inside(True) == [0.25, 0.5, 1.0]


def test_without_the_skip_a_generator_cannot_know_the_mean_colour():
    x, colour = 0.3 * images().double(), torch.tensor([0.2, -0.1, 0.05]).double().view(3, 1, 1)
    for paper in (False, True):
        g = cyclegan.ResnetGenerator(3, 1, 4, paper, skip=False).double()
        torch.testing.assert_close(g(x + colour), g(x), rtol=1e-9, atol=1e-9)
    g = cyclegan.ResnetGenerator(3, 1, 4).double()
    nn.init.normal_(g.body[-1].weight, 0, 0.01)  # what is found stays within the range
    assert (g(x) != x).all() and (g(x) - x).abs().max() < 0.4
    torch.testing.assert_close(g(x + colour) - g(x), colour.expand_as(x), rtol=1e-7, atol=1e-9)


def test_a_generator_that_finds_nothing_gives_its_input_back():
    g = cyclegan.ResnetGenerator(3, 1, 4)
    for p in g.body[-1].parameters():
        nn.init.zeros_(p)
    assert torch.equal(g(images()), images())
    g.skip = False
    assert not g(images()).any()


@pytest.mark.parametrize("key", ["generator", "discriminator"])
def test_no_image_of_a_batch_changes_the_answer_to_another(key):
    nets = cyclegan.build(tiny())
    for net in nets[key].double().values():
        x = images(4).double()
        y = torch.cat([x[:1], 0.1 * x[1:]])
        torch.testing.assert_close(net(x)[:1], net(y)[:1], rtol=1e-10, atol=1e-12)
        assert not any("running" in name for name in net.state_dict())  # train and eval are one


def test_weights_start_at_the_papers_spread_and_biases_at_zero():
    torch.manual_seed(0)
    nets = cyclegan.build(tiny(width=16))
    for key in ("generator", "discriminator"):
        weights = torch.cat([p.flatten() for p in nets[key].parameters() if p.dim() == 4])
        assert weights.std().item() == pytest.approx(0.02, rel=0.02)
        assert weights.mean().abs() < 1e-3
        assert not any(p.any() for p in nets[key].parameters() if p.dim() == 1)
    assert_same(nets["generator"].state_dict(), nets["generator_ema"].state_dict())
    one, other = nets["generator"].values()
    assert not torch.equal(one.body[0].weight, other.body[0].weight)


def test_sample_takes_the_direction_and_the_averaged_weights():
    nets, update, _ = assembled()
    update(images(), images(seed=2))
    x, args = images(3), tiny()
    ema = nets["generator_ema"]
    assert torch.equal(cyclegan.sample(nets, args, x), ema["AtoB"](x))
    out = cyclegan.sample(nets, args, x, direction="BtoA")
    assert torch.equal(out, ema["BtoA"](x)) and not out.requires_grad
    assert not torch.equal(out, nets["generator"]["BtoA"](x))


@pytest.mark.parametrize("paper", [False, True])
def test_a_generator_exports(paper):
    g = cyclegan.ResnetGenerator(3, 1, 4, paper).eval()
    x = images(2)
    torch.testing.assert_close(torch.export.export(g, (x,)).module()(x), g(x))


# ---- arguments, schedule, resume, memory


def test_the_second_cycle_has_the_weight_of_the_first_unless_given():
    assert tiny(lambda_cycle=3.0).lambda_cycle_b == 3
    assert tiny(lambda_cycle=3.0, lambda_cycle_b=0.0).lambda_cycle_b == 0


@pytest.mark.parametrize("size, layers", [(8, 1), (16, 2), (64, 4), (64, 0), (128, 5)])
def test_patches_leave_a_map_or_are_bad_input(size, layers):
    args = tiny(image_size=size, patch_layers=layers)
    d = cyclegan.build(args)["discriminator"]["A"]
    scores = d(images(size=size))
    side = (size >> layers) - 2 if layers else size
    assert scores.shape == (2, 1, side, side)
    with pytest.raises(ValueError, match="patch_layers"):
        tiny(image_size=size, patch_layers=layers + 1 if layers else 6)


@pytest.mark.parametrize("name", ["patch_layers", "pool_size", "n_blocks"])
def test_negative_sizes_are_bad_input(name):
    with pytest.raises(ValueError, match=name):
        tiny(**{name: -1})


def test_the_rate_is_constant_for_half_of_the_run_and_then_falls_to_zero():
    args = tiny(lr=2e-4)
    wanted = {0: 2e-4, 0.5: 2e-4, 0.505: 1.98e-4, 0.75: 1e-4, 0.995: 2e-6, 1: 0}
    for done, want in wanted.items():
        assert cyclegan.learning_rate(args, done) == pytest.approx(want, rel=1e-9)
    assert cyclegan.learning_rate(tiny(lr=2e-4, lr_decay=0.0), 0.9) == 2e-4


def test_resume_past_the_start_of_the_decay_is_exact_with_a_full_pool():
    args = tiny(pool_size=2, lr=1e-3)

    def run(update, state, steps):
        for i in steps:
            for key in ("opt_g", "opt_d"):
                state[key].param_groups[0]["lr"].fill_(cyclegan.learning_rate(args, i / 10))
            update(images(1, seed=i), images(1, seed=50 + i))

    torch.manual_seed(0)
    nets = cyclegan.build(args)
    update, state = cyclegan.updates(nets, args)
    run(update, state, range(7))
    saved = io.BytesIO()
    kept = {k: v if torch.is_tensor(v) else v.state_dict() for k, v in state.items()}
    weights = {key: net.state_dict() for key, net in nets.items()}
    torch.save(dict(nets=weights, state=kept, rng=torch.get_rng_state()), saved)
    run(update, state, range(7, 10))

    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    torch.manual_seed(9)
    again = cyclegan.build(args)
    update, new = cyclegan.updates(again, args)
    for key, net in again.items():
        net.load_state_dict(loaded["nets"][key])
    for key, value in new.items():
        if torch.is_tensor(value):
            value.copy_(loaded["state"][key])
        else:
            value.load_state_dict(loaded["state"][key])
    torch.set_rng_state(loaded["rng"])
    run(update, new, range(7, 10))
    assert_same(states(nets), states(again))
    assert torch.equal(state["pool_b"].images, new["pool_b"].images)


def test_updates_leave_nothing_behind():
    _, update, _ = assembled(pool_size=3)

    def tensors_after(n):
        for i in range(n):
            update(images(seed=i), images(seed=2))
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    assert tensors_after(4) == tensors_after(8)


# ---- a run


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A folder of two domains, grey as the fastest features are for those: A dark, B bright."""
    root = tmp_path_factory.mktemp("domains")
    for name, n, low in (("trainA", 7, 0), ("trainB", 5, 128), ("testA", 6, 0), ("testB", 7, 128)):
        (root / name).mkdir()
        rng = torch.Generator().manual_seed(n + low)
        for i in range(n):
            pixels = torch.randint(low, low + 128, (16, 16), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


def options(domains, out_dir, **changes):
    where = dict(dataset=str(domains), cache_dir=str(out_dir / "cache"), out_dir=str(out_dir))
    often = dict(log_every=1, sample_every=2, eval_every=3, eval_samples=6, threads=1, pool_size=3)
    return tiny(**(dict(channels=0, steps=6) | where | often | changes))


def test_a_run_shows_six_pictures_a_row_and_scores_both_directions(domains, tmp_path):
    folder = cyclegan.main(options(domains, tmp_path))
    rows = files.read_csv(folder / "metrics.csv")
    assert [row["step"] for row in rows] == ["3", "6"]
    both = {f"{name}_{way}" for name in ("fid", "kid") for way in ("AtoB", "BtoA")}
    assert set(rows[0]) == both | {"step", "seconds", "n", "features", "cycle_a", "cycle_b"}
    final = json.loads((folder / "metrics.json").read_text())
    assert set(final["baselines"]) == {"input", "mean of training", "training images"}
    given, mean = final["baselines"]["input"], final["baselines"]["mean of training"]
    assert set(given) == set(mean) == both
    assert all(mean[f"fid_{way}"] < given[f"fid_{way}"] for way in ("AtoB", "BtoA"))  # whose mean
    assert cli.read_args(folder)["args"]["channels"] == 1
    columns = set(files.read_csv(folder / "log.csv")[0])
    assert columns >= {"loss_g", "loss_d_a", "loss_d_b", "cycle_a", "identity_b", "adv_a", "lr"}
    assert columns >= {f"d_{what}_{x}" for what in ("real", "fake") for x in "ab"}
    nets, args, script = run.load(folder)
    saved = torch.load(folder / "generator.pt", weights_only=True)
    assert_same(nets["generator_ema"].state_dict(), saved)
    alone, x = cyclegan.ResnetGenerator(1, 1, 4), images(channels=1)
    alone.load_state_dict({k[5:]: v for k, v in saved.items() if k.startswith("BtoA.")})
    torch.testing.assert_close(alone(x), script.sample(nets, args, x, "BtoA"))


def test_domains_are_read_in_orders_of_their_own_and_tests_are_not_trained_on(
    domains, tmp_path, monkeypatch
):
    made = []

    class Batches(data.Batches):
        def __init__(self, images, *rest, **options):
            made.append((images, rest, options))
            super().__init__(images, *rest, **options)

    monkeypatch.setattr(data, "Batches", Batches)
    cyclegan.main(options(domains, tmp_path, steps=1))
    (a, for_a, _), (b, for_b, _) = made
    assert (len(a.images), len(b.images)) == (7, 5)
    assert a.images.max() < 128 <= b.images.min()
    assert for_a[-1] != for_b[-1]  # equal lengths would else be paired for good


def test_a_stopped_run_goes_on_to_the_same_bits_past_the_start_of_the_decay(domains, tmp_path):
    run_of = dict(steps=8, eval_every=0, sample_every=0)
    whole = cyclegan.main(options(domains, tmp_path / "whole", **run_of))
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, losses, after_step=run.Run.after_step):
            after_step(self, losses)
            if self.step == 6:
                self._signals.caught = signal.SIGTERM

        patch.setattr(run.Run, "after_step", stop)
        with pytest.raises(cli.Stopped):
            cyclegan.main(options(domains, tmp_path / "stopped", **run_of))
    (part,) = (tmp_path / "stopped").glob("cyclegan-*")
    cyclegan.main(cyclegan.Args(resume=str(part), quiet=True))
    saved = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, part)]
    for key in saved[0]["nets"]:
        assert_same(*(s["nets"][key] for s in saved))
    for pool in ("pool_a", "pool_b"):
        assert_same(*(s["state"][pool] for s in saved))
    logs = [files.read_csv(f / "log.csv") for f in (whole, part)]
    for rows in zip(*logs, strict=True):
        assert len({tuple(v for k, v in row.items() if k != "seconds") for row in rows}) == 1
    assert float(logs[0][6]["lr"]) < float(logs[0][0]["lr"])


def test_what_cannot_be_scored_or_converted_is_bad_input(domains, tmp_path):
    with pytest.raises(ValueError, match="channels is 3"):
        cyclegan.main(options(domains, tmp_path, channels=3))
    for name in ("trainA", "trainB"):
        shutil.copytree(domains / name, tmp_path / "two" / name)
    with pytest.raises(ValueError, match="testA"):
        cyclegan.main(options(tmp_path / "two", tmp_path / "out"))
    assert not list(tmp_path.glob("**/cyclegan-*"))
