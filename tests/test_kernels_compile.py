"""Every kernel compiled for three generations of GPUs, on a machine that needs to have none.

Triton's interpreter takes code that its compiler rejects, and says nothing about machine code. Run
as a program, without the interpreter, this file notes the real launches of every operator on
tensors without memory, compiles them as Triton would when launched, and prints what the cubins
hold; the tests read that.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TARGETS = (80, 90, 100)  # A100; H100 and H200; B200
WHOLE, ODD, HUGE = (64, 3, 32, 32), (5, 3, 97, 101), (2, 1, 2**16, 2**15 + 16)
IMAGES = {  # kernels bound by memory: images that they read and write; the others move scores, sums
    "_interpolate": (2, 1),
    "_sum_squares": (1, 0),
    "_scale_rows": (1, 1),
    "_sum_diff": (2, 0),
    "_grad_diff": (2, 2),
    "_grad_diff one": (2, 1),
    "_augment": (0, 1),  # it reads from anywhere, so its reads cannot be wide
}
SMALL = ["_finish", "_add_up", "_icr", "_icr off", "_icr_grad", "_icr_grad off"]


# ---- the program -----------------------------------------------------------------------------


def modules():
    return [import_module(f"kernels.{m}") for m in ("gradient_penalty", "consistency", "augment")]


def launches(shape, dtype, memory_format):
    """(kernel, arguments by name, warps) of every launch that the operators make."""
    noted = []

    class Note:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert len(grid) == 1 and 0 < grid[0] < 2**31, "more programs than a launch can have"

            def launch(*args, num_warps, **consts):
                named = dict(zip(self.kernel.arg_names, args)) | consts
                noted.append((self.kernel, named, num_warps))

            return launch

    P, C, A = modules()
    for module in (P, C, A):
        module.wrap_triton = Note

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    n = shape[0]
    x = meta(*shape, dtype=dtype).to(memory_format=memory_format)
    up, scores = meta(), meta(5, n, dtype=dtype)
    moves = meta(n, dtype=torch.int64)
    P._interpolate_impl(x, x, meta(n))
    P._penalty_impl(x, 1.0)
    P._penalty_backward_impl(x, meta(n), up)
    C._consistency_impl(x, x, 10.0)
    C._consistency_backward_impl(x, x, up, 10.0, True)
    C._consistency_backward_impl(x, x, up, 10.0, False)
    C._icr_impl(scores, 10.0, 10.0, 5.0)
    C._icr_backward_impl(scores, up, 10.0, 10.0, 5.0)
    C._icr_impl(scores[:2], 0.0, 0.0, 0.0)
    C._icr_backward_impl(scores[:2], up, 0.0, 0.0, 0.0)
    A._augment_impl(x, meta(n, dtype=torch.bool), moves, moves)
    return noted


def source(kernel, args, numbers="fp32"):
    """What Triton compiles for these arguments: a 1 as a constant, multiples of 16 known as such.

    numbers: the type of Python's floats, fp32 in a launch, fp64 in what torch.compile makes of one.
    """
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types |= {torch.int64: "*i64", torch.bool: "*i1"}
    signature, consts, whole = {}, {}, {}
    for i, (name, param) in enumerate(zip(kernel.arg_names, kernel.params)):
        value = args[name]
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            whole[(i,)] = [["tt.divisibility", 16]]  # as torch allocates
        elif param.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], consts[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                whole[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = numbers
    return ASTSource(fn=kernel, signature=signature, constexprs=consts, attrs=whole)


def read(cubin, wide):
    """Registers, bytes of stack and local memory; for wide, how often memory instructions occur."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def output(tool, *args):
        done = subprocess.run([tools / tool, *args], capture_output=True, text=True, check=True)
        return done.stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", output("cuobjdump", "-res-usage", f.name))
        sass = output("nvdisasm", "-c", f.name) if wide else ""
    count = Counter()
    for name, kind in re.findall(r"\b(LDG|STG|LDL|STL)\b(\S*)", sass):
        count[name + (" wide" if ".128" in kind else "")] += 1
    return dict(zip(("registers", "stack", "local"), map(int, usage.groups()))) | {"count": count}


def seen_by_compile(target):
    """Names of the kernels in the graphs that torch.compile would hand on, forward and backward."""
    import triton
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    import kernels as K

    class Driver:  # all that tracing asks of a device
        def get_current_target(self):
            return target

    triton.runtime.driver.set_active(Driver())
    for module in modules():
        module.INTERPRET = True  # take CPU tensors; nothing is launched

    def names(fn, *args):
        graph = aot_export_joint_simple(fn, args, trace_joint=args[0].requires_grad).graph
        found = []
        for node in graph.nodes:
            if "kernel_idx" in node.kwargs:
                kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                while not isinstance(kernel, triton.JITFunction):  # num_warps wraps it
                    kernel = kernel.fn
                found.append(kernel.fn.__name__)
        return found

    x, y = torch.randn(2, 4, 3, 8, 8)
    moves = torch.zeros(4, dtype=torch.int64)
    found = names(lambda a, b, e: (K.interpolate(a, b, e),), x, y, torch.rand(4))
    found += names(lambda a, f, m: (K.augment(a, f, m, m),), x, moves > 0, moves)
    x, y, scores = (t.requires_grad_() for t in (x, y, torch.randn(5, 4)))
    found += names(lambda g: (K.gradient_penalty(g),), x)
    found += names(lambda a, b: (K.consistency(a, b, 2.0),), x, y)
    return found + names(lambda s: K.icr_d_loss(s, 1.0, 2.0, 3.0)[:1], scores)


def main():
    import triton
    from triton.backends.compiler import GPUTarget

    print(json.dumps(seen_by_compile(GPUTarget("cuda", 90, 32))), flush=True)
    known = {}
    plain, last = torch.contiguous_format, torch.channels_last
    for shape, dtype, memory_format, targets, numbers in (
        (WHOLE, torch.float32, plain, TARGETS, "fp32"),
        (WHOLE, torch.bfloat16, plain, TARGETS, "fp32"),
        (WHOLE, torch.bfloat16, plain, TARGETS[1:2], "fp64"),
        (WHOLE, torch.float16, last, TARGETS[1:2], "fp32"),
        (ODD, torch.float32, plain, TARGETS[1:2], "fp32"),
        (HUGE, torch.bfloat16, plain, TARGETS[1:2], "fp32"),
    ):
        for kernel, args, warps in launches(shape, dtype, memory_format):
            name = kernel.fn.__name__
            src = source(kernel, args, numbers)
            row = dict(shape=shape, dtype=str(dtype), types=src.signature, warps=warps)
            row["elements"] = args.get("ROWS", 1) * args.get("COLS", args.get("BLOCK"))
            row["bytes"] = dtype.itemsize
            row["kernel"] = name + (" one" if args.get("BOTH") is False else "")
            row["kernel"] += " off" if args.get("REAL") is False else ""
            for cc in targets:
                key = src.hash(), cc, warps
                if key not in known:
                    target = GPUTarget("cuda", cc, 32)
                    binary = triton.compile(src, target=target, options=dict(num_warps=warps))
                    known[key] = read(binary.asm["cubin"], name in IMAGES)
                print(json.dumps(row | dict(cc=cc) | known[key]), flush=True)


# ---- the tests -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the program printed: the kernels that torch.compile sees, and a row per cubin."""
    pytest.importorskip("triton")
    env = os.environ | dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    command = [sys.executable, "-m", "tests.test_kernels_compile"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    seen, *rows = map(json.loads, done.stdout.splitlines())
    return seen, rows


def test_every_kernel_compiles_for_every_target(compiled):
    _, rows = compiled
    for dtype in ("torch.float32", "torch.bfloat16"):
        built = {(r["kernel"], r["cc"]) for r in rows if r["dtype"] == dtype}
        assert built == {(k, cc) for k in [*IMAGES, *SMALL] for cc in TARGETS}
    kinds = ("JITFunction", "InterpretedFunction")
    defined = {name for m in modules() for name, f in vars(m).items() if type(f).__name__ in kinds}
    assert defined - {"_reflect"} == {k.split()[0] for k in [*IMAGES, *SMALL]}


def test_nothing_spills(compiled):
    for r in compiled[1]:
        assert r["stack"] == r["local"] == 0, r
        assert not r["count"].get("LDL") and not r["count"].get("STL"), r
        assert r["registers"] <= 80, r


def test_loads_and_stores_are_16_bytes_wide_where_rows_divide_by_16(compiled):
    checked = 0
    for r in compiled[1]:
        if r["kernel"] in IMAGES and tuple(r["shape"]) != ODD:
            reads, writes = IMAGES[r["kernel"]]
            each = r["elements"] * r["bytes"] / (r["warps"] * 32 * 16)  # per thread and image
            assert r["count"].get("LDG wide", 0) == reads * each, r
            assert r["count"].get("STG wide", 0) == writes * each, r
            # besides: a scalar or a factor of the row to read, a sum to write
            assert reads == 0 or r["count"].get("LDG", 0) <= 2, r
            assert r["count"].get("STG", 0) <= (writes == 0), r
            checked += 1
    assert checked >= 2 * len(TARGETS) * len(IMAGES)


def test_lengths_past_2_to_the_31_are_64_bits_wide(compiled):
    huge = {r["kernel"]: r["types"] for r in compiled[1] if tuple(r["shape"]) == HUGE}
    for name, length in (("_interpolate", "D"), ("_sum_squares", "D"), ("_sum_diff", "M"), ("_grad_diff", "M")):
        assert huge[name][length] == "i64"


def test_a_compiled_caller_sees_through_the_operators(compiled):
    names = ["_interpolate", "_augment", "_sum_squares", "_finish", "_scale_rows"]
    assert compiled[0] == names + ["_sum_diff", "_grad_diff", "_icr", "_icr_grad"]


if __name__ == "__main__":
    main()
