"""kernels/consistency.py against float64, at the kinks, in every layout, through icr_gan."""
import itertools
from importlib import import_module

import pytest
import torch

import kernels
from kernels import consistency, icr_d_loss
from tests.kernel_helpers import (
    HALVES, captured, error, guarded, launches, no_worse, programs_from, vast, views,
)  # fmt: skip
from tests.sync import no_sync

pytest.importorskip("triton")
C = import_module("kernels.consistency")
pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1,), (1, 1), (3, 5, 7), (4096,), (4097,), (1, 3, 61, 67), (5, 1, 32, 32)]
WEIGHTS = list(itertools.product((0, 10.0), (0, 3), (0, 0.5)))


def pair(shape, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn((2, *shape), generator=g).to(device, dtype)
    return a, b


def value_and_gradients(fn, *tensors, up=1.0, **kwargs):
    tensors = [t.detach().requires_grad_() for t in tensors]
    loss = fn(*tensors, **kwargs)
    loss.backward(torch.full_like(loss, up))
    return loss.detach(), *[t.grad for t in tensors]


def by_torch(a, b, weight):
    """The formula at the precision of a and b, as eager code would have it."""
    return weight * (a - b).square().mean()


def scores(weights, n, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2 + sum(map(bool, weights)), n, generator=g).to(device, dtype)


def icr(d_out, weights, fn=icr_d_loss, up=1.0):
    """Loss, terms, gradient."""
    d_out = d_out.detach().requires_grad_()
    loss, terms = fn(d_out, *weights)
    loss.backward(torch.full_like(loss, up))
    return loss.detach(), terms, d_out.grad


def test_the_kernels_are_what_is_tested(device):
    a = torch.ones(5, 3, device=device, requires_grad=True)
    assert "kernels_consistency" in consistency(a, a.detach(), 1.0).grad_fn.name()
    assert "kernels_icr_d_loss" in icr_d_loss(a, 1, 1, 1)[0].grad_fn.name()


# ---- consistency -----------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1, 0.3, -2.0, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_consistency_matches_float64(shape, weight, device):
    a, b = pair(shape, device)
    got = value_and_gradients(consistency, a, b, up=-1.7, weight=weight)
    exact = value_and_gradients(C.consistency_ref, a.double(), b.double(), up=-1.7, weight=weight)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[0].shape == ()
    for g, e in zip(got, exact):
        assert error(g, e) <= 1e-6 if weight else (g == 0).all()


def test_many_elements_are_split_among_programs_and_steps(device, monkeypatch):
    monkeypatch.setattr(C, "BLOCK", 64)
    monkeypatch.setattr(C, "PROGRAMS", 4)
    for m in (1000, 1024, 64 * 9 + 1):
        block, _, steps, p = C.split(m)
        assert steps > 1 and p > 1 and steps * p * block >= m
        a, b = pair((m,), device)
        got = value_and_gradients(consistency, a, b, weight=2.0)
        exact = value_and_gradients(C.consistency_ref, a.double(), b.double(), weight=2.0)
        assert all(error(g, e) <= 1e-6 for g, e in zip(got, exact))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_consistency_is_no_worse_than_twice_torchs_own_error(dtype, device):
    ours, torchs, exact = [], [], []
    for seed in range(4):  # one loss is one number, right by luck or not: compare several
        a, b = pair((8, 1, 16, 33), device, dtype, seed)
        b = (a + 0.01 * b).to(dtype)  # near to one another, as G(z) and G(z + sigma n) are
        ours.append(value_and_gradients(consistency, a, b, up=1.5, weight=0.5))
        torchs.append(value_and_gradients(by_torch, a, b, up=1.5, weight=0.5))
        exact.append(value_and_gradients(C.consistency_ref, a.double(), b.double(), up=1.5, weight=0.5))
        assert ours[-1][0].dtype == torch.float32 and ours[-1][1].dtype == ours[-1][2].dtype == dtype
    for results in zip(*(zip(*r) for r in (ours, torchs, exact))):  # values, then gradients
        assert no_worse(*map(torch.stack, results))


def test_consistency_by_hand(device):
    a, b = torch.tensor([0.9, 0.4], device=device), torch.tensor([0.7, 0.5], device=device)
    loss, da, db = value_and_gradients(consistency, a, b, weight=1.0)
    assert loss.item() == pytest.approx(0.025)
    torch.testing.assert_close(da, torch.tensor([0.2, -0.1], device=device))
    assert torch.equal(db, -da)


def test_ties_have_value_and_gradient_0(device):
    a, b = pair((3, 50), device)
    b[:, ::2] = a[:, ::2]
    _, da, db = value_and_gradients(consistency, a, b, weight=3.0)
    assert (da[:, ::2] == 0).all() and (db[:, ::2] == 0).all() and (da[:, 1::2] != 0).all()
    for result in value_and_gradients(consistency, a, a.clone(), weight=3.0):  # sigma = 0
        assert (result == 0).all()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)])
def test_gradients_go_where_they_are_needed(needs, device):
    a, b = (t.requires_grad_(need) for t, need in zip(pair((3, 5), device), needs))
    loss = consistency(a, b, 2.0)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    want = 4 * (a - b).detach() / 15
    for t, need, sign in ((a, needs[0], 1), (b, needs[1], -1)):
        assert (t.grad is None) == (not need)
        if need:
            torch.testing.assert_close(t.grad, sign * want)


def test_one_tensor_on_both_sides_gets_the_sum_of_its_gradients(device):
    a = pair((3, 5), device)[0].requires_grad_()
    (consistency(a, a, 2.0) + consistency(a, 2 * a, 1.0)).backward()
    torch.testing.assert_close(a.grad, 2 * a.detach() / 15)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_gives_nan_out_where_it_is(side, device):
    images = pair((3, 50), device)
    images[side][2, 49] = float("nan")
    loss, *grads = value_and_gradients(consistency, *images, weight=1.0)
    assert loss.isnan() and all(torch.equal(g.isnan(), images[side].isnan()) for g in grads)


def test_consistency_takes_every_layout(device):
    other = torch.randn(4, 3, 5, 6, device=device)
    for view, twin in zip(views(other), views(other)):
        for a, b in ((view, other), (other, view), (view, twin)):
            got = value_and_gradients(consistency, a, b, weight=2.0)
            exact = value_and_gradients(C.consistency_ref, a.double(), b.double(), weight=2.0)
            assert all(error(g, e) <= 1e-6 for g, e in zip(got, exact))
    a = other.to(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(consistency(a, (2 * a).detach(), 1.0), a)
    assert grad.is_contiguous(memory_format=torch.channels_last)  # served in place, not copied


def test_inputs_alone_are_read_and_left_as_they_were(device):
    for shape in ((1,), (3, 5), (4097,)):
        a, b = map(guarded, pair(shape, device))
        before = a.clone(), b.clone()
        got = value_and_gradients(consistency, a, b, weight=2.0)
        want = value_and_gradients(consistency, *before, weight=2.0)
        assert torch.equal(a, before[0]) and torch.equal(b, before[1])
        assert all(torch.equal(g, w) for g, w in zip(got, want))
    for n in (1, 7, 1025):
        d_out = guarded(scores((1, 1, 1), n, device))
        before = d_out.clone()
        got, want = icr(d_out, (1, 1, 1)), icr(before, (1, 1, 1))
        assert torch.equal(d_out, before) and all(torch.equal(g, w) for g, w in zip(got, want))


def test_kernels_write_their_outputs_only(device):
    a, b = pair((100,), device)
    up = torch.ones((), device=device)
    whole = torch.full((64 + 200 + 64,), 7.0, device=device)
    C._grad_diff[(4,)](a, b, up, whole[64:], whole[164:], 0.5, 100, BOTH=True, BLOCK=32)
    torch.testing.assert_close(whole[64:-64], torch.cat([a - b, b - a]) / 2)
    assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()
    C._grad_diff[(4,)](a, b, up, whole[64:], whole, 1.0, 100, BOTH=False, BLOCK=32)
    torch.testing.assert_close(whole[64:-64], torch.cat([a - b, (b - a) / 2]))
    C._sum_diff[(4,)](a, b, whole[64:], 1.0, 100, STEPS=1, BLOCK=32)
    C._add_up[(1,)](whole[64:68], whole[68:], 4, BLOCK=4)
    torch.testing.assert_close(whole[68], (a - b).square().sum())
    d_out = scores((1, 1, 1), 20, device)
    C._icr[(1,)](d_out, whole[69:], whole[70:], 1.0, 1.0, 1.0, 20, True, True, True, TRIPS=1, BLOCK=32)
    torch.testing.assert_close(whole[70:74], C.icr_d_loss_ref(d_out, 1, 1, 1)[1])
    torch.testing.assert_close(whole[74:-64], torch.cat([(a - b)[10:], (b - a) / 2]))
    C._icr_grad[(2,)](d_out, up, whole[64:], 1.0, 1.0, 1.0, 20, True, True, True, BLOCK=16)
    torch.testing.assert_close(whole[164:-64], (b - a) / 2)
    assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()


# ---- icr_d_loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 64, 1024, 1025, 2100])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_icr_matches_float64(weights, n, device):
    d_out = scores(weights, n, device)
    loss, terms, grad = icr(d_out, weights, up=-1.7)
    exact = icr(d_out.double(), weights, C.icr_d_loss_ref, up=-1.7)
    assert loss.shape == () and terms.shape == (4,) and not terms.requires_grad
    assert loss.dtype == terms.dtype == grad.dtype == torch.float32
    assert error(loss, exact[0]) <= 1e-6 and error(grad, exact[2]) <= 1e-6
    for term, want, weight in zip(terms, exact[1], (1, *weights)):
        assert error(term, want) <= 1e-6 if weight else term == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_icr_is_no_worse_than_twice_torchs_own_error(weights, dtype, device):
    def by_torch(d_out, *weights):
        d_real, d_fake, *rest = d_out
        loss = 0.5 * (d_real - 1).square().mean() + 0.5 * d_fake.square().mean()
        for base, weight in zip((d_real, d_fake, d_fake), weights):
            if weight:
                loss = loss + weight * (base - rest.pop(0)).square().mean()
        return loss, loss

    ours, torchs, exact = [], [], []
    for seed in range(4):
        d_out = scores(weights, 130, device, dtype, seed)
        ours.append(icr(d_out, weights)[::2])
        torchs.append(icr(d_out, weights, by_torch)[::2])
        exact.append(icr(d_out.double(), weights, C.icr_d_loss_ref)[::2])
        assert ours[-1][0].dtype == torch.float32 and ours[-1][1].dtype == dtype
    for results in zip(*(zip(*r) for r in (ours, torchs, exact))):
        assert no_worse(*map(torch.stack, results))


def test_icr_by_hand(device):
    d_out = torch.tensor([[0.9, 0.4], [0.0, 1.0], [0.7, 0.5], [0.5, 0.5], [0.0, 0.0]], device=device)
    loss, terms, grad = icr(d_out, (1, 2, 4))
    want = [0.5 * (0.01 + 0.36) / 2 + 0.25, 0.025, 0.25, 0.5]
    torch.testing.assert_close(terms, torch.tensor(want, device=device))
    assert loss.item() == pytest.approx(want[0] + want[1] + 2 * want[2] + 4 * want[3])
    torch.testing.assert_close(grad[2:], torch.tensor([[-0.2, 0.1], [1.0, -1.0], [0.0, -4.0]], device=device))
    torch.testing.assert_close(grad[:2], torch.tensor([[0.15, -0.4], [-1.0, 5.5]], device=device))


def test_icr_ties_have_term_and_gradient_0(device):
    d_out = scores((0, 0, 0), 37, device)[[0, 1, 0, 1, 1]]
    loss, terms, grad = icr(d_out, (10, 10, 5))
    base = icr(d_out[:2], (0, 0, 0))
    assert (terms[1:] == 0).all() and (grad[2:] == 0).all()
    assert torch.equal(loss, base[0]) and torch.equal(grad[:2], base[2])


def test_icr_leaves_out_what_is_off(device):
    d_out = scores((0, 1, 0), 9, device)
    d_out[1, 4] = float("inf")
    _, terms, _ = icr(d_out, (0, 1, 0))
    assert terms[1] == 0 and terms[3] == 0  # 0 * inf would be NaN


@pytest.mark.parametrize("row", range(5))
def test_icr_passes_nan_on(row, device):
    d_out = scores((1, 1, 1), 37, device)
    d_out[row, 36] = float("nan")
    loss, terms, grad = icr(d_out, (1, 1, 1))
    want = icr(d_out, (1, 1, 1), C.icr_d_loss_ref)
    assert loss.isnan() and torch.equal(terms.isnan(), want[1].isnan())
    assert grad[row, 36].isnan() and torch.equal(grad.isnan(), want[2].isnan())


def test_icr_takes_every_layout(device):
    wide = scores((1, 1, 1), 40, device)
    for view in (wide[:, ::2], wide.t()[:5].t(), wide[:, 3:], wide[:1].expand(5, 40), wide.flip(0)[[4, 2, 0, 1, 3]]):
        got, exact = icr(view, (1, 2, 3)), icr(view.double(), (1, 2, 3), C.icr_d_loss_ref)
        assert error(got[0], exact[0]) <= 1e-6 and error(got[2], exact[2]) <= 1e-6


# ---- both ------------------------------------------------------------------------------------


def test_two_calls_give_equal_bits(device):
    a, b = pair((5, 3, 40, 40), device)
    one, two = (value_and_gradients(consistency, a, b, weight=2.0) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two))
    d_out = scores((1, 1, 1), 1500, device)
    assert all(torch.equal(x, y) for x, y in zip(icr(d_out, (1, 2, 3)), icr(d_out, (1, 2, 3))))


@pytest.mark.parametrize("term", [lambda x: 0, lambda x: x.pow(3).sum()])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: consistency(x, 2 * x, 1.0),
        lambda x: consistency(x, x.detach() + 1, 1.0),
        lambda x: consistency(x.detach() + 1, x, 1.0),
        lambda x: icr_d_loss(x, 1, 1, 1)[0],
        lambda x: icr_d_loss(x[:2], 0, 0, 0)[0],
    ],
)
def test_a_second_derivative_raises(fn, constant, term, device):
    x = scores((1, 1, 1), 6, device).requires_grad_()
    loss = (fn(x) if constant else fn(x).square()) + term(x)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert first.requires_grad  # a silent constant would drop the second order without a word
    with pytest.raises(RuntimeError, match="first derivative only"):
        first.sum().backward()


def test_no_host_sync(device):
    a, b = (t.requires_grad_() for t in pair((4, 3, 8, 8), device))
    d_out = scores((1, 1, 1), 16, device).requires_grad_()

    def step():
        loss, terms = icr_d_loss(d_out, 1, 2, 3)
        (consistency(a, b, 2.0) + loss).backward()
        consistency(a.detach().to(memory_format=torch.channels_last), b, 2.0)

    step()
    with no_sync():
        step()


def test_launches_are_as_few_as_the_docstring_says(device, monkeypatch):
    a, b = (t.requires_grad_() for t in pair((4, 3, 40, 40), device))
    d_out = scores((1, 1, 1), 64, device).requires_grad_()
    up = torch.ones((), device=device)

    def count(fn, *inputs):
        return launches(lambda: torch.autograd.grad(fn(*inputs), inputs, up), monkeypatch)

    assert count(lambda a, b: consistency(a, b, 2.0), a, b) == 3
    assert count(lambda a, b: C.consistency_ref(a, b, 2.0), a, b) >= 10
    assert count(lambda d: icr_d_loss(d, 10, 10, 5)[0], d_out) == 2
    assert count(lambda d: C.icr_d_loss_ref(d, 10, 10, 5)[0], d_out) >= 8 * 2


def test_indices_pass_2_to_the_31(device, monkeypatch):
    n, size = 2**30 + 16, 64
    d_out = vast(5 * n, torch.bfloat16, device)
    d_out.view(5, n)[:, :size] = torch.tensor([3.0, 5.0, 2.0, 1.0, 8.0])[:, None]
    loss, terms, up = torch.empty((), device=device), torch.empty(4, device=device), torch.ones((), device=device)
    C._icr[(1,)](d_out, loss, terms, 1.0, 1.0, 1.0, n, True, True, True, TRIPS=1, BLOCK=size)
    want = torch.tensor([0.5 * (4 + 25), 1.0, 16.0, 9.0], device=device) * size / n
    torch.testing.assert_close(terms, want)
    C._icr_grad[(1,)](d_out, up * n, d_out, 1.0, 1.0, 1.0, n, True, True, True, BLOCK=size)
    assert d_out.view(5, n)[:, 1].tolist() == [2 + 2, 5 + 8 - 6, -2, -8, 6]
    if device == "cpu":  # programs that begin past 2**31
        d_out.view(5, n)[:, :size] = 0
        at, m = 2**31, 2**31 + size
        d_out[at:m] = 3
        part, first = vast(at // size + 1, torch.float32, device), at // size
        zero = vast(m, torch.bfloat16, device)
        with programs_from(first, monkeypatch):
            C._sum_diff[(1,)](d_out, zero, part, 1.0, m, STEPS=1, BLOCK=size)
            C._grad_diff[(1,)](d_out, zero, up, zero, zero, 2.0, m, BOTH=False, BLOCK=size)
            C._icr_grad[(1,)](d_out, up * m, d_out, 0.0, 0.0, 0.0, m, False, False, False, BLOCK=size)
        assert part[first] == 9 * size and (zero[at:m] == 6).all()
        assert (d_out[at:m] == 2).all() and (d_out[m + at : m + m] == 0).all()


def test_float64_and_empty_tensors_take_the_reference(device):
    a, b = (t.double() for t in pair((3, 5), device))
    assert torch.equal(consistency(a, b, 2.0), C.consistency_ref(a, b, 2.0))
    assert consistency(*torch.empty(2, 0, 3, device=device), 1.0).isnan()
    d_out = scores((1, 0, 1), 5, device).double()
    for got, want in zip(icr_d_loss(d_out, 1, 0, 1), C.icr_d_loss_ref(d_out, 1, 0, 1)):
        assert torch.equal(got, want)


def test_wrong_arguments_raise():
    a = torch.ones(3, 4)
    for b in (a[:2], a[:, :1], a.half(), a[0]):
        with pytest.raises(ValueError, match="one shape and dtype"):
            consistency(a, b, 1.0)
    for d_out, weights in ((a, (0, 0, 0)), (a, (1, 1, 0)), (a[0], (1, 0, 0)), (a.long(), (1, 0, 0))):
        with pytest.raises(ValueError, match="need floating"):
            icr_d_loss(d_out, *weights)


# ---- the script, graphs ----------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
def test_references_equal_the_scripts_functions(weights):
    import icr_gan

    d_out = scores(weights, 64, "cpu")
    for ours, theirs in zip(icr(d_out, weights, C.icr_d_loss_ref), icr(d_out, weights, icr_gan.icr_d_loss)):
        assert torch.equal(ours, theirs)
    a, b = pair((4, 1, 8, 8), "cpu")
    ours = value_and_gradients(C.consistency_ref, a, b, weight=0.3)
    theirs = value_and_gradients(icr_gan.consistency, a, b, weight=0.3)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs))


@pytest.mark.parametrize("weights", [(10.0, 10.0, 5.0, 0.5), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)])
def test_icr_gan_gets_the_plain_gradients(weights, device):
    import icr_gan

    names = "lambda_real", "lambda_fake", "lambda_dis", "lambda_gen"
    args = icr_gan.Args(width=4, z_dim=8, batch_size=8, precision="fp32", device=device, **dict(zip(names, weights)))
    results = []
    for ops in (kernels, None):
        torch.manual_seed(0)
        nets = icr_gan.build(args)
        update_d, update_g, _ = icr_gan.updates(nets, args, ops)
        real = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1
        losses = update_d(real)
        grads = [[p.grad.flatten() for p in nets["discriminator"].parameters()]]
        losses |= update_g()
        grads.append([p.grad.flatten() for p in nets["generator"].parameters()])
        results.append((torch.stack([losses[k] for k in sorted(losses)]), *map(torch.cat, grads)))
    assert error(results[0][0], results[1][0]) <= 1e-5
    assert error(results[0][1], results[1][1]) <= 1e-5
    # Adam's first step is lr times the sign of a gradient, so D may differ where that is noise
    assert error(results[0][2], results[1][2]) <= 1e-3


@pytest.mark.gpu
def test_replay_of_captured_losses_equals_eager(device):
    a, b = (t.requires_grad_() for t in pair((64, 3, 64, 64), device))
    d_out = scores((1, 1, 1), 64, device).requires_grad_()

    def step():
        loss, terms = icr_d_loss(d_out, 10, 10, 5)
        both = loss - consistency(a, b, 0.5)
        return both.detach(), terms, *torch.autograd.grad(both, [a, b, d_out])

    replay, out = captured(step)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            a.normal_(), b.normal_(), d_out.normal_()
        replay()
        for got, want in zip(out, step()):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_compiled_caller_equals_eager(device):
    a, b = pair((16, 3, 32, 32), device)
    d_out = scores((1, 1, 1), 64, device)
    compiled = torch.compile(lambda x, y, s: consistency(x, 2 * y, 0.5) + icr_d_loss(s, 1, 2, 3)[0], fullgraph=True)
    plain = lambda x, y, s: consistency(x, 2 * y, 0.5) + icr_d_loss(s, 1, 2, 3)[0]  # noqa: E731
    for got, want in zip(value_and_gradients(compiled, a, b, d_out), value_and_gradients(plain, a, b, d_out)):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    a, b = (torch.randn(2**31 + 4160, dtype=torch.bfloat16, device=device) for _ in range(2))
    loss, da, db = value_and_gradients(consistency, a, b, weight=float(2**31))
    exact = sum((x.double() - y.double()).square().sum() for x, y in zip(a.split(2**26), b.split(2**26)))
    assert error(loss, exact * (2**31 / a.numel())) <= 1e-5
    tail = 2 * (a[-5000:].double() - b[-5000:].double()) * (2**31 / a.numel())
    assert error(da[-5000:], tail) <= 5e-3 and error(db[-5000:], -tail) <= 5e-3
