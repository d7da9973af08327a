"""Consistency regularisation: the distance of two sets of images, and the whole loss of ICR's D.

Formula      consistency  L = w mean (a - b)^2                   over all M elements
             icr_d_loss   L = 1/2 mean (s_r - 1)^2 + 1/2 mean s_f^2      s_r, s_f = D(x), D(G(z))
                            + l_r mean (s_r - s_tr)^2                    s_tr = D(T(x))
                            + l_f mean (s_f - s_tf)^2                    s_tf = D(T(G(z)))
                            + l_d mean (s_f - s_n)^2                     s_n = D(G(z + sigma n))
Derivative   consistency  dL/da = u 2 w (a - b) / M = -dL/db,  u the upstream gradient
             icr_d_loss   dL/ds_r = u (s_r - 1 + 2 l_r (s_r - s_tr)) / N
                          dL/ds_f = u (s_f + 2 l_f (s_f - s_tf) + 2 l_d (s_f - s_n)) / N
                          dL/ds_tr = -2 u l_r (s_r - s_tr) / N, and so on. Ties have gradient 0.
Bytes        E = bytes of a, one pass per eager op, both gradients:
               consistency  eager  (a - b).square().mean()           16 E, 44 E on float32 copies
                            fused  read a and b; read a and b, write two   6 E
             10 launches become 3. icr_d_loss moves a few hundred bytes: 56 launches become 2.
Precision    float32 differences and sums for float32, bfloat16 and float16; losses and terms are
             float32, gradients have the dtype of their inputs.
Derivatives  first only; differentiating a gradient again raises.
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
BLOCK = 4096  # elements that one program holds at a time
PROGRAMS = 2048  # partial sums at most, twice that after rounding; one program adds them up
SCORES = 1024  # scores per row and trip in the one program of icr_d_loss


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


def consistency_ref(a, b, weight):
    """The definition: a and b [N, ...] -> scalar, float32 unless they are float64."""
    if a.dtype != torch.float64:
        a, b = a.float(), b.float()
    return weight * (a - b).square().mean()


def icr_d_loss_ref(d_out, lambda_real, lambda_fake, lambda_dis):
    """The definition: d_out [2 + non-zero weights, N] -> loss, terms [4]; float32 or float64."""
    d_out = d_out if d_out.dtype == torch.float64 else d_out.float()
    d_real, d_fake, *others = d_out
    loss = 0.5 * (d_real - 1).square().mean() + 0.5 * d_fake.square().mean()
    terms = [loss]
    for base, weight in ((d_real, lambda_real), (d_fake, lambda_fake), (d_fake, lambda_dis)):
        if weight:
            terms.append((base - others.pop(0)).square().mean())
            loss = loss + weight * terms[-1]
        else:
            terms.append(torch.zeros_like(terms[0]))
    return loss, torch.stack(terms).detach()


# ---- kernels ---------------------------------------------------------------------------------

if triton is not None:
    if INTERPRET:

        def wrap_triton(kernel):  # noqa: F811  torch's refuses interpreted kernels before 2.14
            return kernel

    @triton.jit
    def _sum_diff(a_ptr, b_ptr, part_ptr, scale, M, STEPS: tl.constexpr, BLOCK: tl.constexpr):
        begin = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)  # int64: M may pass 2**31
        cols = tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        for _ in range(STEPS):  # a constant: 3.6's interpreter has no other with new NumPy
            mask = cols < tl.minimum(M - begin, BLOCK).to(tl.int32)
            a = tl.load(a_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
            acc += (a - b) * (a - b)
            begin += BLOCK
        tl.store(part_ptr + tl.program_id(0), tl.sum(acc, axis=0) * scale)

    @triton.jit
    def _add_up(part_ptr, loss_ptr, P, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(loss_ptr, tl.sum(tl.load(part_ptr + at, mask=at < P, other=0.0), axis=0))

    @triton.jit
    def _grad_diff(a_ptr, b_ptr, up_ptr, da_ptr, db_ptr, scale, M, BOTH: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        cols = tl.arange(0, BLOCK)
        mask = cols < tl.minimum(M - begin, BLOCK).to(tl.int32)
        a = tl.load(a_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + begin + cols, mask=mask, other=0.0).to(tl.float32)
        # torch.compile passes scale in float64, which is slow on most GPUs
        d = (a - b) * (scale * tl.load(up_ptr)).to(tl.float32)
        tl.store(da_ptr + begin + cols, d.to(da_ptr.dtype.element_ty), mask=mask)
        if BOTH:
            tl.store(db_ptr + begin + cols, (-d).to(db_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _icr(d_ptr, loss_ptr, terms_ptr, l_real, l_fake, l_dis, N,
             REAL: tl.constexpr, FAKE: tl.constexpr, DIS: tl.constexpr,
             TRIPS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        fake_ptr = d_ptr + N  # rows are walked by pointer: a product row * N may pass 2**31
        t_real_ptr = fake_ptr + N
        t_fake_ptr = t_real_ptr + N * REAL
        near_ptr = t_fake_ptr + N * FAKE
        lsgan = tl.zeros((BLOCK,), tl.float32)
        real = tl.zeros((BLOCK,), tl.float32)
        fake = tl.zeros((BLOCK,), tl.float32)
        dis = tl.zeros((BLOCK,), tl.float32)
        at = tl.arange(0, BLOCK).to(tl.int64)
        for _ in range(TRIPS):
            s_real = tl.load(d_ptr + at, mask=at < N, other=1.0).to(tl.float32)
            s_fake = tl.load(fake_ptr + at, mask=at < N, other=0.0).to(tl.float32)
            lsgan += (s_real - 1.0) * (s_real - 1.0) + s_fake * s_fake
            if REAL:
                s = tl.load(t_real_ptr + at, mask=at < N, other=1.0).to(tl.float32)
                real += (s_real - s) * (s_real - s)
            if FAKE:
                s = tl.load(t_fake_ptr + at, mask=at < N, other=0.0).to(tl.float32)
                fake += (s_fake - s) * (s_fake - s)
            if DIS:
                s = tl.load(near_ptr + at, mask=at < N, other=0.0).to(tl.float32)
                dis += (s_fake - s) * (s_fake - s)
            at += BLOCK
        m_lsgan = 0.5 * tl.sum(lsgan, axis=0) / N
        m_real = tl.sum(real, axis=0) / N
        m_fake = tl.sum(fake, axis=0) / N
        m_dis = tl.sum(dis, axis=0) / N
        tl.store(loss_ptr, m_lsgan + l_real * m_real + l_fake * m_fake + l_dis * m_dis)
        tl.store(terms_ptr, m_lsgan)
        tl.store(terms_ptr + 1, m_real)
        tl.store(terms_ptr + 2, m_fake)
        tl.store(terms_ptr + 3, m_dis)

    @triton.jit
    def _icr_grad(d_ptr, up_ptr, out_ptr, l_real, l_fake, l_dis, N, REAL: tl.constexpr,
                  FAKE: tl.constexpr, DIS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < N
        ty = out_ptr.dtype.element_ty
        scale = tl.load(up_ptr) / N
        s_real = tl.load(d_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s_fake = tl.load(d_ptr + N + at, mask=mask, other=0.0).to(tl.float32)
        g_real = s_real - 1.0
        g_fake = s_fake
        in_ptr = d_ptr + N + N
        to_ptr = out_ptr + N + N
        if REAL:
            g = s_real - tl.load(in_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = (2.0 * l_real * g).to(tl.float32)  # see _grad_diff
            g_real += g
            tl.store(to_ptr + at, (-g * scale).to(ty), mask=mask)
            in_ptr += N
            to_ptr += N
        if FAKE:
            g = s_fake - tl.load(in_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = (2.0 * l_fake * g).to(tl.float32)  # see _grad_diff
            g_fake += g
            tl.store(to_ptr + at, (-g * scale).to(ty), mask=mask)
            in_ptr += N
            to_ptr += N
        if DIS:
            g = s_fake - tl.load(in_ptr + at, mask=mask, other=0.0).to(tl.float32)
            g = (2.0 * l_dis * g).to(tl.float32)  # see _grad_diff
            g_fake += g
            tl.store(to_ptr + at, (-g * scale).to(ty), mask=mask)
        tl.store(out_ptr + at, (g_real * scale).to(ty), mask=mask)
        tl.store(out_ptr + N + at, (g_fake * scale).to(ty), mask=mask)


# ---- launches and operators ------------------------------------------------------------------


def tiles(m):
    """Block, its warps, and the number of blocks in m elements, for a pass without a sum."""
    block = min(BLOCK, triton.next_power_of_2(m))
    return block, max(1, block // 512), triton.cdiv(m, block)


def split(m):
    """Block, warps, steps and programs to sum m elements: from the shape alone."""
    block, warps, blocks = tiles(m)
    steps = max(1, blocks // PROGRAMS)
    return block, warps, steps, triton.cdiv(blocks, steps)


if triton is not None:

    def _consistency_impl(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
        m = a.numel()
        block, warps, steps, p = split(m)
        loss = torch.empty((), device=a.device, dtype=torch.float32)
        part = torch.empty(p, device=a.device, dtype=torch.float32) if p > 1 else loss
        with torch.cuda.device_of(a):  # Triton launches on the current device
            wrap_triton(_sum_diff)[(p,)](
                a, b, part, weight / m, m, STEPS=steps, BLOCK=block, num_warps=warps
            )
            if p > 1:
                wrap_triton(_add_up)[(1,)](
                    part, loss, p, BLOCK=triton.next_power_of_2(p), num_warps=4
                )
        return loss

    def _consistency_backward_impl(
        a: torch.Tensor, b: torch.Tensor, up: torch.Tensor, weight: float, both: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        m = a.numel()
        block, warps, blocks = tiles(m)
        da = torch.empty_like(a)
        db = torch.empty_like(b) if both else b.new_empty(0)
        with torch.cuda.device_of(a):
            wrap_triton(_grad_diff)[(blocks,)](
                a, b, up, da, db, 2 * weight / m, m, BOTH=both, BLOCK=block, num_warps=warps
            )
        return da, db

    def _icr_impl(
        d_out: torch.Tensor, lambda_real: float, lambda_fake: float, lambda_dis: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = d_out.shape[1]
        block = min(SCORES, triton.next_power_of_2(n))
        loss = torch.empty((), device=d_out.device, dtype=torch.float32)
        terms = torch.empty(4, device=d_out.device, dtype=torch.float32)
        with torch.cuda.device_of(d_out):
            wrap_triton(_icr)[(1,)](
                d_out, loss, terms, lambda_real, lambda_fake, lambda_dis, n,
                REAL=lambda_real != 0, FAKE=lambda_fake != 0, DIS=lambda_dis != 0,
                TRIPS=triton.cdiv(n, block), BLOCK=block, num_warps=4,
            )  # fmt: skip
        return loss, terms

    def _icr_backward_impl(
        d_out: torch.Tensor,
        up: torch.Tensor,
        lambda_real: float,
        lambda_fake: float,
        lambda_dis: float,
    ) -> torch.Tensor:
        n = d_out.shape[1]
        block = min(SCORES, triton.next_power_of_2(n))
        out = torch.empty_like(d_out)
        with torch.cuda.device_of(d_out):
            wrap_triton(_icr_grad)[(triton.cdiv(n, block),)](
                d_out, up, out, lambda_real, lambda_fake, lambda_dis, n,
                REAL=lambda_real != 0, FAKE=lambda_fake != 0, DIS=lambda_dis != 0,
                BLOCK=block, num_warps=4,
            )  # fmt: skip
        return out

    _consistency_op = triton_op("kernels::consistency", _consistency_impl, mutates_args={})
    _icr_op = triton_op("kernels::icr_d_loss", _icr_impl, mutates_args={})
    # operators of their own, fed with the saved inputs: a second derivative arrives here
    _consistency_backward_op = triton_op(
        "kernels::consistency_backward", _consistency_backward_impl, mutates_args={}
    )
    _icr_backward_op = triton_op(
        "kernels::icr_d_loss_backward", _icr_backward_impl, mutates_args={}
    )

    def _save(ctx, inputs, output):
        a, b, ctx.weight = inputs
        ctx.save_for_backward(a, b)

    def _first(ctx, up):
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        if need_a:
            da, db = _consistency_backward_op(a, b, up, ctx.weight, need_b)
        else:  # the distance is symmetric
            da, db = _consistency_backward_op(b, a, up, ctx.weight, False)[::-1]
        return da if need_a else None, db if need_b else None, None

    def _icr_save(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # terms never have a gradient: do not fill one with zeros
        ctx.mark_non_differentiable(output[1])
        d_out, *ctx.weights = inputs
        ctx.save_for_backward(d_out)

    def _icr_first(ctx, up, _):
        if up is None:
            return None, None, None, None
        return _icr_backward_op(ctx.saved_tensors[0], up, *ctx.weights), None, None, None

    def _second(ctx, *_):
        raise RuntimeError("consistency and icr_d_loss have a first derivative only")

    _consistency_op.register_autograd(_first, setup_context=_save)
    _consistency_backward_op.register_autograd(_second)
    _icr_op.register_autograd(_icr_first, setup_context=_icr_save)
    _icr_backward_op.register_autograd(_second)


# ---- public functions ------------------------------------------------------------------------


def consistency(a, b, weight):
    """weight mean (a - b)^2. a and b of one shape and dtype; mean over all elements; scalar,
    float32, of weight's sign. Differentiable once, to both."""
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(
            f"need two floating tensors of one shape and dtype, got "
            f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    if not fused(a):
        return consistency_ref(a, b, weight)
    a, b = dense(a), dense(b)
    if a.stride() != b.stride():  # one of each memory format
        a, b = a.contiguous(), b.contiguous()
    return _consistency_op(a, b, float(weight))


def icr_d_loss(d_out, lambda_real, lambda_fake, lambda_dis):
    """Loss of ICR's discriminator, and terms [4]: lsgan, real, fake, dis, unweighted and detached.

    d_out [2 + number of non-zero weights, N], scores of x, G(z), then T(x), T(G(z)),
    G(z + sigma n); a term of weight 0 has no row. Means over N; scalar, float32. Differentiable
    once.
    """
    weights = lambda_real, lambda_fake, lambda_dis
    rows = 2 + sum(w != 0 for w in weights)
    if d_out.dim() != 2 or len(d_out) != rows or not d_out.is_floating_point():
        raise ValueError(f"need floating [{rows}, N], got {d_out.dtype} {tuple(d_out.shape)}")
    if not fused(d_out):
        return icr_d_loss_ref(d_out, *weights)
    return _icr_op(d_out.contiguous(), *map(float, weights))
