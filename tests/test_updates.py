"""What the networks and `updates` of every script keep to: shapes, routing, derivatives, the penalty."""
import pytest
import torch

from tests.helpers import SCRIPTS, Recorder, TinyCritic, TinyGenerator, central_difference, script, still_losses, tiny

PENALISED = [name for name in SCRIPTS if hasattr(script(name), "gradient_penalty")]
METHOD = {"cn_lsgan": {"lambda_rec": 1.0}}  # weights that are too small by default to be seen in a derivative


def discriminator(name, image_size=32, channels=1):
    """A small one; what changes with every call in train mode, as the vectors of a spectral norm, stands still."""
    return script(name).build(tiny(name, image_size=image_size, channels=channels))["discriminator"].eval()


# ---- networks


@pytest.mark.parametrize("image_size, channels", [(8, 1), (32, 1), (32, 3), (64, 1), (64, 3)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_map_between_latents_images_and_scores(name, image_size, channels):
    nets = script(name).build(tiny(name, image_size=image_size, channels=channels))
    x = nets["generator"](torch.randn(3, 8))
    assert x.shape == (3, channels, image_size, image_size) and x.abs().max() <= 1
    assert nets["discriminator"](x).shape == (3,)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scores_are_unbounded_and_float32_under_autocast(name):
    d = discriminator(name)
    with torch.autocast("cpu", torch.bfloat16):
        scores = d(torch.randn(64, 1, 32, 32))
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 48  # a bf16 head would leave few different values
    for bias in (3.0, -7.0):
        with torch.no_grad():
            d.head.bias.fill_(bias)
            assert d(torch.zeros(1, 1, 32, 32)).item() == pytest.approx(bias, abs=1.5)


@pytest.mark.parametrize("image_size, channels", [(32, 1), (64, 3)])
@pytest.mark.parametrize("name", SCRIPTS)
def test_score_and_slope_of_an_image_do_not_depend_on_the_others(name, image_size, channels):
    d = discriminator(name, image_size, channels).double()

    def of_first(x):
        x = x.requires_grad_()
        scores = d(x)
        (grad,) = torch.autograd.grad(scores.sum(), x)
        return scores[0].detach(), grad[0]

    x = torch.randn(4, channels, image_size, image_size, dtype=torch.float64)
    y = torch.cat([x[:1], 5 * torch.randn_like(x[1:])])
    for a, b in zip(of_first(x), of_first(y)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ---- updates


@pytest.mark.parametrize("name", SCRIPTS)
def test_d_update_leaves_g_alone_and_the_other_way_round(name):
    m, args = script(name), tiny(name, **METHOD.get(name, {}))
    nets = m.build(args)
    g, d = nets["generator"], nets["discriminator"]
    update_d, update_g, _ = m.updates(nets, args)

    def weights(net):
        return [p.detach().clone() for p in net.parameters()]

    before = weights(g)
    update_d(torch.rand(8, 1, 32, 32))
    assert all(p.grad is None for p in g.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(g)))
    # a constant on all scores changes neither a difference of scores nor a slope
    assert all(p.grad.any() for key, p in d.named_parameters() if (name, key) != ("wgan_gp", "head.bias"))
    before, grads = weights(d), [p.grad.clone() for p in d.parameters()]
    update_g()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(d)))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, d.parameters()))
    assert all(p.requires_grad for p in d.parameters())
    assert all(p.grad is not None and p.grad.any() for p in g.parameters())


@pytest.mark.parametrize("key", ["discriminator", "generator"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_derivative_agrees_with_differences_on_small_smooth_networks(name, key):
    torch.manual_seed(0)
    small = dict(generator=TinyGenerator(), discriminator=TinyCritic(), generator_ema=TinyGenerator())
    real = torch.rand(8, 1, 2, 2, dtype=torch.float64) * 2 - 1
    nets, losses = still_losses(name, real, small, z_dim=2, **METHOD.get(name, {}))
    for p in nets[key].parameters():
        losses[key]()  # at the point itself, which the differences before have left
        grad = p.grad.clone()
        for i in range(p.numel()):
            unit = torch.zeros_like(p)
            unit.view(-1)[i] = 1
            found = central_difference(losses[key], [p], [unit], 1e-6)
            assert grad.view(-1)[i].item() == pytest.approx(found.item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("key", ["discriminator", "generator"])
@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_derivatives_of_the_scripts_networks_agree_with_differences(name, key, image_size, channels):
    torch.manual_seed(3)
    real = torch.rand(8, channels, image_size, image_size, dtype=torch.float64) * 2 - 1
    nets, losses = still_losses(name, real, image_size=image_size, **METHOD.get(name, {}))
    losses[key]()
    weights = list(nets[key].parameters())
    directions = [torch.randn_like(p) for p in weights]
    want = sum((p.grad * v).sum() for p, v in zip(weights, directions)).item()
    # the step is small so that it meets no kink of a ReLU
    assert central_difference(losses[key], weights, directions, 1e-8).item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_updates_repeat_with_the_seed_and_z_is_fresh(name):
    m, args = script(name), tiny(name, batch_size=32)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        nets = m.build(args)
        seen = []
        nets["generator"].register_forward_hook(lambda net, z, y: seen.append(z[0]))
        update_d, update_g, _ = m.updates(nets, args)
        for _ in range(2):
            update_d(torch.zeros(32, 1, 32, 32))
            update_g()
        assert all(abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.2 for z in seen)  # N(0, I), as sampled later
        runs.append(torch.cat(seen))
    assert torch.equal(*runs)
    first = runs[0][:, 0]
    assert len(first.unique()) == len(first)


@pytest.mark.parametrize("name", SCRIPTS)
def test_ema_ramp_counts_generator_updates(name):
    m, args = script(name), tiny(name, ema_decay=0.5)
    nets = m.build(args)
    update_d, update_g, state = m.updates(nets, args)
    e, p = next(nets["generator_ema"].parameters()), next(nets["generator"].parameters())
    for t in range(1, 12):
        old = e.clone()
        update_d(torch.rand(8, 1, 32, 32))
        update_g()
        decay = min(0.5, (1 + t) / (10 + t))
        torch.testing.assert_close(e, decay * old + (1 - decay) * p)
        assert state["t"].item() == t


@pytest.mark.parametrize("name", SCRIPTS)
def test_precision_is_that_of_the_convolutions_in_both_updates(name):
    for precision, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        m, args = script(name), tiny(name, precision=precision)
        nets, seen = m.build(args), []
        for key in ("generator", "discriminator"):
            nets[key].body.register_forward_hook(lambda net, x, y: seen.append(y.dtype))
        update_d, update_g, _ = m.updates(nets, args)
        losses = update_d(torch.rand(8, 1, 32, 32))
        calls = len(seen)
        losses |= update_g()
        assert set(seen) == {wanted} and 2 <= calls < len(seen)
        assert {v.dtype for v in losses.values()} == {torch.float32}


@pytest.mark.parametrize("name", SCRIPTS)
def test_latents_are_normal_and_every_network_trains_in_train_mode(name):
    m, args = script(name), tiny(name)
    z = m.latents(4096, args, torch.Generator().manual_seed(0))
    assert z.pow(4).mean() == pytest.approx(3, abs=0.2)  # 9 / 5 for a uniform prior of this variance
    nets, modes = m.build(args), []
    for key in ("generator", "discriminator"):
        nets[key].register_forward_hook(lambda net, x, y: modes.append(net.training))
    update_d, update_g, _ = m.updates(nets, args)
    update_d(torch.rand(8, 1, 32, 32))
    update_g()
    assert len(modes) >= 4 and all(modes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_adam_has_the_betas_of_the_arguments(name):
    m, args = script(name), tiny(name, beta1=0.3, beta2=0.7, lr=0.01)
    _, _, state = m.updates(m.build(args), args)
    for key in ("opt_g", "opt_d"):
        (group,) = state[key].param_groups
        assert type(state[key]) is torch.optim.Adam and group["fused"] and not group["capturable"]
        assert group["betas"] == (0.3, 0.7) and group["lr"].item() == pytest.approx(0.01)


@pytest.mark.parametrize("name", SCRIPTS)
def test_learning_rates_are_tensors_that_an_update_obeys(name):
    m, args = script(name), tiny(name)
    nets = m.build(args)
    update_d, update_g, state = m.updates(nets, args)
    for key in ("opt_g", "opt_d"):
        lr = state[key].param_groups[0]["lr"]
        assert torch.is_tensor(lr) and lr.dim() == 0
        lr.fill_(0.0)
    before = [p.clone() for net in ("generator", "discriminator") for p in nets[net].parameters()]
    update_d(torch.rand(8, 1, 32, 32))
    update_g()
    after = [p for net in ("generator", "discriminator") for p in nets[net].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


# ---- scripts with a gradient penalty


@pytest.mark.parametrize("target, value, row", [(1.0, 8.5, [2.4, 3.2]), (0.0, 12.5, [3.0, 4.0]), (5.0, 12.5, [0.0, 0.0])])
@pytest.mark.parametrize("name", PENALISED)
def test_penalty_of_norms_zero_and_five(name, target, value, row):
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    loss = script(name).gradient_penalty(grad, target)
    loss.backward()
    assert loss.item() == value
    torch.testing.assert_close(grad.grad, torch.tensor([row, [0.0, 0.0]]))  # no NaN at 0


@pytest.mark.parametrize("name", PENALISED)
def test_penalty_is_a_mean_over_the_batch_and_a_norm_over_all_pixels(name):
    penalty = script(name).gradient_penalty
    g = torch.randn(7, 3, 4, 4, dtype=torch.float64)
    want = torch.stack([(row.square().sum().sqrt() - 1).square() for row in g]).mean()
    torch.testing.assert_close(penalty(g), want)
    torch.testing.assert_close(penalty(torch.cat([g, g])), want)


@pytest.mark.parametrize("name", PENALISED)
def test_penalty_of_bf16_gradients_is_taken_in_float32(name):
    grad = torch.randn(8, 1, 32, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = script(name).gradient_penalty(grad)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, script(name).gradient_penalty(grad.float()))


@pytest.mark.parametrize("name", PENALISED)
def test_interpolate_goes_from_fake_to_real_and_holds_no_graph(name):
    interpolate = script(name).interpolate
    real, fake = torch.randn(2, 3, 2, 4, 4)
    fake.requires_grad_()
    assert torch.equal(interpolate(real, fake, torch.ones(3)), real)
    assert torch.equal(interpolate(real, fake, torch.zeros(3)), fake)
    y = interpolate(real, fake, torch.tensor([0.0, 1.0, 0.25]))
    assert not y.requires_grad
    torch.testing.assert_close(y, torch.stack([fake[0], real[1], 0.25 * real[2] + 0.75 * fake[2]]).detach())


@pytest.mark.parametrize("name", PENALISED)
def test_the_slope_is_taken_at_one_point_on_the_line_of_each_sample(name):
    m, args, inputs, ops = script(name), tiny(name), [], Recorder(name)
    nets = m.build(args)
    nets["discriminator"].register_forward_hook(lambda net, x, y: inputs.append(x[0]))
    real = torch.rand(8, 1, 32, 32)
    m.updates(nets, args, ops)[0](real)
    assert [key for key, _ in ops.calls] == ["interpolate", "gradient_penalty"]
    x_real, x_fake, eps = ops.calls[0][1]
    assert x_real is real and not x_fake.requires_grad
    assert [len(x) for x in inputs] == [16, 8] and torch.equal(inputs[0], torch.cat([x_real, x_fake]))
    assert eps.shape == (8,) and len(eps.unique()) == 8 and (eps >= 0).all() and (eps < 1).all()
    torch.testing.assert_close(inputs[1].detach(), m.interpolate(x_real, x_fake, eps))
    assert inputs[1].is_leaf


@pytest.mark.parametrize("name", PENALISED)
def test_eps_spreads_over_all_of_the_line(name):
    args, ops = tiny(name, batch_size=256), Recorder(name)
    script(name).updates(script(name).build(args), args, ops)[0](torch.rand(256, 1, 32, 32))
    eps = ops.calls[0][1][2]
    assert eps.mean() == pytest.approx(0.5, abs=0.1) and eps.min() < 0.1 and eps.max() > 0.9


@pytest.mark.parametrize("name", PENALISED)
def test_the_functions_with_kernels_are_those_of_ops(name):
    class Ops:
        interpolate = staticmethod(lambda real, fake, eps: torch.full_like(real, 0.5))
        gradient_penalty = staticmethod(lambda grad, target=1.0: 0 * grad.sum() + 7)

    m, args, points = script(name), tiny(name), []
    nets = m.build(args)
    nets["discriminator"].register_forward_hook(lambda net, x, y: points.append(x[0]))
    logs = m.updates(nets, args, Ops)[0](torch.rand(8, 1, 32, 32))
    assert logs["penalty"] == 7 and (points[1] == 0.5).all()
