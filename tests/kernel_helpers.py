"""What the tests of the kernels share: errors, launches, graphs, indices past 2**31."""
import contextlib
import importlib
import mmap

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = (torch.bfloat16, torch.float16)


def error(got, exact):
    """|got - exact| / |exact| over all elements, in float64."""
    exact = exact.double()
    return ((got.double() - exact).norm() / exact.norm()).item()


def no_worse(ours, torchs, exact):
    """Whether ours is as near to exact as twice PyTorch's own result at that precision."""
    return error(ours, exact) <= 2 * error(torchs, exact)


def guarded(x, margin=64):
    """x in the middle of memory that holds NaN: a read beyond its ends cannot go unnoticed."""
    whole = torch.full((x.numel() + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    inner = whole[margin:-margin].view(x.shape)
    return inner.copy_(x)


def views(x):
    """Tensors with the shape of x [N, C, H, W], C > 1, in memory laid out in every other way."""
    n, c, h, w = x.shape
    yield torch.randn_like(x).to(memory_format=torch.channels_last)
    yield x.new_empty(n, c, h, 2 * w).normal_()[..., ::2]
    yield x.new_empty(2 * n, c, h, w).normal_()[::2]
    yield x.new_empty(w, h, c, n).normal_().permute(3, 2, 1, 0)
    yield x.new_empty(n, c, h + 1, w).normal_()[:, :, 1:]
    yield x.new_empty(n, 1, h, w).normal_().expand(n, c, h, w)


# ---- launches --------------------------------------------------------------------------------


class _Counter(TorchDispatchMode):
    FREE = set("empty empty_like new_empty empty_strided detach".split())  # and views

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f.namespace == "aten":
            self.count += not (f.is_view or f.overloadpacket.__name__ in self.FREE)
        return f(*args, **(kwargs or {}))


def launches(fn, monkeypatch):
    """Kernels that fn launches on a device, at the least: one per operator that is no view and no
    allocation, and for the project's operators the Triton kernels in them."""
    counter = _Counter()

    def counted(wrap):
        def inner(kernel):
            counter.count += 1
            return wrap(kernel)

        return inner

    with monkeypatch.context() as m, counter:
        for name in ("gradient_penalty", "consistency", "augment"):
            module = importlib.import_module(f"kernels.{name}")
            m.setattr(module, "wrap_triton", counted(module.wrap_triton))
        fn()
    return counter.count


# ---- graphs ----------------------------------------------------------------------------------


def captured(fn):
    """fn captured into a CUDA graph after a warm-up: (replay, what fn returned)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    return graph.replay, out


# ---- indices past 2**31 ----------------------------------------------------------------------


def vast(n, dtype, device):
    """n zeros; on the CPU they take memory only where they are written."""
    if device == "cuda":
        return torch.zeros(n, dtype=dtype, device=device)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13; Linux's number
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize, flags=flags), dtype=dtype)


@contextlib.contextmanager
def programs_from(first, monkeypatch):
    """Launches in the interpreter run program first and the following ones instead of 0, 1, ..."""
    from triton.runtime.interpreter import interpreter_builder as builder

    with monkeypatch.context() as m:
        m.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (first + x, y, z)))
        yield
