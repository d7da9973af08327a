"""icr_gan.py: closed forms, the augmentation, and which term does what to which network."""
import pytest
import torch
from torch import nn

import icr_gan
from icr_gan import augment, consistency, icr_d_loss
from tests.helpers import Recorder, assert_same, states, tiny, trained

OFF = {"lambda_real": 0.0, "lambda_fake": 0.0, "lambda_dis": 0.0, "lambda_gen": 0.0}


# ---- losses


def test_consistency_by_hand():
    a = torch.tensor([0.9, 0.4], requires_grad=True)
    b = torch.tensor([0.7, 0.5], requires_grad=True)
    loss = consistency(a, b, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.025)
    torch.testing.assert_close(a.grad, torch.tensor([0.2, -0.1]))
    torch.testing.assert_close(b.grad, torch.tensor([-0.2, 0.1]))
    assert consistency(a, b, 3.0).item() == pytest.approx(0.075)


def test_consistency_is_a_mean_over_all_elements():
    a, b = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    tiled = [t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (a, b)]
    torch.testing.assert_close(consistency(a, b, 2.0), consistency(*tiled, 2.0))


def test_all_weights_zero_is_the_least_squares_loss_to_the_bit():
    d_out = torch.randn(2, 64)
    loss, terms = icr_d_loss(d_out, 0, 0, 0)
    assert torch.equal(loss, icr_gan.discriminator_loss(*d_out))
    assert torch.equal(terms, torch.stack([loss, *torch.zeros(3)]))


@pytest.mark.parametrize("weights", [(2, 0, 0), (0, 3, 0), (0, 0, 5), (2, 3, 0), (0, 3, 5), (2, 0, 5), (2, 3, 5)])
def test_rows_stand_for_the_terms_that_are_on(weights):
    real, fake, *rest = rows = torch.randn(2 + sum(w > 0 for w in weights), 9, dtype=torch.float64)
    loss, terms = icr_d_loss(rows, *weights)
    want = 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean()
    found = [want]
    for w, against in zip(weights, (real, fake, fake)):
        found.append(((against - rest.pop(0)) ** 2).mean() if w else torch.zeros(()).double())
        want = want + w * found[-1]
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(terms, torch.stack(found))
    assert not terms.requires_grad


def test_gradients_reach_both_sides_of_every_term():
    d_out = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda d: icr_d_loss(d, 2.0, 3.0, 5.0)[0], d_out)
    icr_d_loss(d_out, 2.0, 3.0, 5.0)[0].backward()
    real, fake, t_real, t_fake, near = d_out.detach()
    torch.testing.assert_close(d_out.grad[0], ((real - 1) + 4 * (real - t_real)) / 6)
    torch.testing.assert_close(d_out.grad[1], (fake + 6 * (fake - t_fake) + 10 * (fake - near)) / 6)
    torch.testing.assert_close(d_out.grad[4], -10 * (fake - near) / 6)


def test_a_linear_critic_and_a_shift_give_the_quadratic_form():
    """D(x) = w.x, T a matrix P: L_real = mean (w.(x - P x))^2."""
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    w = torch.randn(16, dtype=torch.float64)
    moved = augment(x, torch.zeros(3, dtype=torch.bool), torch.ones(3).long(), torch.zeros(3).long())
    p = torch.zeros(4, 4, dtype=torch.float64)  # columns move right by one, the first is filled from column 1
    p[0, 1] = p[1, 0] = p[2, 1] = p[3, 2] = 1
    want = ((x - x @ p.T).flatten(1) @ w).square().mean()
    torch.testing.assert_close(consistency(x.flatten(1) @ w, moved.flatten(1) @ w, 1.0), want)


def test_generator_term_of_a_linear_generator():
    """G(z) = A z: E mean_p (sigma A n)^2 = sigma^2 ||A||_F^2 / d."""
    a = torch.randn(12, 5, dtype=torch.float64)
    n = torch.randn(200_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    term = consistency(torch.zeros(len(n), 12).double(), 0.03 * n @ a.T, 1.0)
    assert term.item() == pytest.approx(0.03**2 * a.square().sum().item() / 12, rel=2e-2)


# ---- augmentation


def test_augment_moves_mirrors_and_reflects():
    x = torch.arange(1.0, 5).view(1, 1, 1, 4)

    def row(flip, dx):
        return augment(x, torch.tensor([flip]), torch.tensor([dx]), torch.tensor([0])).flatten().tolist()

    assert row(False, 0) == [1, 2, 3, 4]
    assert row(False, 1) == [2, 1, 2, 3]
    assert row(False, 3) == [4, 3, 2, 1]
    assert row(False, -2) == [3, 4, 3, 2]
    assert row(True, 0) == [4, 3, 2, 1]
    assert row(True, 1) == [3, 4, 3, 2]  # mirrored first, then moved


def test_augment_agrees_with_padding_by_reflection():
    torch.manual_seed(0)
    x = torch.randn(20, 3, 9, 7)
    flip, dx, dy = torch.rand(20) < 0.5, torch.randint(-6, 7, (20,)), torch.randint(-8, 9, (20,))
    out = augment(x, flip, dx, dy)
    for i in range(20):
        one = x[i : i + 1].flip(3) if flip[i] else x[i : i + 1]
        padded = nn.functional.pad(one, (6, 6, 8, 8), mode="reflect")
        assert torch.equal(out[i], padded[0, :, 8 - dy[i] : 17 - dy[i], 6 - dx[i] : 13 - dx[i]])


def test_moves_are_drawn_per_image_within_the_shift():
    args = tiny("icr_gan", flip="on", shift=3)
    flip, dx, dy = icr_gan.draw_moves(400, args, "cpu")
    assert 100 < flip.sum() < 300
    assert set(dx.tolist()) == set(dy.tolist()) == set(range(-3, 4))
    assert not torch.equal(dx, dy)


@pytest.mark.parametrize("dataset, mirrored", [("digits", False), ("mnist", False), ("fashion", True), ("some/folder", True)])
def test_digits_are_not_mirrored(dataset, mirrored):
    flip, _, _ = icr_gan.draw_moves(64, tiny("icr_gan", dataset=dataset), "cpu")
    assert flip.any() == mirrored
    assert not icr_gan.draw_moves(64, tiny("icr_gan", dataset=dataset, flip="off"), "cpu")[0].any()


def test_no_shift_and_no_flip_draw_no_random_number():
    before = torch.get_rng_state()
    flip, dx, dy = icr_gan.draw_moves(8, tiny("icr_gan", shift=0), "cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert not (flip.any() or dx.any() or dy.any())


def test_shift_follows_the_image_size_and_stays_below_it():
    assert [icr_gan.Args(image_size=size).shift for size in (8, 32, 64)] == [1, 1, 2]
    assert icr_gan.Args(shift=0).shift == 0
    with pytest.raises(ValueError, match="shift must be below image_size, 32, got 32"):
        icr_gan.Args(shift=32)


# ---- the update


def recorded(**changes):
    """(nets, calls) of one update of each network."""
    torch.manual_seed(0)
    args = tiny("icr_gan", **changes)
    nets, ops = icr_gan.build(args), Recorder("icr_gan")
    update_d, update_g, _ = icr_gan.updates(nets, args, ops)
    update_d(torch.rand(8, 1, 32, 32))
    update_g()
    return nets, ops.calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_coefficients_zero_is_lsgan_to_the_bit(precision):
    ours, ours_losses = trained("icr_gan", 5, precision=precision, **OFF)
    base, base_losses = trained("lsgan", 5, precision=precision)
    assert_same(states(ours), states(base))
    for a, b in zip(ours_losses, base_losses):
        assert a["loss_d"] == b["loss_d"] and a["loss_g"] == b["loss_g"]


def test_a_term_that_is_on_changes_the_run():
    base = states(trained("icr_gan", 2, **OFF)[0])
    for name in OFF:
        other = states(trained("icr_gan", 2, **(OFF | {name: 1.0}))[0])
        assert any(not torch.equal(base[k], other[k]) for k in base), name


def test_sigma_zero_leaves_bcr_alone():
    bcr = states(trained("icr_gan", 3, lambda_dis=0.0, lambda_gen=0.0)[0])
    assert_same(states(trained("icr_gan", 3, sigma=0.0)[0]), bcr)


@pytest.mark.parametrize(
    "on, rows, augmented, generator_term",
    [
        ({}, 2, 0, False),
        ({"lambda_real": 1.0}, 3, 1, False),
        ({"lambda_real": 1.0, "lambda_fake": 1.0}, 4, 2, False),
        ({"lambda_dis": 1.0, "lambda_gen": 1.0}, 3, 0, True),
        ({"lambda_real": 1.0, "lambda_fake": 1.0, "lambda_dis": 1.0, "lambda_gen": 1.0}, 5, 2, True),
    ],
)
def test_work_of_a_term_that_is_off_is_skipped(on, rows, augmented, generator_term):
    _, calls = recorded(**(OFF | on))
    (d_out,) = [a[0] for name, a in calls if name == "icr_d_loss"]
    assert d_out.shape == (rows, 8)
    assert sum(name == "augment" for name, _ in calls) == augmented
    assert any(name == "consistency" for name, _ in calls) == generator_term


def test_every_set_goes_through_d_in_one_call():
    args = tiny("icr_gan")
    nets = icr_gan.build(args)
    sizes = []
    nets["discriminator"].register_forward_hook(lambda m, x, y: sizes.append(len(x[0])))
    update_d, update_g, _ = icr_gan.updates(nets, args)
    update_d(torch.rand(8, 1, 32, 32))
    update_g()
    assert sizes == [8 + 8 + 3 * 4, 8]  # the terms see half of each


def test_real_and_fake_are_moved_independently_of_each_other():
    _, calls = recorded()
    (_, (_, _, *first)), (_, (_, _, *second)) = [c for c in calls if c[0] == "augment"]
    assert not torch.equal(torch.stack(first), torch.stack(second))
    assert len(first[0].unique()) > 1  # per image, not one draw for the batch


def test_latent_terms_use_the_same_z_and_the_adversarial_one_the_unperturbed():
    torch.manual_seed(0)
    args = tiny("icr_gan", sigma=0.01)
    nets = icr_gan.build(args)
    seen = []
    nets["generator"].register_forward_hook(lambda m, z, y: seen.append(z[0]))
    update_d, update_g, _ = icr_gan.updates(nets, args)
    update_d(torch.rand(8, 1, 32, 32))
    update_g()
    pairs = [both.split([8, 4]) for both in seen]  # each in one batch, so by the same statistics
    (z_d, _), (z_g, _) = pairs
    for z, near in pairs:
        assert (near - z[:4]).std().item() == pytest.approx(0.01, rel=0.4)
        assert z.std().item() == pytest.approx(1, rel=0.4)
    assert (z_d - z_g).abs().max() > 0.5  # D and G draw their own


class Blind(nn.Module):
    """A discriminator that sees nothing, so that the adversarial gradient is 0."""

    def __init__(self):
        super().__init__()
        self.score = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.score + 0 * x.flatten(1).sum(1)


def test_loss_of_g_is_the_adversarial_one_less_the_distance_of_neighbours():
    """At D = 0 the adversarial loss is 1/2, whatever G makes."""
    args, fakes = tiny("icr_gan", lambda_gen=3.0, sigma=0.5), []
    nets = icr_gan.build(args)
    nets["discriminator"].register_forward_hook(lambda net, x, y: 0 * y)
    nets["generator"].register_forward_hook(lambda net, z, y: fakes.append(y.detach()))
    logs = icr_gan.updates(nets, args)[1]()
    fake, near = fakes[0].split([args.batch_size, args.batch_size // 2])
    gen = 3 * (fake[: len(near)] - near).square().mean()
    torch.testing.assert_close(logs["loss_g"], 0.5 - gen)
    torch.testing.assert_close(logs["gen_ratio"], gen / 0.5)


def test_generator_term_pushes_neighbours_apart():
    torch.manual_seed(0)
    args = tiny("icr_gan", lambda_gen=100.0, sigma=0.1, lr=1e-3)
    nets = icr_gan.build(args) | {"discriminator": Blind()}
    g = nets["generator"]
    z = torch.randn(64, 8)
    near = z + 0.1 * torch.randn_like(z)

    def distance():
        with torch.no_grad():
            return (g(z) - g(near)).square().mean().item()

    before = distance()
    _, update_g, _ = icr_gan.updates(nets, args)
    for _ in range(10):
        update_g()
    assert distance() > 1.2 * before


def test_identity_as_transformation_costs_nothing():
    args = tiny("icr_gan", shift=0, lambda_dis=0.0, batch_size=64)
    nets = icr_gan.build(args)
    update_d, _, _ = icr_gan.updates(nets, args)
    logs = update_d(torch.rand(64, 1, 32, 32))
    assert logs["real"] < 1e-10 and logs["fake"] < 1e-10


def test_kernels_on_the_cpu_say_that_they_need_the_interpreter(monkeypatch):
    from common import machine

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        machine.fused(tiny("icr_gan", impl="triton"))
    assert not machine.fused(tiny("icr_gan", impl="auto")) and not machine.fused(tiny("icr_gan", impl="torch"))


def test_no_dropout_in_d():
    assert not any("Dropout" in type(m).__name__ for m in icr_gan.Discriminator().modules())


def test_the_distance_that_g_enlarges_is_taken_in_float32_under_bf16():
    args, ops = tiny("icr_gan", precision="bf16"), Recorder("icr_gan")
    m = icr_gan
    m.updates(m.build(args), args, ops)[1]()
    ((name, (a, b, _)),) = ops.calls
    assert name == "consistency" and a.dtype == b.dtype == torch.float32


def test_a_perfectly_fooled_discriminator_is_no_divergence(monkeypatch):
    m, args = icr_gan, tiny("icr_gan")
    nets = m.build(args)
    nets["discriminator"].forward = lambda x: x.flatten(1).sum(1) * 0 + 1
    logs = m.updates(nets, args)[1]()
    assert logs["loss_g"] < 0 and torch.isfinite(logs["gen_ratio"])


@pytest.mark.parametrize("share, seen", [(1.0, 8), (0.5, 4), (0.25, 2), (0.01, 1)])
def test_terms_see_a_share_of_the_images_and_are_means_over_these(share, seen):
    args, ops = tiny("icr_gan", consistency_share=share, batch_size=8), Recorder("icr_gan")
    nets, inputs, latents = icr_gan.build(args), [], []
    nets["discriminator"].register_forward_hook(lambda net, x, y: inputs.append(len(x[0])))
    nets["generator"].register_forward_hook(lambda net, z, y: latents.append(len(z[0])))
    real = torch.rand(8, 1, 32, 32) * 2 - 1
    update_d, update_g, _ = icr_gan.updates(nets, args, ops)
    logs = update_d(real)
    assert inputs == [16 + 3 * seen] and latents == [8 + seen]
    assert [len(a[0]) for name, a in ops.calls if name == "augment"] == [seen, seen]
    ((d_out, *weights),) = [a for name, a in ops.calls if name == "icr_d_loss"]
    assert d_out.shape == (5, 8) and weights == [10 * 8 / seen, 10 * 8 / seen, 5 * 8 / seen]
    for row, (key, base) in zip(d_out[2:], (("real", 0), ("fake", 1), ("dis", 1))):
        assert torch.equal(row[seen:], d_out[base, seen:]) and not torch.equal(row, d_out[base])
        wanted = (row - d_out[base])[:seen].square().mean()
        assert logs[key].item() == pytest.approx(wanted.item(), rel=1e-5)
    total = logs["lsgan"] + 10 * logs["real"] + 10 * logs["fake"] + 5 * logs["dis"]
    assert logs["loss_d"].item() == pytest.approx(total.item(), rel=1e-5)
    update_g()
    assert inputs[1:] == [8] and latents[1:] == [8 + seen]  # D sees the images of z alone
    ((a, b, _),) = [a for name, a in ops.calls if name == "consistency"]
    assert len(a) == len(b) == seen and not torch.equal(a, b)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_above_zero_and_at_most_one(share):
    with pytest.raises(ValueError, match="consistency_share"):
        icr_gan.Args(consistency_share=share)
