"""vaegan.py: closed forms, whose gradient goes where, networks, and that public mistakes fail."""
import functools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vaegan
from tests import helpers
from vaegan import dec_adv_loss, dis_loss, llike_loss, prior_loss, reparameterize

TRAINED = ("encoder", "generator", "discriminator")
LOSS_OF = dict(zip(("loss_e", "loss_g", "loss_d"), TRAINED))
VAE = dict(lambda_llike=0.0, lambda_pixel=1.0, lambda_adv=0.0)
SETTINGS = {
    "vaegan": dict(gamma=0.3),
    "weights": dict(
        gamma=0.3, lambda_llike=2.0, lambda_pixel=0.7, lambda_prior=3.0, lambda_adv=5.0
    ),
    "learned": dict(lambda_adv=0.0),
    "vae": VAE,
    "no_prior": dict(lambda_prior=0.0),
    "no_gamma": dict(gamma=0.0),
}


tiny = functools.partial(helpers.tiny, "vaegan")


def images(n=8, channels=1, size=32, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=rng) * 2 - 1


# ---- losses


def check_prior(loss):
    """KL(N(mu, exp(logvar)) || N(0, I)), summed over dimensions, averaged over N."""
    zero = torch.zeros(5, 3, dtype=torch.float64)
    assert loss(zero, zero).item() == pytest.approx(0, abs=1e-12)
    assert loss(zero + 1, zero).item() == pytest.approx(3 / 2)
    assert loss(zero, zero + math.log(4)).item() == pytest.approx(3 * 0.8068528, abs=1e-6)
    assert loss(zero[:, :1] - 2, zero[:, :1] + 1).item() == pytest.approx((math.e + 4 - 2) / 2)


def check_llike(loss):
    """Half the squared error, summed over a sample, averaged over N."""
    h = torch.zeros(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert loss(h, torch.ones_like(h)).item() == pytest.approx(16)
    (grad,) = torch.autograd.grad(loss(h, torch.ones_like(h)), h)
    torch.testing.assert_close(grad, torch.full_like(h, -1 / 3))
    (grad,) = torch.autograd.grad(loss(h, h.detach()), h)
    assert not grad.any()


def check_dis(loss):
    """Three cross-entropies, each averaged over its batch."""
    zero, d = torch.zeros(4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    assert loss(zero, zero, zero).item() == pytest.approx(3 * math.log(2))
    d.requires_grad_()
    loss(*d).backward()
    torch.testing.assert_close(d.grad[0], zero - 0.125)
    torch.testing.assert_close(d.grad[1:], zero.expand(2, 4) + 0.125)
    assert loss(zero + 9, zero - 9, zero - 9) < 1e-3 < 9 < loss(zero - 9, zero + 9, zero + 9)
    assert loss(*(1e4 * torch.tensor([[-1.0], [1], [1]]))).item() == 3e4


def check_adv(loss):
    """Non-saturating: where Dis is sure, the gradient is near 1."""
    zero = torch.zeros(4, dtype=torch.float64)
    assert loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    d = torch.full((2, 4), -5.0, dtype=torch.float64, requires_grad=True)
    loss(*d).backward()
    torch.testing.assert_close(d.grad, torch.full_like(d, -0.9933071 / 4), rtol=1e-6, atol=0)


def check_reparameterize(draw):
    """Mean and standard deviation of N(mu, exp(logvar)); gradients 1 and half the deviation."""
    torch.manual_seed(0)
    mu = torch.full((100_000, 1), 3.0, dtype=torch.float64, requires_grad=True)
    logvar = torch.full_like(mu, math.log(4)).requires_grad_()
    z = draw(mu, logvar)
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(2, rel=0.02)
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones_like(mu))
    torch.testing.assert_close(logvar.grad, (z - mu).detach() / 2)


def as_real(d):
    return F.softplus(-d).mean()


def as_fake(d):
    return F.softplus(d).mean()


def sigmoid_first(loss):
    return lambda *d: loss(*(x.sigmoid() for x in d))


CHECKS = {  # of a loss: the right one, then what is commonly found in its place
    check_prior: {
        "right": prior_loss,
        "summed over the batch": lambda mu, lv: len(mu) * prior_loss(mu, lv),
        "averaged over dimensions": lambda mu, lv: prior_loss(mu, lv) / mu.shape[1],
        "logvar taken as log of the deviation": lambda mu, lv: prior_loss(mu, 2 * lv),
        "the bound's sign kept": lambda mu, lv: -prior_loss(mu, lv),
    },
    check_llike: {
        "right": llike_loss,
        "averaged over features": lambda a, b: 0.5 * (a - b).square().mean(),
        "summed over the batch": lambda a, b: 0.5 * (a - b).square().sum(),
        "without the half": lambda a, b: 2 * llike_loss(a, b),
        "not squared": lambda a, b: (a - b).abs().flatten(1).sum(1).mean(),
    },
    check_dis: {
        "right": dis_loss,
        "sigmoid before the logits' loss": sigmoid_first(dis_loss),
        "no reconstructions": lambda r, rec, prior: as_real(r) + as_fake(prior),
        "minus between the terms": lambda r, rec, prior: as_real(r) - as_fake(rec) - as_fake(prior),
        "all in one mean": lambda r, *fakes: as_real(r) + as_fake(torch.cat(fakes)),
    },
    check_adv: {
        "right": dec_adv_loss,
        "saturating": lambda rec, prior: -as_fake(rec) - as_fake(prior),
        "sigmoid before the logits' loss": sigmoid_first(dec_adv_loss),
        "averaged over both": lambda d_rec, d_prior: dec_adv_loss(d_rec, d_prior) / 2,
    },
    check_reparameterize: {
        "right": reparameterize,
        "logvar taken as log of the deviation": lambda mu, lv: reparameterize(mu, 2 * lv),
        "the variance as deviation": lambda mu, lv: mu + lv.exp() * torch.randn_like(mu),
        "no gradient": lambda mu, lv: torch.normal(mu, (lv / 2).exp()).detach() + 0 * (mu + lv),
    },
}


@pytest.mark.parametrize("check, form", [(c, f) for c, forms in CHECKS.items() for f in forms])
def test_the_losses_have_their_closed_forms_and_the_common_wrong_ones_fail(check, form):
    if form == "right":
        check(CHECKS[check][form])
    else:
        with pytest.raises(AssertionError):
            check(CHECKS[check][form])


def test_losses_are_means_over_the_batch_and_sums_over_a_sample():
    a, b = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    mu, logvar, d = a.flatten(1)[:, :5], b.flatten(1)[:, :5], torch.randn(3, 6, dtype=torch.float64)
    order = torch.randperm(6)

    def losses(pick):
        d_real, d_rec, d_prior = d[:, pick]
        return torch.stack([
            prior_loss(mu[pick], logvar[pick]), llike_loss(a[pick], b[pick]),
            dis_loss(d_real, d_rec, d_prior), dec_adv_loss(d_rec, d_prior),
        ])

    once = losses(torch.arange(6))
    torch.testing.assert_close(losses(torch.arange(6).repeat(2)), once)
    torch.testing.assert_close(losses(order), once)
    tiled = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (a, b)]
    torch.testing.assert_close(llike_loss(*tiled), 4 * llike_loss(a, b))
    twice = prior_loss(mu.repeat(1, 2), logvar.repeat(1, 2))
    torch.testing.assert_close(twice, 2 * prior_loss(mu, logvar))


def test_every_loss_agrees_with_differences():
    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.autograd.gradcheck(prior_loss, (double(4, 3), double(4, 3)))
    torch.autograd.gradcheck(llike_loss, (double(2, 2, 3, 3), double(2, 2, 3, 3)))
    torch.autograd.gradcheck(dis_loss, (double(4), double(4), double(4)))
    torch.autograd.gradcheck(dec_adv_loss, (double(4), double(4)))


# ---- whose gradient goes where


class TinyEncoder(nn.Module):
    """Images [N, 1, 2, 2] -> mu, logvar [N, 2] in float64, smooth; 20 weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.body(x.flatten(1)).chunk(2, 1)


class TinyGenerator(nn.Module):
    """z [N, 2] -> images [N, 1, 2, 2] in float64, smooth; 12 weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 4).double()

    def forward(self, z):
        return self.body(z).tanh().view(-1, 1, 2, 2)


class TinyDiscriminator(nn.Module):
    """Images [N, 1, 2, 2] -> features [N, 3], scores [N], in float64, smooth; 19 weights."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(3, 1)).double()

    def score(self, features):
        return self.rest(features).squeeze(1)

    def forward(self, x):
        return self.score(self.features(x))


def small():
    torch.manual_seed(0)
    nets = dict(encoder=TinyEncoder(), generator=TinyGenerator(), discriminator=TinyDiscriminator())
    return nets | dict(encoder_ema=TinyEncoder(), generator_ema=TinyGenerator())


def own(**changes):
    """The script's networks in float64; no power iterations, which move with every call."""
    torch.manual_seed(3)
    nets = {name: net.double() for name, net in vaegan.build(tiny(**changes)).items()}
    nets["discriminator"].eval()
    return nets


def still(nets, args, real):
    """losses(): one update in float64 that leaves gradients and no trace in the weights."""
    update, state = vaegan.updates(nets, args)
    for opt in (state["opt_e"], state["opt_g"], state["opt_d"]):
        opt.param_groups[0]["lr"].fill_(0.0)

    def losses():
        torch.manual_seed(1)
        return update(real)

    return losses


def by_hand(nets, args, real, wrong=None):
    """Gradients of each network, written out with a forward for each; wrong: a mistake put in."""
    enc, dec, dis = (nets[name] for name in TRAINED)
    torch.manual_seed(1)
    mu, logvar = enc(real)
    z = mu + (logvar / 2).exp() * torch.randn_like(mu)
    if args.lambda_adv or args.lambda_llike:  # one batch, so that BatchNorm sees both
        rec, fake = dec(torch.cat([z, torch.randn_like(mu)])).chunk(2)
    else:
        rec = fake = dec(z)
    kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum() / len(real)
    h_real, h_rec = dis.features(real), dis.features(rec)
    llike = 0.5 * (h_real - h_rec).square().sum() / len(real)
    pixel = 0.5 * (real - rec).square().sum() / len(real)
    likelihood = args.lambda_llike * llike + args.lambda_pixel * pixel
    s_real, s_rec, s_fake = dis(real), dis(rec), dis(fake)
    adversarial = -(F.logsigmoid(s_rec) + F.logsigmoid(s_fake)).mean()
    cross = -(F.logsigmoid(s_real) + F.logsigmoid(-s_rec) + F.logsigmoid(-s_fake)).mean()
    loss = dict(
        encoder=args.lambda_prior * kl + likelihood,
        generator=args.gamma * likelihood + args.lambda_adv * adversarial,
        discriminator=cross,
    )
    if wrong == "the likelihood trains Dis":
        loss["discriminator"] = cross + likelihood
    if wrong == "the adversarial loss trains Enc":
        loss["encoder"] = loss["encoder"] + args.lambda_adv * adversarial
    if wrong == "one sum of all losses for all":
        loss = dict.fromkeys(TRAINED, kl + likelihood + cross)
    if wrong == "gamma for Enc too":
        loss["encoder"] = args.lambda_prior * kl + args.gamma * likelihood
    if wrong == "gamma for no one":
        loss["generator"] = likelihood + args.lambda_adv * adversarial
    if wrong == "rec detached from Enc":
        loss["encoder"] = args.lambda_prior * kl
    if wrong == "prior samples alone":
        loss["discriminator"] = -(F.logsigmoid(s_real) + F.logsigmoid(-s_fake)).mean()
    return {
        name: torch.autograd.grad(loss[name], list(nets[name].parameters()), retain_graph=True)
        for name in TRAINED
        if name != "discriminator" or args.lambda_adv or args.lambda_llike
    }


def differing(nets, want):
    """Networks whose gradients are others than want."""
    def same(name):
        grads = [p.grad for p in nets[name].parameters()]
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(grads, want[name]))

    return {name for name in want if not same(name)}


@pytest.mark.parametrize("make", [small, own])
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_are_those_of_each_loss_by_itself(setting, make):
    args, nets = tiny(**SETTINGS[setting]), make()
    real = (images(6) if make is own else images(6, size=2)).double()
    still(nets, args, real)()
    assert differing(nets, by_hand(nets, args, real)) == set()
    trained = [name for name in TRAINED if name != "discriminator" or setting != "vae"]
    assert all(p.grad.any() for name in trained for p in nets[name].parameters())


@pytest.mark.parametrize(
    "wrong, where",
    [
        ("the likelihood trains Dis", {"discriminator"}),
        ("the adversarial loss trains Enc", {"encoder"}),
        ("one sum of all losses for all", set(TRAINED)),
        ("gamma for Enc too", {"encoder"}),
        ("gamma for no one", {"generator"}),
        ("rec detached from Enc", {"encoder"}),
        ("prior samples alone", {"discriminator"}),
    ],
)
def test_wrong_routes_give_other_gradients(wrong, where):
    args, nets, real = tiny(**SETTINGS["vaegan"]), small(), images(6, size=2).double()
    still(nets, args, real)()
    assert differing(nets, by_hand(nets, args, real, wrong)) == where


def difference(loss, weights, directions, h):
    values = []
    for sign in (h, -2 * h):
        with torch.no_grad():
            for w, v in zip(weights, directions):
                w.add_(v, alpha=sign)
        values.append(loss())
    with torch.no_grad():
        for w, v in zip(weights, directions):
            w.add_(v, alpha=h)
    return ((values[0] - values[1]) / (2 * h)).item()


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_derivative_agrees_with_differences_on_small_smooth_networks(setting):
    args, nets, real = tiny(**SETTINGS[setting]), small(), images(6, size=2).double()
    losses = still(nets, args, real)
    for key in losses().keys() & LOSS_OF.keys():
        for p in nets[LOSS_OF[key]].parameters():
            losses()
            grad = p.grad.clone().flatten()
            for i in range(p.numel()):
                unit = torch.zeros_like(p)
                unit.view(-1)[i] = 1
                found = difference(lambda: losses()[key], [p], [unit], 1e-6)
                assert grad[i].item() == pytest.approx(found, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("image_size, channels", [(32, 1), (32, 3), (64, 1)])
@pytest.mark.parametrize("key", LOSS_OF)
def test_derivatives_of_the_scripts_networks_agree_with_differences(key, image_size, channels):
    size = dict(image_size=image_size, channels=channels)
    args, nets = tiny(**size), own(**size)
    losses = still(nets, args, images(8, channels, image_size).double())
    losses()
    weights = list(nets[LOSS_OF[key]].parameters())
    directions = [torch.randn_like(p) for p in weights]
    want = sum((p.grad * v).sum() for p, v in zip(weights, directions)).item()
    # the step is small so that it meets no kink of a ReLU
    found = difference(lambda: losses()[key], weights, directions, 1e-8)
    assert found == pytest.approx(want, rel=1e-4)


def test_batchnorm_of_separate_calls_would_hide_what_the_likelihood_must_see():
    """Dis of the paper has BatchNorm: x and an x of other brightness and contrast look the same."""
    torch.manual_seed(0)
    x, y = images(16), 0.5 * images(16) + 0.3
    normed = nn.Sequential(nn.Conv2d(1, 4, 4, 2), nn.BatchNorm2d(4, eps=1e-12)).train()
    apart, together = (normed(x), normed(y)), normed(torch.cat([x, y])).chunk(2)
    assert llike_loss(*apart) < 1e-3 < 100 < llike_loss(*together)
    d = vaegan.build(tiny())["discriminator"].eval()
    one_by_one = torch.cat([d.features(x), d.features(y)])
    torch.testing.assert_close(one_by_one, d.features(torch.cat([x, y])))
    assert llike_loss(d.features(x), d.features(y)) > 1
    assert not any(isinstance(m, nn.BatchNorm2d) for m in d.modules())


# ---- the update


def recorded(**changes):
    """Inputs and outputs of each network in one update, in their order, and the losses."""
    torch.manual_seed(0)
    args = tiny(**changes)
    nets, calls = vaegan.build(args), []
    for name in TRAINED:
        at = nets[name].features if name == "discriminator" else nets[name]
        at.register_forward_hook(lambda net, x, y, name=name: calls.append((name, x[0], y)))
    logs = vaegan.updates(nets, args)[0](images())
    return nets, calls, logs


def test_each_network_is_called_once_with_all_its_inputs():
    real = images()
    _, [(_, x, (mu, _)), (_, z, fake), (_, seen, _)], _ = recorded()
    assert torch.equal(x, real) and mu.shape == (8, 8)
    assert z.shape == (16, 8) and fake.shape == (16, 1, 32, 32)
    assert torch.equal(seen, torch.cat([real, fake]))


def test_codes_come_first_and_prior_draws_second():
    _, calls, _ = recorded(batch_size=512)
    (_, _, (mu, logvar)), (_, z, _) = calls[:2]
    code, prior = z.chunk(2)
    assert prior.mean().abs() < 0.5 and prior.std().item() == pytest.approx(1, rel=0.3)
    noise = (code - mu) / (logvar / 2).exp()
    assert noise.std().item() == pytest.approx(1, rel=0.3) and not torch.equal(noise, prior)


def test_a_plain_vae_never_asks_dis_and_draws_no_prior_sample():
    args = tiny(**VAE)
    before = {k: v.clone() for k, v in recorded(**VAE)[0]["discriminator"].state_dict().items()}
    torch.manual_seed(0)
    fresh = vaegan.build(args)["discriminator"].state_dict()
    assert all(torch.equal(before[k], fresh[k]) for k in fresh)  # vectors of its norms included
    nets, calls, logs = recorded(**VAE)
    assert [(name, len(x)) for name, x, _ in calls] == [("encoder", 8), ("generator", 8)]
    assert all(p.grad is None for p in nets["discriminator"].parameters())
    assert logs.keys() == {"pixel", "prior", "loss_e", "loss_g"}


def test_dis_trains_while_anything_needs_it():
    for changes in (dict(lambda_adv=0.0), dict(lambda_llike=0.0, lambda_pixel=1.0)):
        nets, calls, logs = recorded(**changes)
        assert len(calls) == 3 and all(p.grad.any() for p in nets["discriminator"].parameters())
        assert "loss_d" in logs


def test_logged_losses_are_the_weighted_sums():
    w = SETTINGS["weights"]
    logs = recorded(**w)[2]
    llike = w["lambda_llike"] * logs["llike"] + w["lambda_pixel"] * logs["pixel"]
    torch.testing.assert_close(logs["loss_e"], llike + w["lambda_prior"] * logs["prior"])
    torch.testing.assert_close(logs["loss_g"], w["gamma"] * llike + w["lambda_adv"] * logs["adv"])
    assert not any(v.dim() or v.requires_grad for v in logs.values())


def test_the_prior_warms_up_by_the_updates_in_the_state():
    args = tiny(kl_warmup=4, **VAE)
    nets = vaegan.build(args)
    update, state = vaegan.updates(nets, args)
    assert torch.is_tensor(state["t"]) and state["t"].dim() == 0
    weights = []
    for _ in range(6):
        logs = update(images())
        weights.append(((logs["loss_e"] - logs["pixel"]) / logs["prior"]).item())
    assert weights == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-3)
    state["t"].fill_(2)  # as a checkpoint would
    logs = update(images())
    assert ((logs["loss_e"] - logs["pixel"]) / logs["prior"]).item() == pytest.approx(0.5, abs=1e-3)


def test_all_gradients_are_taken_at_the_weights_before_any_step():
    """A second update from the same start, at a rate so small that nothing moves, sees the same."""
    grads = []
    for lr in (1e-2, 1e-12):
        nets = recorded(lr=lr)[0]
        grads.append([p.grad for name in TRAINED for p in nets[name].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_every_network_obeys_its_own_rate_and_has_adams_arguments():
    args = tiny(beta1=0.3, beta2=0.7)
    nets = vaegan.build(args)
    update, state = vaegan.updates(nets, args)
    for key, name in zip(("opt_e", "opt_g", "opt_d"), TRAINED):
        (group,) = state[key].param_groups
        assert type(state[key]) is torch.optim.Adam
        assert group["fused"] and group["betas"] == (0.3, 0.7)
        assert torch.is_tensor(group["lr"]) and group["lr"].dim() == 0
        assert {id(p) for p in group["params"]} == {id(p) for p in nets[name].parameters()}
        group["lr"].fill_(0.0)
    before = [p.clone() for name in TRAINED for p in nets[name].parameters()]
    update(images())
    after = [p for name in TRAINED for p in nets[name].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    state["opt_e"].param_groups[0]["lr"].fill_(0.1)
    update(images())
    after = [p for name in TRAINED for p in nets[name].parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after)]
    n = len(list(nets["encoder"].parameters()))
    assert all(moved[:n]) and not any(moved[n:])


def test_precision_is_that_of_the_convolutions():
    wanted_of = dict(fp32=torch.float32, bf16=torch.bfloat16, auto=torch.float32)
    for precision, wanted in wanted_of.items():
        args, seen = tiny(precision=precision), []
        nets = vaegan.build(args)
        for name in TRAINED:
            nets[name].body.register_forward_hook(lambda net, x, y: seen.append(y.dtype))
        logs = vaegan.updates(nets, args)[0](images())
        assert seen == [wanted] * 3
        assert {v.dtype for v in logs.values()} == {torch.float32}
        grads = [p.grad for name in TRAINED for p in nets[name].parameters()]
        assert {g.dtype for g in grads} == {torch.float32}


def test_both_averages_ramp_up_and_copy_buffers():
    args = tiny(ema_decay=0.5)
    nets = vaegan.build(args)
    update, _ = vaegan.updates(nets, args)
    for t in range(1, 10):
        old = {name: next(nets[f"{name}_ema"].parameters()).clone() for name in TRAINED[:2]}
        update(images())
        decay = min(0.5, (1 + t) / (10 + t))
        for name, before in old.items():
            ema, net = nets[f"{name}_ema"], nets[name]
            wanted = decay * before + (1 - decay) * next(net.parameters())
            torch.testing.assert_close(next(ema.parameters()), wanted)
            assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), net.buffers()))


def test_a_vae_learns_to_reconstruct_a_batch():
    args = tiny(width=8, lambda_prior=0.1, lr=1e-2, **VAE)
    torch.manual_seed(0)
    nets = vaegan.build(args)
    update, _ = vaegan.updates(nets, args)
    x = F.interpolate(images(8, size=4), 32)
    errors = [update(x)["pixel"].item() for _ in range(100)]
    assert errors[-1] < 0.2 * errors[0]
    rec = vaegan.sample(nets, args, vaegan.encode(nets, args, x))
    assert (rec - x).square().mean() < 0.5 * x.square().mean()


# ---- networks


@pytest.mark.parametrize(
    "size, shape", [(8, (3, 4, 4, 4)), (16, (3, 4, 8, 8)), (32, (3, 8, 8, 8)), (64, (3, 16, 8, 8))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_map_between_images_codes_and_scores(size, shape, channels):
    args = tiny(image_size=size, channels=channels)
    nets = vaegan.build(args)
    mu, logvar = nets["encoder"](images(3, channels, size))
    assert mu.shape == logvar.shape == (3, 8)
    x = nets["generator"](mu)
    assert x.shape == (3, channels, size, size) and x.abs().max() <= 1
    d = nets["discriminator"]
    assert d(x).shape == (3,) and d.features(x).shape == shape
    update, _ = vaegan.updates(nets, args)
    assert all(torch.isfinite(v) for v in update(images(8, channels, size)).values())


def test_features_are_those_before_the_activation():
    d = vaegan.Discriminator(1, 32, 4)
    assert isinstance(d.features[-1], nn.Conv2d) and isinstance(d.body[0], nn.LeakyReLU)


def test_codes_and_scores_are_float32_under_autocast():
    nets = vaegan.build(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        mu, logvar = nets["encoder"](images(64))
        scores = nets["discriminator"](images(64))
    assert mu.dtype == logvar.dtype == scores.dtype == torch.float32
    assert len(scores.unique()) > 48 and len(mu.unique()) > 400


def test_encode_gives_the_mean_of_the_averaged_encoder():
    args = tiny()
    nets = vaegan.build(args)
    update, _ = vaegan.updates(nets, args)
    for _ in range(3):
        update(images())
    z = vaegan.encode(nets, args, images())
    assert z.shape == (8, 8) and not z.requires_grad
    torch.testing.assert_close(z, nets["encoder_ema"](images())[0])
    assert (z - nets["encoder"].eval()(images())[0]).abs().max() > 1e-4
    alone = vaegan.encode(nets, args, images()[:3])
    torch.testing.assert_close(alone, z[:3])  # no statistics of the batch


# ---- what is measured


def test_sharpness_in_closed_form():
    flat = torch.full((2, 1, 6, 6), 0.7)
    slope = torch.arange(6.0).expand(2, 1, 6, 6)
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2 * 2.0 - 1
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 2, 2] = 1
    assert vaegan.sharpness(flat) < 1e-10 and vaegan.sharpness(slope) < 1e-10
    assert vaegan.sharpness(board.expand(2, 3, 6, 6)).item() == 64
    assert vaegan.sharpness(dot).item() == pytest.approx((16 + 4) / 9)


def test_blur_lowers_sharpness_where_the_mean_slope_is_kept():
    edge = torch.zeros(1, 1, 32, 32)
    edge[..., 16:] = 1
    blurred = F.avg_pool2d(F.pad(edge, (2, 2, 2, 2), mode="replicate"), 5, 1)

    def slope(x):
        return x.diff(dim=3).abs().mean()

    torch.testing.assert_close(slope(blurred), slope(edge))
    assert vaegan.sharpness(blurred) < 0.1 * vaegan.sharpness(edge)


# ---- arguments


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(gamma=-1.0), "gamma"),
        (dict(gamma=float("nan")), "gamma"),
        (dict(kl_warmup=-1), "kl_warmup"),
        (dict(lambda_llike=0.0), "nothing is reconstructed"),
        (dict(gamma=0.0, lambda_adv=0.0), "decoder learns nothing"),
    ],
)
def test_bad_weights_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        vaegan.Args(**changes)


# ---- the run


def test_a_run_shows_and_scores_reconstructions_and_resumes_to_the_bit(tmp_path):
    changes = dict(kl_warmup=5, sample_every=2, eval_every=0, log_every=1)
    whole = helpers.train("vaegan", tmp_path / "whole", steps=4, **changes)
    part = helpers.train("vaegan", tmp_path / "part", steps=2, **changes)
    assert helpers.resume("vaegan", part, steps=4, quiet=True) == part
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, part))
    for name in a["nets"]:
        helpers.assert_same(a["nets"][name], b["nets"][name])
    row, again = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, part))
    row.pop("seconds"), again.pop("seconds")
    assert row == again
    assert row["fid"] > 0 and 0 < row["rec_error"] < 4 and row["rec_fid"] > 0
    assert 0 < row["sharpness"] and 0 < row["rec_sharpness"]
    for name in ("samples", "reconstructions", "interpolations"):
        assert (whole / name / "000004.png").is_file() and (whole / f"{name}.png").is_file()


def test_images_of_every_class_are_encoded_where_not_all_of_them_are(tmp_path):
    """Folders list class by class: of the first alone, flat here, the sharpness would be 0 / 0."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name, top in (("flat", 1), ("noisy", 256)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(32):
                pixels = torch.randint(0, top, (32, 32), generator=draw, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    places = {"dataset": str(tmp_path / "photos"), "cache_dir": str(tmp_path / "cache")}
    folder = helpers.train("vaegan", tmp_path / "runs", eval_samples=32, steps=1, **places)
    row = json.loads((folder / "metrics.json").read_text())
    assert math.isfinite(row["sharpness"]) and math.isfinite(row["rec_sharpness"])
