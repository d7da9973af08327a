"""kernels/augment.py: every move at every place, exact for every dtype and layout."""
from importlib import import_module

import pytest
import torch

from kernels import augment
from tests.kernel_helpers import HALVES, captured, guarded, launches, programs_from, vast, views
from tests.sync import no_sync

pytest.importorskip("triton")
A = import_module("kernels.augment")
pytestmark = pytest.mark.usefixtures("poison")

SHAPES = [(1, 1, 1, 1), (2, 1, 1, 9), (3, 2, 9, 1), (5, 3, 7, 13), (1, 3, 61, 67), (4, 1, 32, 32), (2, 3, 4, 2050)]


def moves(shape, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    n, _, h, w = shape
    flip = torch.rand(n, generator=g) < 0.5
    dx, dy = (torch.randint(1 - size, size, (n,), generator=g) for size in (w, h))
    return [t.to(device) for t in (flip, dx, dy)]


def by_pixel(x, flip, dx, dy):
    """The sentence of the docstring, pixel by pixel."""
    n, c, h, w = x.shape
    out = torch.empty_like(x)
    reflect = lambda i, size: abs(i) if abs(i) < size else 2 * (size - 1) - i  # noqa: E731
    for i in range(n):
        image = x[i].flip(2) if flip[i] else x[i]
        for row in range(h):
            for col in range(w):
                out[i, :, row, col] = image[:, reflect(row - int(dy[i]), h), reflect(col - int(dx[i]), w)]
    return out


def test_the_kernel_is_what_is_tested(device):
    x = torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
    assert "kernels_augment" in augment(x, *moves(x.shape, device)).grad_fn.name()


def test_reference_is_the_definition():
    for flips in (False, True):
        for h, w in ((1, 1), (2, 3), (4, 5)):
            dy, dx = (t.flatten() for t in torch.meshgrid(torch.arange(1 - h, h), torch.arange(1 - w, w), indexing="ij"))
            x, flip = torch.randn(len(dx), 2, h, w), torch.full((len(dx),), flips)
            assert torch.equal(A.augment_ref(x, flip, dx, dy), by_pixel(x, flip, dx, dy))


def test_augment_by_hand(device):
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device).expand(3, 1, 2, 3)
    flip = torch.tensor([False, True, False], device=device)
    dx, dy = torch.tensor([1, 2, 0], device=device), torch.tensor([0, 0, -1], device=device)
    want = [[[2, 1, 2], [5, 4, 5]], [[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [1, 2, 3]]]
    assert augment(x, flip, dx, dy)[:, 0].tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_augment_equals_its_reference(shape, memory_format, dtype, device):
    x = torch.randn(shape).to(device, dtype, memory_format=memory_format)
    how = moves(shape, device)
    out = augment(x, *how)
    assert torch.equal(out, A.augment_ref(x, *how)) and out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)


def test_every_move_is_served(device):
    h, w = 3, 5
    dy, dx = (t.flatten() for t in torch.meshgrid(torch.arange(1 - h, h), torch.arange(1 - w, w), indexing="ij"))
    how = torch.arange(len(dx)) % 2 == 0, dx, dy
    for flip in (how[0], ~how[0]):
        x = torch.randn(len(dx), 2, h, w)
        out = augment(x.to(device), flip.to(device), dx.to(device), dy.to(device))
        assert torch.equal(out.cpu(), A.augment_ref(x, flip, dx, dy))


def test_no_move_gives_the_images_and_two_mirrors_too(device):
    x = torch.randn(3, 2, 6, 8, device=device)
    none, yes = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(3, dtype=torch.bool, device=device)
    assert torch.equal(augment(x, ~yes, none, none), x)
    assert torch.equal(augment(augment(x, yes, none, none), yes, none, none), x)


def test_augment_takes_every_layout(device):
    how = moves((4, 3, 5, 6), device)
    for view in views(torch.empty(4, 3, 5, 6, device=device)):
        assert torch.equal(augment(view, *how), A.augment_ref(view, *how))
    flip, dx, dy = torch.stack([t.long() for t in how], 1).unbind(1)  # strides of 3
    x = torch.randn(4, 3, 5, 6, device=device)
    assert torch.equal(augment(x, flip.bool(), dx, dy), augment(x, *how))


def test_nan_and_infinities_move_like_numbers(device):
    x = torch.randn(3, 2, 6, 8, device=device)
    x[0, 0, 1, 2], x[1, 1, 5, 7], x[2, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    how = moves(x.shape, device)
    torch.testing.assert_close(augment(x, *how), A.augment_ref(x, *how), rtol=0, atol=0, equal_nan=True)


def test_input_alone_is_read_and_left_as_it_was(device):
    for shape in ((1, 1, 1, 1), (3, 2, 5, 7), (2, 1, 70, 33)):
        for seed in range(4):
            x, how = guarded(torch.randn(shape, device=device)), moves(shape, device, seed)
            before = x.clone()
            assert augment(x, *how).isfinite().all() and torch.equal(x, before)


def test_moves_beyond_the_contract_stay_inside_the_images(device):
    x = guarded(torch.randn(4, 1, 5, 6, device=device))
    far = torch.tensor([100, -100, 6, -11], device=device)
    for image, out in zip(x, augment(x, far > 0, far, far)):
        assert torch.isin(out, image).all()


def test_kernel_writes_its_output_only(device):
    x, how = torch.randn(2, 3, 5, 7, device=device), moves((2, 3, 5, 7), device)
    whole = torch.full((64 + 210 + 64,), 7.0, device=device)
    A._augment[(2 * 4 * 2,)](x, *how, whole[64:-64], 15, 5, 7, 4, 2, Q=1, ROWS=4, COLS=4)
    assert torch.equal(whole[64:-64].view(x.shape), A.augment_ref(x, *how))
    assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()


def test_a_derivative_raises(device):
    x = torch.randn(2, 1, 4, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        augment(x, *moves(x.shape, device)).sum().backward()


def test_no_host_sync(device):
    x, how = torch.randn(4, 3, 8, 8, device=device), moves((4, 3, 8, 8), device)
    augment(x, *how)
    with no_sync():
        augment(x, *how)
        augment(x[:, :, ::2], *how)


def test_one_launch_does_it(device, monkeypatch):
    x, how = torch.randn(4, 3, 8, 8, device=device), moves((4, 3, 8, 8), device)
    assert launches(lambda: augment(x, *how), monkeypatch) == 1


def test_indices_pass_2_to_the_31(device, monkeypatch):
    h, w = 2**15, 2**15 + 16  # two images of 2**30 elements and more, the third lies beyond 2**31
    x = vast(2 * h * w + 4 * w, torch.bfloat16, device)
    x[2 * h * w : 2 * h * w + 8] = torch.arange(8)
    none, yes = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.bool, device=device)
    A._augment[(3,)](x, yes, none + 1, none, x, h, h, w, 1, 1, Q=1, ROWS=1, COLS=8)
    assert x[2 * h * w : 2 * h * w + 8].tolist() == [1, 0, 1, 2, 3, 4, 5, 6]
    if device == "cpu":  # an image beyond 2**31 elements, from a late row on
        first = 2**31 // w + 1
        x[first * w : first * w + 8] = torch.arange(8)
        with programs_from(first, monkeypatch):
            A._augment[(1,)](x, yes, none + 1, none, x, 2 * h + 4, 2 * h + 4, w, 2 * h + 4, 1, Q=1, ROWS=1, COLS=8)
        assert x[first * w : first * w + 8].tolist() == [1, 0, 1, 2, 3, 4, 5, 6]


def test_float64_and_empty_tensors_take_the_reference(device):
    x, how = torch.randn(3, 2, 4, 5, device=device).double(), moves((3, 2, 4, 5), device)
    assert torch.equal(augment(x, *how), A.augment_ref(x, *how))
    assert augment(x[:0], *(t[:0] for t in how)).shape == (0, 2, 4, 5)


def test_wrong_arguments_raise():
    x, (flip, dx, dy) = torch.ones(3, 2, 4, 5), moves((3, 2, 4, 5), "cpu")
    for bad in ((x[0], flip, dx, dy), (x, dx, dx, dy), (x, flip, dx[:2], dy), (x, flip, dx, dy[:, None]), (x, flip, dx.float(), dy)):
        with pytest.raises(ValueError, match="need"):
            augment(*bad)


def test_reference_equals_the_scripts_function():
    import icr_gan

    for shape in SHAPES:
        x, how = torch.randn(shape), moves(shape, "cpu")
        assert torch.equal(A.augment_ref(x, *how), icr_gan.augment(x, *how))


@pytest.mark.gpu
def test_replay_of_a_captured_augmentation_equals_eager(device):
    x, (flip, dx, dy) = torch.randn(64, 3, 32, 32, device=device), moves((64, 3, 32, 32), device)
    replay, out = captured(lambda: augment(x, flip, dx, dy))
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_(), flip.logical_not_(), dx.random_(-8, 9), dy.random_(-8, 9)
        replay()
        assert torch.equal(out, A.augment_ref(x, flip, dx, dy))


@pytest.mark.gpu
def test_moves_drawn_in_a_graph_differ_from_replay_to_replay(device):
    x = torch.randn(64, 3, 32, 32, device=device)
    none = torch.zeros(64, dtype=torch.int64, device=device)
    replay, out = captured(lambda: augment(x, torch.rand(64, device=device) < 0.5, none, none))
    replay()
    before = out.clone()
    replay()
    assert not torch.equal(out, before)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    x = torch.randn(3, 1, 2**15, 2**15 + 16, dtype=torch.bfloat16, device=device)
    flip, dx, dy = moves(x.shape, device)
    out = augment(x, flip, dx, dy)
    for i in range(3):
        one = slice(i, i + 1)
        want = x[one].flip(3) if flip[i] else x[one]
        y, c = max(0, int(dy[i])), max(0, int(dx[i]))
        inside = out[one, :, y : x.shape[2] + min(0, int(dy[i])), c : x.shape[3] + min(0, int(dx[i]))]
        y, c = max(0, -int(dy[i])), max(0, -int(dx[i]))
        assert torch.equal(inside, want[:, :, y : y + inside.shape[2], c : c + inside.shape[3]])
