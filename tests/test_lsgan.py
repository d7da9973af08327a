"""lsgan.py: closed forms of methods, gradients, routing, networks."""
import math

import pytest
import torch
from torch import nn

import lsgan
from tests.helpers import trained


@pytest.mark.parametrize("score, d_loss, g_loss", [(0.0, 0.5, 0.5), (0.5, 0.25, 0.125), (1.0, 0.5, 0.0)])
def test_losses_at_constant_scores(score, d_loss, g_loss):
    d = torch.full((5,), score)
    assert lsgan.discriminator_loss(d, d).item() == pytest.approx(d_loss, abs=1e-7)
    assert lsgan.generator_loss(d).item() == pytest.approx(g_loss, abs=1e-7)


def test_targets_a_b_c_stand_where_the_paper_has_them():
    d_real, d_fake = torch.tensor([3.0]), torch.tensor([5.0])
    assert lsgan.discriminator_loss(d_real, d_fake, a=-1.0, b=1.0).item() == 0.5 * 4 + 0.5 * 36
    assert lsgan.generator_loss(d_fake, c=2.0).item() == 0.5 * 9


def test_gradients_of_the_losses():
    d_real = torch.tensor([1.0, 0.3], requires_grad=True)
    d_fake = torch.tensor([0.0, 0.8], requires_grad=True)
    lsgan.discriminator_loss(d_real, d_fake).backward()
    torch.testing.assert_close(d_real.grad, torch.tensor([0.0, -0.35]))
    torch.testing.assert_close(d_fake.grad, torch.tensor([0.0, 0.4]))
    d_fake.grad = None
    lsgan.generator_loss(d_fake).backward()
    torch.testing.assert_close(d_fake.grad, torch.tensor([-0.5, -0.1]))


def test_confident_scores_keep_their_gradient():
    d = torch.tensor([3.0, 3.0], requires_grad=True)  # a sigmoid before the loss could not reach 3
    lsgan.generator_loss(d).backward()
    torch.testing.assert_close(d.grad, torch.tensor([1.0, 1.0]))


def test_vanilla_losses_at_zero_and_at_a_confident_discriminator():
    zero = torch.zeros(4)
    assert lsgan.vanilla_discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert lsgan.vanilla_generator_loss(zero).item() == pytest.approx(math.log(2))
    d = torch.tensor([-5.0], requires_grad=True)
    lsgan.vanilla_generator_loss(d).backward()  # the saturating form would leave 0.0067 here
    assert d.grad.item() == pytest.approx(-0.9933071, abs=1e-6)
    assert lsgan.vanilla_discriminator_loss(torch.tensor([1e4]), torch.tensor([1e4])).item() == 1e4


def test_vanilla_tells_real_from_fake():
    real, fake = torch.tensor([4.0]), torch.tensor([-4.0])
    assert lsgan.vanilla_discriminator_loss(real, fake) < 0.1 < lsgan.vanilla_discriminator_loss(fake, real)


@pytest.mark.parametrize("loss", ["lsgan", "vanilla"])
def test_losses_are_means_over_the_batch(loss):
    d = {"lsgan": lsgan.discriminator_loss, "vanilla": lsgan.vanilla_discriminator_loss}[loss]
    g = {"lsgan": lsgan.generator_loss, "vanilla": lsgan.vanilla_generator_loss}[loss]
    a, b = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    order = torch.randperm(7)
    torch.testing.assert_close(d(a, b), d(torch.cat([a, a]), torch.cat([b, b])))
    torch.testing.assert_close(d(a, b), d(a[order], b[order.flip(0)]))
    torch.testing.assert_close(g(b), g(torch.cat([b, b])))


def test_vanilla_and_the_targets_reach_the_update():
    base = trained("lsgan", 1)[1][0]
    assert trained("lsgan", 1, loss="vanilla")[1][0]["loss_d"] != base["loss_d"]
    other = trained("lsgan", 1, a=-1.0, c=0.0)[1][0]
    assert other["loss_d"] != base["loss_d"] and other["loss_g"] != base["loss_g"]


def test_other_targets_beside_vanilla_are_bad_input():
    with pytest.raises(ValueError, match="vanilla"):
        lsgan.Args(loss="vanilla", a=-1.0)


def test_the_best_discriminator_is_that_of_the_paper():
    """Two points with p_d = (3/4, 1/4), p_g = (1/4, 3/4): D* = (b p_d + a p_g) / (p_d + p_g)."""
    score = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimiser = torch.optim.SGD([score], 0.5)
    for _ in range(200):
        optimiser.zero_grad()
        lsgan.discriminator_loss(score[[0, 0, 0, 1]], score[[0, 1, 1, 1]], a=-1.0, b=2.0).backward()
        optimiser.step()
    assert score.tolist() == pytest.approx([1.25, -0.25])


def test_width_counts_channels_at_the_widest_resolution():
    g, d = lsgan.Generator(7, 1, 32, 16), lsgan.Discriminator(1, 32, 16)
    assert [m.in_channels for m in g.modules() if isinstance(m, nn.ConvTranspose2d)] == [64, 32, 16]
    assert [m.out_channels for m in d.modules() if isinstance(m, nn.Conv2d)] == [16, 32, 64]


def test_batch_norm_has_its_usual_eps_and_momentum():
    for m in lsgan.Generator().modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.eps, m.momentum) == (1e-5, 0.1)


def test_spectral_norm_leaves_every_layer_of_d_with_largest_singular_value_one():
    torch.manual_seed(0)
    d = lsgan.Discriminator(1, 32, 4)
    for _ in range(200):
        d(torch.zeros(1, 1, 32, 32))
    for layer in [m for m in d.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


def test_ema_starts_fast_and_copies_buffers():
    g, ema = lsgan.Generator(4, 1, 8, 4), lsgan.Generator(4, 1, 8, 4)
    before = [p.clone() for p in ema.parameters()]
    g(torch.randn(6, 4))
    lsgan.update_ema(ema, g, torch.tensor(0.75))
    for e, p, old in zip(ema.parameters(), g.parameters(), before):
        torch.testing.assert_close(e, 0.75 * old + 0.25 * p)
    for e, b in zip(ema.buffers(), g.buffers()):
        assert torch.equal(e, b)
