"""Everything that a GPU must be asked, in one command of a few minutes.

    python -m tests.benchmarks.gpu --minutes 8 --out FOLDER

Each part runs in a process of its own with a limit of its own, so that no failure costs the rest:
tests, kernels, whole updates of every script, two real trainings, what one update spends its time
on, and last torch.compile as the peer. FOLDER holds at most eight files, written as the parts end:
gpu.json, table.txt, logs.tar.gz and up to five grids. Without a GPU the parts that a CPU has run,
smaller, in about two minutes.
"""
import importlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from common import cli, files, machine, terminal
from tests.benchmarks import train

ROOT = Path(__file__).parents[2]
GRIDS = 5
LEAST = 10  # seconds below which a part is not begun


class Part(NamedTuple):
    name: str
    words: list  # of a Python command line
    share: float  # of the whole time, at most; what a part leaves goes to the others
    result: str = ""  # json that it writes, in the folder of the part


def installed(data_dir):
    """Which of the sets for the trainings lie in data_dir: nothing is downloaded."""
    mnist = (Path(data_dir) / "MNIST" / "raw").is_dir()
    cifar10 = (Path(data_dir) / "cifar-10-batches-py").is_dir()
    folder = Path(data_dir) / "cifar10-png"
    colour = "cifar10" if cifar10 else str(folder) if folder.is_dir() else None
    return "mnist" if mnist else "digits", colour


def parts(cuda, a, work):
    """The parts in their order, and notes on what is left out. work: the folder of their files."""
    notes = []
    dataset, colour = installed(a.data_dir)
    seconds = 60 * a.minutes
    bench = ["-m", "tests.benchmarks.train", "--no-compile", "--device", "cuda" if cuda else "cpu"]

    def runs(script, data, name, share, *words):
        shared = f"--dataset {data} --device {'cuda' if cuda else 'cpu'} --threads 1 --seed 0"
        words = [*shared.split(), *words, "--data-dir", a.data_dir, "--cache-dir", a.cache_dir]
        words += ["--max-minutes", f"{share * a.minutes:.3f}", "--out-dir", str(work / name)]
        words += ["--eval-every", "0", "--sample-every", "0"]
        return Part(name, [f"{script}.py", *words], 1.6 * share + 20 / seconds)

    if not cuda:
        small = f"{work}/kernels.json"
        few = ["--shapes", "8,3,16,16", "--repeats", "1", "--json", small]
        tiny = "--width 4 --batch-size 4 --rounds 1 --round-s 0 --sizes default --json".split()
        found = [
            Part("tests", "-m pytest -q tests/test_augment.py -k equals_the_scripts".split(), 0.2),
            Part("kernels", ["-m", "tests.benchmarks.kernels", *few], 0.2, small),
        ]
        for name in ("lsgan", "icr_gan"):
            path = f"{work}/train-{name}.json"
            words = [*bench, "--scripts", name, *tiny, path]
            found.append(Part(f"updates of {name}", words, 0.2, path))
        found.append(runs("lsgan", "digits", "lsgan", 0.1, "--eval-samples", "500", "--width", "8"))
        path = f"{work}/profile.json"
        found.append(Part("profile", ["-m", "tests.benchmarks.gpu", "--profile", path], 0.2, path))
        return found, ["no GPU: parts of a CPU only, and small"]

    path = f"{work}/kernels.json"
    shapes = ["64,1,32,32", "64,3,64,64", "256,3,256,256"]
    words = ["--shapes", *shapes, "--repeats", "30", "--json", path]
    found = [
        Part("tests", "-m pytest -q -m gpu --tb=short --durations=8 tests".split(), 0.25),
        Part("kernels", ["-m", "tests.benchmarks.kernels", *words], 0.12, path),
    ]
    for name in train.scripts():
        path = f"{work}/train-{name}.json"
        words = [*bench, "--scripts", name, "--sizes", "default", "--rounds", "3"]
        words += ["--round-s", "0.2", "--json", path]
        found.append(Part(f"updates of {name}", words, 0.08, path))
    wide = "--width 64 --batch-size 128".split()
    for script in ("icr_gan", "lsgan"):
        found.append(runs(script, dataset, f"{script} on {dataset}", 0.1, *wide))
    if colour:
        found.append(runs("icr_gan", colour, "icr_gan on cifar10", 0.12, *wide))
    else:
        notes.append(f"icr_gan on cifar10 is skipped: {a.data_dir} has no CIFAR-10")
    path = f"{work}/profile.json"
    found.append(Part("profile", ["-m", "tests.benchmarks.gpu", "--profile", path], 0.06, path))
    for name in ("lsgan", "icr_gan"):
        path = f"{work}/compile-{name}.json"
        words = [w for w in bench if w != "--no-compile"]
        words += "--variants eager,compile --sizes default --rounds 3 --round-s 0.2".split()
        words += ["--scripts", name, "--json", path]
        found.append(Part(f"compile of {name}", words, 0.15, path))
    return found, notes


def run(part, limit, log):
    """(exit code or "limit", seconds) of a part, whose output goes to the file log."""
    began = time.monotonic()
    with open(log, "w") as f:
        process = subprocess.Popen(
            [sys.executable, *part.words], cwd=ROOT, stdout=f, stderr=subprocess.STDOUT,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            while process.poll() is None:
                spent = time.monotonic() - began
                terminal.progress(f"{part.name}: {spent:.0f} of at most {limit:.0f} s")
                try:
                    process.wait(min(1, max(0.01, limit - spent)))
                except subprocess.TimeoutExpired:
                    if time.monotonic() - began >= limit:
                        break
            code = process.poll()
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):  # it, and what it has started
                try:
                    os.killpg(process.pid, how)
                    process.wait(3)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
    return ("limit" if code is None else code), time.monotonic() - began


# ---- a profile -------------------------------------------------------------------------------


def profile(path):
    """What the steps of icr_gan spend their time on, eager and as graphs; to a json file."""
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    found = {}
    for variant in ("eager", "kernels+graphs+bf16") if cuda else ("eager",):
        once, _ = train.made("icr_gan", "default", variant, device, 1, {})
        with torch.profiler.profile(activities=activities) as seen:
            for _ in range(3):
                once()
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(seen.key_averages(), key=lambda e: -getattr(e, key))[:15]
        found[variant] = [
            {"name": e.key[:90], "calls": e.count / 3, "us": getattr(e, key) / 3} for e in rows
        ]
        for r in found[variant]:
            terminal.result(f"{variant:20}{r['us']:10.1f} us {r['calls']:6.1f} x  {r['name']}")
    files.write_json(path, found)


# ---- what is left in the folder --------------------------------------------------------------


def summary(part, code, seconds, log, work):
    """A row of the table: dict of what a part came to."""
    text = log.read_text(errors="replace").strip()
    # the last line of many parts is a file in the folder, which is gone by then
    lines = [m for m in text.splitlines() if not m.startswith(str(work))] or [""]
    telling = [m for m in lines if re.search(r"\d+ passed|\d+ failed|\bFID\b", m)]
    said = (telling or lines)[-1].replace(str(work), "FOLDER").strip(" =")[:160]
    row = {"part": part.name, "code": code, "seconds": round(seconds, 1), "said": said}
    if part.result and Path(part.result).exists():
        row["result"] = json.loads(Path(part.result).read_text())
    for folder in (work / part.name).glob("*/"):
        if (folder / "metrics.json").exists():
            row["result"] = json.loads((folder / "metrics.json").read_text())
    return row


def lines_of(row):
    """The part, and below it the rows of its own table."""
    yield f"{row['part']:24}{row['code']!s:>6}{row['seconds']:8.0f} s  {row['said']}"
    result = row.get("result", {})
    if row["part"].startswith(("updates", "compile")):
        yield from (f"    {train.line(r)}" for r in result.get("rows", ()))
        yield from (f"    {v:6.2f}  {text}" for text, v in result.get("ratios", {}).items())
    elif row["part"] == "kernels":
        line = importlib.import_module("tests.benchmarks.kernels").line
        yield from (f"    {line(r)}" for r in result.get("rows", ()) if r["measured"])


def leave(out, rows, notes, about, logs, work):
    """Write the files of the folder out anew, from what there is by now."""
    files.write_json(out / "gpu.json", about | {"notes": notes, "parts": rows})
    text = [" ".join(f"{k} {v}" for k, v in about.items()), *notes, f"    {train.head()}"]
    for row in rows:
        text += lines_of(row)
    files.write_atomic(out / "table.txt", ("\n".join(text) + "\n").encode())
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(logs, "logs")
    files.write_atomic(out / "logs.tar.gz", archive.getvalue())
    grids = sorted(work.glob("*/*/samples.png"))[:GRIDS]
    for path in grids:
        name = re.sub(r"\W+", "-", path.parent.parent.name)
        shutil.copy(path, out / f"{name}.png")
    return "\n".join(text)


def arguments(argv):
    p = cli.Parser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    for flag, options, text in (
        ("--minutes", {"type": float, "default": 8}, "of everything [8]"),
        ("--out", {"default": "runs/gpu"}, "folder of the results [runs/gpu]"),
        ("--parts", {}, "only those whose names begin so, comma-separated"),
        ("--data-dir", {"default": "data"}, "[data]"),
        ("--cache-dir", {"default": "data/cache"}, "[data/cache]"),
        ("--profile", {"metavar": "FILE"}, "only the profile, to a json file"),
    ):
        p.add_argument(flag, help=text, **options)
    a = p.parse_args(argv)
    if not a.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {a.minutes}")
    return a


def main(argv=None):
    """Run the parts; returns their rows."""
    a = arguments(argv)
    if a.profile:
        return profile(a.profile)
    cuda = torch.cuda.is_available()
    out, began = Path(a.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
        "triton": metadata.version("triton") if find_spec("triton") else None,
        "python": platform.python_version(), "cores": machine.cores(),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        work, logs = Path(temporary) / "work", Path(temporary) / "logs"
        work.mkdir(), logs.mkdir()
        todo, notes = parts(cuda, a, work)
        if a.parts:
            todo = [p for p in todo if p.name.startswith(tuple(a.parts.split(",")))]
        for part in todo:
            left = 60 * a.minutes - (time.monotonic() - began)
            if left < LEAST:
                notes.append(f"{part.name} is skipped: the time is over")
                continue
            log = logs / f"{re.sub(r'[^A-Za-z0-9_]+', '-', part.name)}.log"
            code, seconds = run(part, min(left, 60 * a.minutes * part.share), log)
            rows.append(summary(part, code, seconds, log, work))
            terminal.note(next(lines_of(rows[-1])))
            leave(out, rows, notes, about, logs, work)
        table = leave(out, rows, notes, about, logs, work)
    terminal.result(table)
    terminal.result(str(out))
    return rows


if __name__ == "__main__":
    cli.guard(main)
