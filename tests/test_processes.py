"""Several processes, as torchrun starts them, on the CPU: equal updates, one run folder, no hangs."""
import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from common import data, processes, run, scores
from tests.helpers import CACHE, ROOT, TINY, assert_same, flags, script

TIMEOUT = 240  # seconds for seconds of work: a hang is a failure, a busy machine is none
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*words):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*TORCHRUN, *map(str, words)], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found, see process_helpers.everything; one launch serves many tests."""
    folder = tmp_path_factory.mktemp("processes")
    done = torchrun("-m", "tests.process_helpers", folder, "everything")
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=False)


def distance(a, b):
    """Largest difference relative to the largest entry of each parameter."""
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max()).item() for k in a)


@pytest.mark.parametrize("case, tolerance", [("float64", 1e-12), ("float32", 3e-5), ("penalty", 1e-12)])
def test_two_processes_on_the_halves_of_a_batch_do_the_update_of_the_whole(found, case, tolerance):
    """A critic of two layers with the gradient penalty; alone, that gives the last bias no gradient."""
    assert distance(found[case]["halves"], found[case]["whole"]) < tolerance


def test_a_gradient_that_only_one_rank_has_is_averaged_with_zeros(found):
    assert found["pieces"]["stepped"] == [[[-1.5, -1.5], [-0.5, -0.5]]] * 2


def test_only_running_statistics_are_averaged(found):
    pieces = found["pieces"]
    assert pieces["mean"].tolist() == [0.5, 0.5]
    assert pieces["tracked"] == [0, 1] and pieces["other"] == [0.0, 1.0] and pieces["untouched"]


def test_each_rank_has_its_noise_and_its_share_of_every_batch(found):
    pieces = found["pieces"]
    a, b = pieces["noise"]
    assert not torch.equal(a, b)
    pixels = torch.arange(22 * 3 * 4, dtype=torch.uint8).view(22, 3, 2, 2)
    for whole, parts in zip(data.Batches(pixels, 4, 0, "cpu"), pieces["batches"]):
        assert torch.equal(whole, torch.cat(parts)) and len(parts[0]) == len(parts[1]) == 2
    assert pieces["share"] == TINY["batch_size"] // 2 and pieces["world"] == ([0, 1], 2)


def test_numbers_are_agreed_on(found):
    pieces = found["pieces"]
    assert pieces["average"]["a"] == 1.5 and pieces["average"]["b"] != pieces["average"]["b"]
    assert pieces["maximum"] == (1, 0) and pieces["broadcast"] == [5, 5]


def test_ranks_end_with_the_same_networks(found):
    a, b = found["whole"]
    assert_same(a, b)


def test_a_resumed_run_of_two_ranks_equals_the_uninterrupted_one(found):
    assert_same(found["whole"][0], found["resumed"][0])
    whole, part = (torch.load(f"{f}/checkpoint.pt", weights_only=True) for f in found["folders"])
    assert whole["step"] == part["step"] == 4 and len(whole["ranks"]) == 2
    for x, y in zip(whole["ranks"], part["ranks"]):
        assert torch.equal(x["cpu"], y["cpu"])
    assert not torch.equal(whole["ranks"][0]["cpu"], whole["ranks"][1]["cpu"])


def test_metrics_are_those_of_the_same_images_scored_by_one_process(found):
    folder = found["folders"][0]
    nets, args, m = run.load(folder)

    def generate(n, rng):
        return m.sample(nets, args, m.latents(n, args, rng))

    images = data.load_images("digits", cache_dir=CACHE)
    row = scores.of_generator(generate, images, args)()
    with open(f"{folder}/metrics.csv") as f:
        saved = list(csv.DictReader(f))[-1]
    assert saved["n"] == str(args.eval_samples)
    assert float(saved["fid"]) == pytest.approx(row["fid"], rel=1e-6)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(found):
    (what, step), other = found["signal"]
    assert what == "Stopped" and other == (what, step) and 3 <= step < 50  # they agree now and then


def test_a_loss_that_is_nan_on_one_rank_ends_all(found):
    assert found["nan"] == [("Diverged", 3), ("Diverged", 3)]


def test_torchrun_of_the_script_leaves_one_run_folder(tmp_path):
    line = flags(TINY | {"out_dir": tmp_path, "cache_dir": CACHE, "log_every": 1})
    line.remove("--quiet")
    done = torchrun("lsgan.py", *line)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    assert {"checkpoint.pt", "generator.pt", "metrics.json", "samples.png"} <= names
    with open(folder / "log.csv") as f:
        assert [(r["step"], r["images"]) for r in csv.DictReader(f)] == [("1", "8"), ("2", "16")]
    assert json.loads((folder / "metrics.json").read_text())["n"] == 64
    assert done.stdout.count("precision") == 1 and done.stderr.count("2 processes") == 1


def test_a_rank_that_dies_ends_the_others_with_an_error(tmp_path):
    done = torchrun("-m", "tests.process_helpers", tmp_path, "death")  # a hang runs into its time limit
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "exitcode  : -9" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_once(signum, tmp_path):
    """torchrun passes it on to all; from a terminal Ctrl-C reaches them a second time, by itself."""
    line = flags(TINY | {"out_dir": tmp_path, "cache_dir": CACHE, "log_every": 2, "steps": 10**6, "eval_every": 0})
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    process = subprocess.Popen([*TORCHRUN, "lsgan.py", *line], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT
    while not any(p.read_text().count("\n") > 4 for p in tmp_path.glob("*/log.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=TIMEOUT)
    (folder,) = tmp_path.iterdir()
    assert process.returncode != 0 and err.count(f"--resume {folder}") == 1, err[-3000:]
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] >= 8 and len(saved["ranks"]) == 2


def test_a_batch_that_cannot_be_shared_is_bad_input(monkeypatch):
    monkeypatch.setattr(processes, "ranks", lambda: 3)
    with pytest.raises(ValueError, match="batch_size is 8; wanted a multiple of the 3"):
        processes.share(script("lsgan").Args(**TINY))
