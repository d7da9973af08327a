"""Mirror and shift of every image of a batch by moves of its own, in one pass.

Formula      m_i = x_i mirrored left to right where flip_i, else x_i
             out_i[c, y, x] = m_i[c, r(y - dy_i), r(x - dx_i)]
             r reflects at the borders and does not repeat them: r(-1) = 1, r(W) = W - 2
Derivative   none: real images and detached ones are augmented. Asking for one raises.
Bytes        E = bytes of the images:
               eager  index tensors of size N H W and smaller, one gather   2 E and more
               fused  read x, write out                                     2 E
             What is saved is launches: 16 become 1.
Precision    a copy, exact for every dtype; out has the dtype and memory format of x.
"""
import os

import torch
from torch.library import triton_op

try:
    import triton
    import triton.language as tl
    from torch.library import wrap_triton
except ImportError:  # no wheel for this platform: the reference still works
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels on the CPU, slowly
BLOCK = 2048  # elements that one program moves


def dense(x):
    """x if its samples lie one after another without gaps, in either memory format; else a copy."""
    if x.is_contiguous() or x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def fused(x):
    """Whether kernels serve x: on a GPU, or on the CPU in the interpreter; the rest is plain."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    on = triton is not None and (x.is_cuda or INTERPRET)
    return on and x.dtype in floats and x.numel() > 0


# ---- reference -------------------------------------------------------------------------------


def augment_ref(x, flip, dx, dy):
    """The definition: x [N, C, H, W], flip bool [N], dx and dy int64 [N] -> [N, C, H, W]."""
    n, _, h, w = x.shape

    def source(size, move):
        at = (torch.arange(size, device=x.device) - move[:, None]).abs()
        return size - 1 - (size - 1 - at).abs()

    rows, cols = source(h, dy), source(w, dx)
    cols = torch.where(flip[:, None], w - 1 - cols, cols)
    image = torch.arange(n, device=x.device)[:, None, None]
    return x.movedim(1, 3)[image, rows[:, :, None], cols[:, None, :]].movedim(3, 1)


# ---- kernel ----------------------------------------------------------------------------------

if triton is not None:
    if INTERPRET:

        def wrap_triton(kernel):  # noqa: F811  torch's refuses interpreted kernels before 2.14
            return kernel

    @triton.jit
    def _reflect(at, size):
        at = tl.abs(at)
        at = size - 1 - tl.abs(size - 1 - at)
        return tl.maximum(at, 0)  # a move beyond the contract stays inside the image

    @triton.jit
    def _augment(x_ptr, flip_ptr, dx_ptr, dy_ptr, out_ptr, R, H, W, S, T, Q: tl.constexpr,
                 ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
        # an image is R rows of W * Q elements: R = C H, Q = 1 if contiguous; R = H, Q = C if
        # channels last. S tiles cover the rows, T the columns
        pid = tl.program_id(0)
        image = pid // (S * T)
        r = (pid // T % S) * ROWS + tl.arange(0, ROWS)[:, None]
        j = (pid % T) * COLS + tl.arange(0, COLS)[None, :]
        dx = tl.load(dx_ptr + image).to(tl.int32)
        dy = tl.load(dy_ptr + image).to(tl.int32)
        flip = tl.load(flip_ptr + image).to(tl.int32)
        y = r % H
        from_r = r - y + _reflect(y - dy, H)
        x = _reflect(j // Q - dx, W)
        x = tl.where(flip != 0, W - 1 - x, x)
        mask = (r < R) & (j < W * Q)
        base = image.to(tl.int64) * R  # int64: N C H W may pass 2**31, and so may C H W
        from_ptr = x_ptr + (base + from_r) * (W * Q)
        value = tl.load(from_ptr + (x * Q + j % Q), mask=mask, other=0.0)
        tl.store(out_ptr + (base + r) * (W * Q) + j, value, mask=mask)


# ---- launch and operator ---------------------------------------------------------------------


def tiles(r, m):
    """Rows and columns of a tile, and how many tiles cover r rows of m elements each way."""
    cols = min(BLOCK, triton.next_power_of_2(m))
    rows = min(BLOCK // cols, triton.next_power_of_2(r))
    return rows, cols, triton.cdiv(r, rows), triton.cdiv(m, cols)


if triton is not None:

    def _augment_impl(
        x: torch.Tensor, flip: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        n, c, h, w = x.shape
        r, q = (c * h, 1) if x.is_contiguous() else (h, c)
        rows, cols, s, t = tiles(r, w * q)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            wrap_triton(_augment)[(n * s * t,)](
                x, flip, dx, dy, out, r, h, w, s, t, Q=q, ROWS=rows, COLS=cols,
                num_warps=max(1, rows * cols // 512),
            )  # fmt: skip
        return out

    _augment_op = triton_op("kernels::augment", _augment_impl, mutates_args={})

    def _first(ctx, *_):
        raise RuntimeError("augment has no derivative: it is for real and detached images")

    _augment_op.register_autograd(_first)


# ---- public function -------------------------------------------------------------------------


def augment(x, flip, dx, dy):
    """Images x [N, C, H, W], mirrored where flip (bool [N]), then moved right by dx and down by dy
    (int64 [N], |dx| < W, |dy| < H), borders reflected. Not differentiable."""
    moves = [(t.dtype, tuple(t.shape)) for t in (flip, dx, dy)]
    if x.dim() != 4 or moves != [(t, x.shape[:1]) for t in (torch.bool, torch.int64, torch.int64)]:
        need = "[N, C, H, W], bool [N] and two int64 [N]"
        raise ValueError(f"need {need}, got {tuple(x.shape)}, {moves}")
    if not fused(x):
        return augment_ref(x, flip, dx, dy)
    return _augment_op(dense(x), flip.contiguous(), dx.contiguous(), dy.contiguous())
