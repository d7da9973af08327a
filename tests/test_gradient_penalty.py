"""kernels/gradient_penalty.py against float64, at the kinks, in every layout, through a critic."""
from importlib import import_module

import pytest
import torch
from torch import nn

import kernels
from kernels import gradient_penalty, interpolate
from tests.kernel_helpers import (
    HALVES, captured, error, guarded, launches, no_worse, programs_from, vast, views,
)  # fmt: skip
from tests.sync import no_sync

pytest.importorskip("triton")
P = import_module("kernels.gradient_penalty")
pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1, 1), (7, 1), (1, 13), (3, 5, 7), (2, 4096), (2, 4097), (1, 3, 61, 67), (5, 1, 32, 32), (130, 3)]


def gradients(shape, device, target=1.0, near=False, seed=0):
    """Rows with norms 10 % and more away from target, or within 0.1 % of it."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    r = torch.rand(shape[0], generator=g)
    scale = 1 + (r - 0.5) * 2e-3 if near else torch.where(r < 0.5, 0.3 + 1.2 * r, 0.6 + r)
    scale = scale * target / x.flatten(1).norm(dim=1)
    return (x * scale.view(-1, *[1] * (len(shape) - 1))).to(device)


def value_and_gradient(fn, g, up=1.0, **kwargs):
    g = g.detach().requires_grad_()
    loss = fn(g, **kwargs)
    loss.backward(torch.full_like(loss, up))
    return loss.detach(), g.grad


def by_torch(g, target=1.0):
    """The formula at the precision of g, as eager code would have it."""
    return (g.flatten(1).norm(2, dim=1) - target).square().mean()


def test_the_kernels_are_what_is_tested(device):
    assert P.fused(torch.ones(2, 2, device=device))
    out = gradient_penalty(torch.ones(2, 2, device=device, requires_grad=True))
    assert "kernels_gradient_penalty" in out.grad_fn.name()


# ---- gradient_penalty ------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_penalty_matches_float64(shape, target, device):
    g = gradients(shape, device, target or 1.0)
    loss, grad = value_and_gradient(gradient_penalty, g, up=-1.7, target=target)
    loss64, grad64 = value_and_gradient(P.gradient_penalty_ref, g.double(), up=-1.7, target=target)
    assert loss.dtype == grad.dtype == torch.float32 and loss.shape == ()
    assert error(loss, loss64) <= 1e-6 and error(grad, grad64) <= 1e-6


def test_long_rows_are_split_among_programs_and_steps(device, monkeypatch):
    monkeypatch.setattr(P, "BLOCK", 64)
    monkeypatch.setattr(P, "PROGRAMS", 8)
    for n, d in ((1, 1000), (3, 1000), (3, 1024), (2, 64 * 9 + 1)):
        block, _, steps, s = P.split(n, d)
        assert steps > 1 and s > 1 and steps * s * block >= d
        g = gradients((n, d), device)
        loss, grad = value_and_gradient(gradient_penalty, g)
        loss64, grad64 = value_and_gradient(P.gradient_penalty_ref, g.double())
        assert error(loss, loss64) <= 1e-6 and error(grad, grad64) <= 1e-6


def test_many_rows_are_finished_in_trips(device):
    trips, rows, cols = P.finish_plan(5000, 1)
    assert (trips, rows, cols) == (2, 4096, 1)
    part = torch.rand(5000, device=device) + 2
    coef, loss = torch.empty(5000, device=device), torch.empty((), device=device)
    P._finish[(1,)](part, loss, coef, 1.0, 5000, 1, TRIPS=trips, ROWS=rows, COLS=cols)
    off = part.double().sqrt() - 1
    assert error(loss, off.square().mean()) <= 1e-6
    assert error(coef, 2 * off / (part.double().sqrt() * 5000)) <= 1e-6


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_penalty_is_no_worse_than_twice_torchs_own_error(dtype, near, device):
    ours, torchs, exact = [], [], []
    for seed in range(6):  # one loss is one number, right by luck or not: compare several
        g = gradients((64, 1, 16, 32), device, near=near, seed=seed).to(dtype)
        ours.append(value_and_gradient(gradient_penalty, g, up=1.5))
        torchs.append(value_and_gradient(by_torch, g, up=1.5))
        exact.append(value_and_gradient(P.gradient_penalty_ref, g.double(), up=1.5))
        assert ours[-1][0].dtype == torch.float32 and ours[-1][1].dtype == dtype
    for results in zip(*(zip(*r) for r in (ours, torchs, exact))):  # values, then gradients
        assert no_worse(*map(torch.stack, results))


def test_zero_rows_have_value_target_squared_and_gradient_0(device):
    g = gradients((3, 5), device)
    g[1] = 0
    loss, grad = value_and_gradient(gradient_penalty, g, target=0.5)
    loss64, grad64 = value_and_gradient(P.gradient_penalty_ref, g.double(), target=0.5)
    assert (grad[1] == 0).all() and error(loss, loss64) <= 1e-6 and error(grad, grad64) <= 1e-6
    loss, grad = value_and_gradient(gradient_penalty, torch.zeros(4, 3, device=device), target=3.0)
    assert loss == 9 and (grad == 0).all()
    loss, grad = value_and_gradient(gradient_penalty, torch.full((4, 3), 1e-30, device=device))
    assert loss == 1 and (grad == 0).all()  # the squares vanish: see the docstring


def test_penalty_by_hand(device):
    g = torch.tensor([[3.0, 4.0], [0.6, 0.8]], device=device)
    loss, grad = value_and_gradient(gradient_penalty, g)
    assert loss.item() == pytest.approx(8)
    torch.testing.assert_close(grad, torch.tensor([[2.4, 3.2], [0.0, 0.0]], device=device))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_gives_nan_out_in_its_row(bad, device):
    g = gradients((3, 5000), device)
    g[1, 4999] = bad
    loss, grad = value_and_gradient(gradient_penalty, g)
    loss32, grad32 = value_and_gradient(P.gradient_penalty_ref, g)
    torch.testing.assert_close(loss, loss32, equal_nan=True)
    torch.testing.assert_close(grad, grad32, equal_nan=True)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_penalty_takes_every_layout(device):
    for view in views(torch.empty(4, 3, 5, 6, device=device)):
        got = value_and_gradient(gradient_penalty, view)
        want = value_and_gradient(P.gradient_penalty_ref, view.double())
        assert error(got[0], want[0]) <= 1e-6 and error(got[1], want[1]) <= 1e-6
    g = torch.randn(4, 3, 5, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(gradient_penalty(g), g)
    assert grad.is_contiguous(memory_format=torch.channels_last)  # served in place, not copied


def test_penalty_reads_its_input_only_and_leaves_it_as_it_was(device):
    for shape in ((1, 1), (3, 5), (2, 4097)):
        g = guarded(gradients(shape, device))
        before = g.clone()
        got = value_and_gradient(gradient_penalty, g)
        want = value_and_gradient(gradient_penalty, before)
        assert torch.equal(g, before)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_kernels_write_their_outputs_only(device):
    g = gradients((3, 37), device)
    whole = torch.full((64 + 111 + 64,), 7.0, device=device)
    coef, up = torch.ones(3, device=device), torch.ones((), device=device)
    P._scale_rows[(6,)](g, coef, up, whole[64:-64], 37, 2, BLOCK=32)
    assert torch.equal(whole[64:-64].view(3, 37), g)
    P._interpolate[(6,)](g, g, coef, whole[64:-64], 37, 2, BLOCK=32)
    P._sum_squares[(6,)](g, whole[64:70], 37, 2, STEPS=1, BLOCK=32)
    P._finish[(1,)](whole[64:70], up, whole[70:73], 1.0, 3, 2, TRIPS=1, ROWS=4, COLS=2)
    assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()
    assert torch.equal(whole[73:-64], g.flatten()[9:])


def test_two_calls_give_equal_bits(device):
    g = gradients((5, 3, 40, 40), device)
    one, two = (value_and_gradient(gradient_penalty, g) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("term", [lambda g: 0, lambda g: g.pow(3).sum()])
@pytest.mark.parametrize("constant", [True, False])
def test_a_second_derivative_raises(constant, term, device):
    g = gradients((3, 5), device).requires_grad_()
    penalty = gradient_penalty(g)
    loss = (penalty if constant else penalty.square()) + term(g)
    (first,) = torch.autograd.grad(loss, g, create_graph=True)
    assert first.requires_grad  # a silent constant would drop the second order without a word
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.sum().backward()


def critic(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(32, 1)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_parameters_of_a_critic_get_the_plain_gradients(memory_format, device):
    grads = []
    for penalty, line in ((gradient_penalty, interpolate), (P.gradient_penalty_ref, P.interpolate_ref)):
        d = critic().to(device, memory_format=memory_format)
        torch.manual_seed(1)
        real, fake = torch.randn(2, 8, 3, 8, 8).to(device)
        x = line(real.to(memory_format=memory_format), fake, torch.rand(8).to(device)).requires_grad_()
        (g,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        loss = d(fake).mean() - d(real).mean() + 10 * penalty(g)
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in d.parameters()]))
    assert error(grads[0], grads[1]) <= 1e-6


def test_no_host_sync(device):
    g = gradients((4, 3, 8, 8), device).requires_grad_()
    real, fake, eps = g.detach(), -g.detach(), torch.rand(4, device=device)
    gradient_penalty(g).backward()
    with no_sync():
        gradient_penalty(g).backward()
        gradient_penalty(g.detach().to(memory_format=torch.channels_last))
        interpolate(real, fake, eps)


def test_launches_are_as_few_as_the_docstring_says(device, monkeypatch):
    g = gradients((4, 3, 8, 8), device).requires_grad_()
    up, eps = torch.ones((), device=device), torch.rand(4, device=device)
    fused = launches(lambda: torch.autograd.grad(gradient_penalty(g), g, up), monkeypatch)
    eager = launches(lambda: torch.autograd.grad(P.gradient_penalty_ref(g), g, up), monkeypatch)
    assert fused == 3 and eager >= 12
    assert launches(lambda: interpolate(g, g, eps), monkeypatch) == 1


def test_indices_pass_2_to_the_31(device, monkeypatch):
    d = 2**30 + 64
    x = vast(2 * d + 4096, torch.bfloat16, device)
    x[2 * d : 2 * d + 64] = torch.arange(64)
    x[2**31 : 2**31 + 64] = 3
    coef, up = torch.tensor([1.0, 1.0, 2.0], device=device), torch.ones((), device=device)
    part = torch.empty(3, device=device)
    P._sum_squares[(3,)](x, part, d, 1, STEPS=1, BLOCK=64)
    assert part.tolist() == [0, 0, sum(i * i for i in range(64))]
    P._scale_rows[(3,)](x, coef, up, x, d, 1, BLOCK=64)
    assert torch.equal(x[2 * d : 2 * d + 64].float().cpu(), 2.0 * torch.arange(64))
    P._interpolate[(3,)](x, x, torch.full((3,), 0.5, device=device), x, d, 1, BLOCK=64)
    assert torch.equal(x[2 * d : 2 * d + 64].float().cpu(), 2.0 * torch.arange(64))
    if device == "cpu":  # one row of that length, begun at a late program
        d, first = 2 * d + 64, 2**31 // 64
        with programs_from(first, monkeypatch):
            P._scale_rows[(1,)](x, 2 * coef, up, x, d, first + 4, BLOCK=64)
            far = vast(first + 4, torch.float32, device)
            P._sum_squares[(1,)](x, far, d, first + 4, STEPS=1, BLOCK=64)
        assert (x[2**31 : 2**31 + 64] == 6).all() and far[first] == 36 * 64
        with programs_from(first // 2, monkeypatch):
            P._sum_squares[(1,)](x, far, d, first // 2 + 2, STEPS=2, BLOCK=64)
        assert far[first // 2] == 36 * 64
        with programs_from(first, monkeypatch):
            P._interpolate[(1,)](x, vast(len(x), x.dtype, device), coef / 2, x, d, first + 4, BLOCK=64)
        assert (x[2**31 : 2**31 + 64] == 3).all()


def test_float64_and_empty_tensors_take_the_reference(device):
    g = gradients((3, 5), device).double()
    assert torch.equal(gradient_penalty(g), P.gradient_penalty_ref(g))
    assert torch.equal(interpolate(g, -g, g[:, 0]), P.interpolate_ref(g, -g, g[:, 0]))
    assert gradient_penalty(torch.empty(0, 3, device=device)).isnan()
    assert interpolate(*torch.empty(2, 0, 3, device=device), torch.empty(0, device=device)).shape == (0, 3)


def test_wrong_arguments_raise():
    x = torch.ones(3, 4)
    for bad in (torch.ones(3), torch.ones(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="need floating"):
            gradient_penalty(bad)
    for bad in ((x, x[:2], x[:, 0]), (x, x.half(), x[:, 0]), (x, x, x[:2, 0]), (x, x, x[:, :1])):
        with pytest.raises(ValueError, match="need two equal"):
            interpolate(*bad)


# ---- interpolate -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_interpolate_matches_float64(shape, dtype, device):
    torch.manual_seed(0)
    real, fake = torch.randn(2, *shape).to(device, dtype)
    eps = torch.rand(shape[0]).to(device)
    got = interpolate(real.requires_grad_(), fake, eps)
    exact = P.interpolate_ref(real.double(), fake.double(), eps.double())
    assert got.dtype == dtype and not got.requires_grad and got.shape == real.shape
    assert error(got, exact) <= 1e-6 or no_worse(got, P.interpolate_ref(real, fake, eps), exact)


def test_interpolate_draws_one_line_per_sample_from_real_to_fake(device):
    real, fake = torch.ones(3, 2, 5, device=device), torch.zeros(3, 2, 5, device=device)
    eps = torch.tensor([1.0, 0.0, 0.25], device=device)
    assert torch.equal(interpolate(real, fake, eps), eps[:, None, None].expand(3, 2, 5))


def test_interpolate_takes_every_layout(device):
    eps = torch.rand(8, device=device)[::2]
    other = torch.randn(4, 3, 5, 6, device=device)
    for view in views(other):
        for pair in ((view, other), (other, view), (view, view)):
            torch.testing.assert_close(interpolate(*pair, eps), P.interpolate_ref(*pair, eps))
    last = other.to(memory_format=torch.channels_last)
    assert interpolate(last, last, eps).is_contiguous(memory_format=torch.channels_last)


def test_interpolate_passes_nan_on(device):
    real, fake = torch.randn(2, 3, 7, device=device)
    real[0, 2] = fake[1, 6] = float("nan")
    out = interpolate(real, fake, torch.rand(3, device=device))
    assert torch.equal(out.isnan(), real.isnan() | fake.isnan())


# ---- scripts and graphs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wgan_gp", "cn_lsgan"])
def test_references_equal_the_scripts_functions(name):
    script = import_module(name)
    real, fake, g = torch.randn(3, 8, 1, 8, 8)
    g[3] = 0
    eps = torch.rand(8)
    torch.testing.assert_close(script.interpolate(real, fake, eps), P.interpolate_ref(real, fake, eps))
    ours, theirs = (value_and_gradient(f, g) for f in (P.gradient_penalty_ref, script.gradient_penalty))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["wgan_gp", "cn_lsgan"])
def test_updates_of_the_scripts_get_the_plain_gradients(name, channels, device):
    script = import_module(name)
    args = script.Args(width=4, z_dim=8, batch_size=8, channels=channels, precision="fp32", device=device)
    results = []
    for ops in (kernels, None):
        torch.manual_seed(0)
        nets = script.build(args)
        real = torch.rand(8, channels, 32, 32, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1
        losses = script.updates(nets, args, ops)[0](real)
        grads = [p.grad.flatten() for n in nets.values() for p in n.parameters() if p.grad is not None]
        results.append((torch.stack([losses[k] for k in sorted(losses)]), torch.cat(grads)))
    assert error(results[0][0], results[1][0]) <= 1e-5 and error(results[0][1], results[1][1]) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_of_a_captured_penalty_equals_eager(dtype, device):
    d = critic().to(device)
    real, fake = torch.randn(2, 64, 3, 8, 8, device=device)
    eps = torch.rand(64, device=device)

    def step():
        x = interpolate(real.to(dtype), fake.to(dtype), eps).float().requires_grad_()
        (g,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        loss = gradient_penalty(g.to(dtype))
        return loss.detach(), *torch.autograd.grad(10 * loss, [d[0].weight, d[5].weight])

    replay, out = captured(step)
    for seed in range(3):
        torch.manual_seed(seed)
        real.normal_(), fake.normal_(), eps.uniform_()
        replay()
        for got, want in zip(out, step()):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
def test_compiled_caller_equals_eager(device):
    g = gradients((16, 3, 32, 32), device)
    fn = torch.compile(lambda x: 10 * gradient_penalty(x * 1.5), fullgraph=True)
    for got, want in zip(value_and_gradient(fn, g), value_and_gradient(lambda x: 10 * gradient_penalty(x * 1.5), g)):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    g = torch.randn(2, 2**30 + 64, dtype=torch.bfloat16, device=device)
    loss, grad = value_and_gradient(gradient_penalty, g)
    norms = torch.stack([sum(c.double().square().sum() for c in row.split(2**26)) for row in g]).sqrt()
    assert error(loss, (norms - 1).square().mean()) <= 1e-5
    tail = (norms[1] - 1) / norms[1] * g[1, -1000:].double()
    assert error(grad[1, -1000:], tail) <= 5e-3
