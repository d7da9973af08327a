"""Time of every kernel against eager PyTorch and torch.compile; train.py times whole updates.

    python -m tests.benchmarks.kernels                       # all of it; minutes on a GPU
    python -m tests.benchmarks.kernels --shapes 64,1,32,32

Results are compared with float64 before anything is timed. ms is the median of calls as a script
makes them, launches from Python included; graph ms the same calls replayed as a CUDA graph. GB/s
counts the bytes that must be moved (docstrings of kernels/), whatever an implementation moves; copy
is the bandwidth of copying one such tensor in the same run, and share is against that. Between
calls the caches are overwritten, and implementations take turns, so that a drift of the machine
meets all of them.

On a GPU the rows go to tests/benchmarks/results/kernels-DEVICE.json, elsewhere only to --json PATH.
Without a GPU eager code alone is timed; all else is marked "not measured", as the kernels and what
they are compared with would be other code there.
"""
import datetime
import importlib
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

import kernels
from common import cli, files, terminal
from tests.kernel_helpers import captured, error

SHAPES = ["64,1,32,32", "64,3,64,64", "64,3,128,128", "64,3,256,256", "256,3,256,256"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHE = 2**28  # bytes written between calls: several times the cache of an H100
HEAD = f"{'what':28}{'shape':20}{'dtype':6}{'':9}{'ms':>9}{'p20':>9}{'p80':>9}{'graph ms':>10}"
HEAD += f"{'GB/s':>8}{'copy':>8}{'share':>7}{'vs eager':>9}"


@dataclass
class Case:
    name: str
    plain: Callable  # the reference
    fused: Callable
    call: Callable  # of an implementation: results as a list of tensors
    bytes: int
    shape: tuple


def reference(name):
    for module in ("gradient_penalty", "consistency", "augment"):
        found = getattr(importlib.import_module(f"kernels.{module}"), f"{name}_ref", None)
        if found:
            return found


def cases(shape, dtype, device):
    """What is timed for images of that shape: forward, and forward with all gradients."""
    torch.manual_seed(0)
    n, _, h, w = shape
    a, b = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    real, fake, eps = a.detach(), b.detach(), torch.rand(n, device=device)
    flip = torch.rand(n, device=device) < 0.5
    dx, dy = (torch.randint(-size // 8, size // 8 + 1, (n,), device=device) for size in (w, h))
    scores = torch.randn(5, n, device=device, requires_grad=True)
    e = a.numel() * dtype.itemsize
    s = scores.numel() * 4

    def case(name, bytes, forward, inputs=(), shape=shape):
        def both(fn):
            out = forward(fn)
            return [out, *torch.autograd.grad(out, inputs)]

        plain, fused = reference(name), getattr(kernels, name)
        with_grad = [Case(f"{name} both", plain, fused, both, bytes[1], shape)] if inputs else []
        return [Case(name, plain, fused, lambda fn: [forward(fn)], bytes[0], shape), *with_grad]

    def icr(fn):
        return fn(scores, 10.0, 10.0, 5.0)[0]

    return [
        *case("interpolate", [3 * e], lambda fn: fn(real, fake, eps)),
        *case("augment", [2 * e], lambda fn: fn(real, flip, dx, dy)),
        *case("gradient_penalty", [e, 3 * e], lambda fn: fn(a), [a]),
        *case("consistency", [2 * e, 6 * e], lambda fn: fn(a, b, 0.5), [a, b]),
        *case("icr_d_loss", [s, 3 * s], icr, [scores], scores.shape),
    ]


# ---- timing ----------------------------------------------------------------------------------


def timed(calls, device, repeats):
    """{name: [ms, ...]} of every call, in turns."""
    cuda = device.type == "cuda"
    cache = torch.empty(CACHE if cuda else 0, dtype=torch.int8, device=device)
    times = {name: [] for name in calls}
    for _ in range(3 if cuda else 1):
        for call in calls.values():
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            cache.zero_()
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                times[name].append((start, end))
            else:
                begin = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - begin))
    if cuda:
        torch.cuda.synchronize()
        times = {name: [s.elapsed_time(e) for s, e in pairs] for name, pairs in times.items()}
    return times


def quantiles(times):
    p20, *_, p80 = statistics.quantiles(times, n=5) if len(times) > 1 else times * 2
    return dict(ms=statistics.median(times), p20=p20, p80=p80)


def implementations(case, device):
    """{name: function without arguments} of what can be measured here, checked against float64."""
    found = {"eager": lambda: case.call(case.plain)}
    if device.type == "cuda":
        compiled = torch.compile(case.plain, dynamic=False)
        found["compile"] = lambda: case.call(compiled)
        found["triton"] = lambda: case.call(case.fused)

    def exact(*args):
        tensors = [torch.is_tensor(t) and t.is_floating_point() for t in args]
        return case.plain(*(t.double() if is_one else t for t, is_one in zip(args, tensors)))

    want = case.call(exact)
    for name, call in found.items():
        for got, right in zip(call(), want):
            bound = 1e-5 if got.dtype == torch.float32 else 1e-2
            off = error(got, right)
            assert off <= bound, f"{case.name} by {name} is wrong: {off:.1e}"
    return found


def measure(case, dtype, device, repeats):
    """One row for each implementation, and whether it was measured."""
    torch._dynamo.reset()  # else it gives up compiling at the eighth shape
    calls = implementations(case, device)
    x = torch.randn(case.shape, device=device, dtype=DTYPES[dtype])
    y = torch.empty_like(x)
    times = timed(calls | {"copy": lambda: y.copy_(x)}, device, repeats)
    graphs = {}
    if device.type == "cuda":
        replays = {name: captured(call)[0] for name, call in calls.items()}
        graphs = {name: statistics.median(t) for name, t in timed(replays, device, repeats).items()}
    copy = 2 * x.numel() * x.element_size() / statistics.median(times.pop("copy")) / 1e6
    rows = []
    for name in ("eager", "compile", "triton"):
        row = dict(what=case.name, shape=list(case.shape), dtype=dtype, impl=name)
        row["measured"] = name in times
        if name in times:
            row |= quantiles(times[name])
            best = graphs.get(name, row["ms"])  # bandwidth is what the device reaches, not Python
            speed = case.bytes / best / 1e6
            eager = graphs.get("eager", statistics.median(times["eager"]))
            row |= dict(graph_ms=graphs.get(name), bytes=case.bytes, gb_s=speed, copy_gb_s=copy)
            row |= dict(share=speed / copy, vs_eager=eager / best)
        rows.append(row)
    return rows


# ---- output ----------------------------------------------------------------------------------


def line(row):
    shape = "x".join(map(str, row["shape"]))
    start = f"{row['what']:28}{shape:20}{row['dtype']:6}{row['impl']:9}"
    if not row["measured"]:
        return start + "not measured"
    text = start + "".join(f"{row[k]:9.4f}" for k in ("ms", "p20", "p80"))
    text += f"{row['graph_ms']:10.4f}" if row["graph_ms"] else " " * 10
    text += f"{row['gb_s']:8.0f}{row['copy_gb_s']:8.0f}{row['share']:7.0%}"
    return text + f"{row['vs_eager']:8.2f}x"


def main(argv=None):
    parser = cli.Parser(prog="python -m tests.benchmarks.kernels", description=__doc__)
    for flag, options, text in (
        ("--shapes", {"nargs": "+", "default": SHAPES, "metavar": "N,C,H,W"}, " ".join(SHAPES)),
        ("--dtypes", {"nargs": "+", "default": list(DTYPES), "choices": DTYPES}, "fp32 bf16"),
        ("--repeats", {"type": int}, "100 on a GPU, else 3"),
        ("--json", {"type": Path, "metavar": "FILE"}, "on a GPU tests/benchmarks/results/"),
    ):
        parser.add_argument(flag, help=f"[{text}]", **options)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if not cuda:
        torch.set_num_threads(1)
    repeats = args.repeats or (100 if cuda else 3)
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    versions = dict(torch=torch.__version__)
    if cuda:
        versions["triton"] = importlib.import_module("triton").__version__
    today = datetime.date.today().isoformat()
    about = dict(device=name, versions=versions, date=today, repeats=repeats)
    path = args.json
    if path is None and cuda:
        file = f"kernels-{re.sub('[^A-Za-z0-9]+', '-', name).lower()}.json"
        path = Path(__file__).parent / "results" / file
    rows = []

    def keep(found, lines):
        """Rows as they come, so that nothing is lost where time runs out."""
        rows.extend(found)
        terminal.result("\n".join(lines))
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, about | {"rows": rows})

    terminal.result(", ".join([name, *(f"{k} {v}" for k, v in versions.items()), about["date"]]))
    if not cuda:
        terminal.result("no GPU: eager code alone is timed, and its figures say nothing about one")
    terminal.result(HEAD)
    for shape in (tuple(map(int, s.split(","))) for s in args.shapes):
        for dtype in args.dtypes:
            for case in cases(shape, DTYPES[dtype], device):
                done = any((r["what"], tuple(r["shape"])) == (case.name, case.shape) for r in rows)
                if case.name.startswith("icr") and (done or dtype != "fp32"):
                    continue  # scores are float32 under every precision, and one row for each N
                found = measure(case, dtype, device, repeats)
                keep(found, map(line, found))
    if path:
        terminal.result(str(path))


if __name__ == "__main__":
    cli.guard(main)
