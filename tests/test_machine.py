"""common/machine.py and terminal.py: what fits this machine, and terminals that are gone."""
import json
import subprocess
import sys

import pytest
import torch

from common import machine
from tests.helpers import CACHE, ROOT, TINY, flags, script, shell, train


@pytest.mark.parametrize("times, wanted", [((1.0, 2.0), "fp32"), ((2.0, 1.0), "bf16")])
def test_the_precision_is_the_faster_one_by_its_minimum(times, wanted, monkeypatch):
    def alternating(steps):  # fp32 first; a busy moment, 9, must not count
        return {name: [t, 9.0] for name, t in zip(steps, times)}

    monkeypatch.setattr(machine, "_alternating", alternating)
    assert machine.fastest(torch.device("cpu"), "auto", 1) == (wanted, 1)
    assert machine.fastest(torch.device("cpu"), "fp32", 3) == ("fp32", 3)


@pytest.mark.parametrize("seconds, wanted", [({1: 8, 2: 5, 4: 3, 8: 2.9}, 4), ({1: 8, 2: 7.5}, 1)])
def test_threads_double_as_long_as_it_pays(seconds, wanted, monkeypatch):
    def alternating(steps):  # by the median: one quick moment of many threads does not count
        return {n: [seconds[n], seconds[n], 0.1 * seconds[n]] for n in steps}

    monkeypatch.setattr(machine, "_alternating", alternating)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.fastest(torch.device("cpu"), "fp32", 0) == ("fp32", wanted)


def test_a_cpu_without_bf16_trains_in_fp32(tmp_path):
    """oneDNN held to AVX2, as on most laptops, where bf16 is several times slower than fp32."""
    line = flags({**TINY, "precision": "auto", "out_dir": tmp_path, "cache_dir": CACHE})
    line.remove("--quiet")
    done = shell("lsgan.py", *line, env={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    saved = json.loads((folder / "args.json").read_text())["args"]
    final = json.loads((folder / "metrics.json").read_text())
    assert saved["precision"] == "fp32" == final["measured_on"]["trained_in"]
    assert "in fp32" in done.stderr.splitlines()[0]


def test_what_was_resolved_stands_in_the_folder(tmp_path):
    folder = train("lsgan", tmp_path, precision="auto", threads=0)
    saved = json.loads((folder / "args.json").read_text())["args"]
    assert saved["precision"] in ("fp32", "bf16") and saved["threads"] >= 1


def test_an_unresolved_precision_is_fp32():
    m = script("lsgan")
    args = m.Args(width=4, z_dim=8, batch_size=4)
    nets, seen = m.build(args), []
    nets["generator"].body.register_forward_hook(lambda net, x, y: seen.append(y.dtype))
    m.updates(nets, args)[1]()
    assert args.precision == "auto" and seen == [torch.float32]


# ---- terminals


def run_script(*words, out_dir, **popen):
    line = flags({**TINY, "out_dir": out_dir, "cache_dir": CACHE, "log_every": 1})
    line.remove("--quiet")
    command = [sys.executable, "lsgan.py", *map(str, line), *words]
    return subprocess.Popen(command, cwd=ROOT, **popen)


def test_a_reader_that_leaves_does_not_end_a_run(tmp_path):
    """python lsgan.py 2>&1 | head -1"""
    process = run_script(out_dir=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert len(list(tmp_path.glob("*/generator.pt"))) == 1


def test_closed_streams_and_names_that_cannot_be_shown_do_not_either(tmp_path):
    code = (
        "import os, sys\n"
        "sys.stderr = None\n"
        "sys.argv[0] = 'lsgan.py'\n"
        "import lsgan\n"
        "from common.cli import cli\n"
        "cli(lsgan.main, lsgan.Args, lsgan.__doc__)\n"
    )
    out = tmp_path / "läufe"
    line = flags({**TINY, "out_dir": out, "cache_dir": CACHE})
    done = shell("-c", code, *line, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "precision" in done.stdout and "l\\xe4ufe" in done.stdout
