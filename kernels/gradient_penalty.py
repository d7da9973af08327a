"""WGAN-GP in few passes: the point between real and fake, and the penalty on the gradient there.

Formula      interpolate        x_i = e_i r_i + (1 - e_i) f_i          one e_i per sample
             gradient_penalty   L = mean_i (n_i - t)^2,  n_i = |g_i|   g [N, ...], target t
Derivative   dL/dg_i = u c_i g_i,  c_i = 2 (n_i - t) / (n_i N),  u the upstream gradient;
             c_i = 0 where n_i = 0, as PyTorch's norm has it: value t^2, gradient 0, never NaN.
             interpolate has none: the critic's gradient is taken at x, not through it.
Bytes        E = bytes of one [N, ...] tensor, terms of size N left out, one pass per eager op:
               interpolate       eager  two products, one sum              7 E
                                 fused  read r and f, write x              3 E
               gradient_penalty  eager  norm forward 1 E, backward 6 E     7 E
                                 fused  read g; read g, write dL/dg        3 E
             so 2.3 x is the most that a bandwidth-bound device gains; a bf16 gradient that eager
             code copies to float32 first costs 20 E there and 3 E here. 12 launches become 3.
Precision    float32 sums and norms for float32, bfloat16 and float16; L is float32, dL/dg and x
             have the dtype of their inputs. Squares under 1e-45 vanish: a row of 1e-23 counts as 0.
Derivatives  first only: g comes from autograd.grad(..., create_graph=True), which holds the second
             order of the critic. Differentiating dL/dg again raises.
"""
import os

import torch
from torch.library import triton_op

try:
    import triton
    import triton.language as tl
    from torch.library import wrap_triton
except ImportError:  # no wheel for this platform: the references still work
    triton = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # kernels on the CPU, slowly
BLOCK = 4096  # elements of a row that one program holds at a time
PROGRAMS = 2048  # about 15 per multiprocessor of an H100; below that rows are split further


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


# ---- references ------------------------------------------------------------------------------


def interpolate_ref(x_real, x_fake, eps):
    """The definition: x_real and x_fake [N, ...], eps [N] -> [N, ...] on the lines between them."""
    e = eps.to(x_real.dtype).view(-1, *[1] * (x_real.dim() - 1))
    return (e * x_real + (1 - e) * x_fake).detach()


def gradient_penalty_ref(grad, target=1.0):
    """The definition: grad [N, ...] -> scalar, float32 unless grad is float64. Any derivative."""
    grad = grad if grad.dtype == torch.float64 else grad.float()
    return (grad.flatten(1).norm(2, dim=1) - target).square().mean()


# ---- kernels ---------------------------------------------------------------------------------

if triton is not None:
    if INTERPRET:

        def wrap_triton(kernel):  # noqa: F811  torch's refuses interpreted kernels before 2.14
            return kernel

    @triton.jit
    def _interpolate(real_ptr, fake_ptr, eps_ptr, out_ptr, D, S, BLOCK: tl.constexpr):
        row = (tl.program_id(0) // S).to(tl.int64)  # int64: row * D may pass 2**31
        begin = (tl.program_id(0) % S).to(tl.int64) * BLOCK
        cols = tl.arange(0, BLOCK)
        mask = cols < tl.minimum(D - begin, BLOCK).to(tl.int32)
        begin += row * D
        e = tl.load(eps_ptr + row).to(tl.float32)
        real = tl.load(real_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
        fake = tl.load(fake_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
        out = (e * real + (1.0 - e) * fake).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + begin + cols, out, mask=mask)

    @triton.jit
    def _sum_squares(g_ptr, part_ptr, D, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        # S programs per row; each leaves one partial sum, so that no order of arrival matters
        row = (tl.program_id(0) // S).to(tl.int64)
        begin = (tl.program_id(0) % S).to(tl.int64) * (STEPS * BLOCK)
        cols = tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        for _ in range(STEPS):  # a constant: 3.6's interpreter has no other with new NumPy
            mask = cols < tl.minimum(D - begin, BLOCK).to(tl.int32)
            g = tl.load(g_ptr + (row * D + begin) + cols, mask=mask, other=0.0).to(tl.float32)
            acc += g * g
            begin += BLOCK
        tl.store(part_ptr + tl.program_id(0), tl.sum(acc, axis=0))

    @triton.jit
    def _finish(part_ptr, loss_ptr, coef_ptr, target, N, S, TRIPS: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
        cols = tl.arange(0, COLS)[None, :]
        acc = tl.zeros((ROWS,), tl.float32)
        for trip in range(TRIPS):
            rows = trip * ROWS + tl.arange(0, ROWS)
            mask = (rows[:, None] < N) & (cols < S)
            part = tl.load(part_ptr + rows[:, None] * S + cols, mask=mask, other=0.0)
            norm = tl.sqrt_rn(tl.sum(part, axis=1))
            off = (norm - target).to(tl.float32)  # torch.compile passes target in float64
            acc += tl.where(rows < N, off * off, 0.0)
            coef = 2.0 * off / (tl.where(norm == 0.0, 1.0, norm) * N)
            coef = tl.where(norm == 0.0, 0.0, coef)  # NaN == 0 is false: NaN stays
            tl.store(coef_ptr + rows, coef, mask=rows < N)
        tl.store(loss_ptr, tl.sum(acc, axis=0) / N)

    @triton.jit
    def _scale_rows(g_ptr, coef_ptr, up_ptr, out_ptr, D, S, BLOCK: tl.constexpr):
        row = (tl.program_id(0) // S).to(tl.int64)
        begin = (tl.program_id(0) % S).to(tl.int64) * BLOCK
        cols = tl.arange(0, BLOCK)
        mask = cols < tl.minimum(D - begin, BLOCK).to(tl.int32)
        begin += row * D
        scale = tl.load(coef_ptr + row) * tl.load(up_ptr)
        g = tl.load(g_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + begin + cols, (scale * g).to(out_ptr.dtype.element_ty), mask=mask)


# ---- launches and operators ------------------------------------------------------------------


def tiles(d):
    """Block, its warps, and the programs per row of d elements, for a pass without a sum."""
    block = min(BLOCK, triton.next_power_of_2(d))
    return block, max(1, block // 512), triton.cdiv(d, block)


def split(n, d):
    """Block, warps, steps and programs per row to sum n rows of d elements: from shapes alone."""
    block, warps, blocks = tiles(d)
    steps = max(1, min(blocks, n * blocks // PROGRAMS))
    return block, warps, steps, triton.cdiv(blocks, steps)


def finish_plan(n, s):
    """Trips, rows and columns with which one program sums n rows of s partial sums."""
    cols = triton.next_power_of_2(s)
    rows = min(triton.next_power_of_2(n), max(1, 4096 // cols))
    return triton.cdiv(n, rows), rows, cols


if triton is not None:

    def _interpolate_impl(
        x_real: torch.Tensor, x_fake: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(x_real)
        n, d = len(x_real), x_real.numel() // len(x_real)
        block, warps, s = tiles(d)
        with torch.cuda.device_of(x_real):  # Triton launches on the current device
            wrap_triton(_interpolate)[(n * s,)](
                x_real, x_fake, eps, out, d, s, BLOCK=block, num_warps=warps
            )
        return out

    def _penalty_impl(grad: torch.Tensor, target: float) -> tuple[torch.Tensor, torch.Tensor]:
        n, d = len(grad), grad.numel() // len(grad)
        block, warps, steps, s = split(n, d)
        trips, rows, cols = finish_plan(n, s)
        part = torch.empty(n * s, device=grad.device, dtype=torch.float32)
        coef = torch.empty(n, device=grad.device, dtype=torch.float32)
        loss = torch.empty((), device=grad.device, dtype=torch.float32)
        with torch.cuda.device_of(grad):
            wrap_triton(_sum_squares)[(n * s,)](
                grad, part, d, s, STEPS=steps, BLOCK=block, num_warps=warps
            )
            wrap_triton(_finish)[(1,)](
                part, loss, coef, target, n, s, TRIPS=trips, ROWS=rows, COLS=cols, num_warps=4
            )
        return loss, coef

    def _penalty_backward_impl(
        grad: torch.Tensor, coef: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(grad)
        n, d = len(grad), grad.numel() // len(grad)
        block, warps, s = tiles(d)
        with torch.cuda.device_of(grad):
            wrap_triton(_scale_rows)[(n * s,)](
                grad, coef, up, out, d, s, BLOCK=block, num_warps=warps
            )
        return out

    _interpolate_op = triton_op("kernels::interpolate", _interpolate_impl, mutates_args={})
    _penalty_op = triton_op("kernels::gradient_penalty", _penalty_impl, mutates_args={})
    # an operator of its own, fed with the saved gradient: a second derivative arrives here
    _penalty_backward_op = triton_op(
        "kernels::gradient_penalty_backward", _penalty_backward_impl, mutates_args={}
    )

    def _save(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # coef never has a gradient: do not fill one with zeros
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    def _first(ctx, up, _):
        return None if up is None else _penalty_backward_op(*ctx.saved_tensors, up), None

    def _second(ctx, *_):
        raise RuntimeError("gradient_penalty has a first derivative only")

    _penalty_op.register_autograd(_first, setup_context=_save)
    _penalty_backward_op.register_autograd(_second)


# ---- public functions ------------------------------------------------------------------------


def interpolate(x_real, x_fake, eps):
    """eps x_real + (1 - eps) x_fake, detached. Images [N, ...] of one dtype, eps [N] in [0, 1]."""
    alike = x_real.shape == x_fake.shape and x_real.dtype == x_fake.dtype
    if not alike or eps.shape != x_real.shape[:1]:
        raise ValueError(
            f"need two equal [N, ...] and eps [N], got {x_real.dtype} {tuple(x_real.shape)}, "
            f"{x_fake.dtype} {tuple(x_fake.shape)} and {tuple(eps.shape)}"
        )
    if not fused(x_real):
        return interpolate_ref(x_real, x_fake, eps)
    x_real, x_fake = dense(x_real.detach()), dense(x_fake.detach())
    if x_real.stride() != x_fake.stride():  # one of each memory format
        x_real, x_fake = x_real.contiguous(), x_fake.contiguous()
    return _interpolate_op(x_real, x_fake, eps.detach().contiguous())


def gradient_penalty(grad, target=1.0):
    """mean_i (|grad_i| - target)^2. grad [N, ...] = dD/dx per sample, norm over all but N; scalar,
    float32, >= 0. A zero row has value target^2 and gradient 0. Differentiable once."""
    if grad.dim() < 2 or not grad.is_floating_point():
        raise ValueError(f"need floating [N, ...], got {grad.dtype} {tuple(grad.shape)}")
    if not fused(grad):
        return gradient_penalty_ref(grad, target)
    return _penalty_op(dense(grad), float(target))[0]
