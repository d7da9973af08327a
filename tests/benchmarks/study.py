"""Every method at equal cost, with a spread: trains them all, keeps one csv, draws what it says.

    python -m tests.benchmarks.study --minutes 3 --seeds 3                # equal time
    python -m tests.benchmarks.study --minutes 3 --seeds 3 --subset 500   # the same on little data
    python -m tests.benchmarks.study --steps 4000 --methods lsgan,icr-.05 # equal updates of G
    python -m tests.benchmarks.study --minutes 1 --settings 16            # random hyper-parameters
    python -m tests.benchmarks.study --steps 10000 --dataset cifar10 --add="--width 64"
    python -m tests.benchmarks.study --report                             # from the csv alone
    python -m tests.benchmarks.study --ratios lsgan --csv ONE,OTHER       # pair by pair

Each run is a script's own command line with --threads 1 and one precision, in a process of its own;
--jobs N of them train at once. A row of the csv is a run that has ended or diverged: it is not made
again, so a study that was interrupted goes on, and a second one adds to it. Equal time is equal on
one machine alone: with --minutes another one wants a --csv FILE of its own. lsgan with seed 0 is
trained again after every few runs, as `reference`, which shows the machine's part in a spread.

--settings K: K random draws of the hyper-parameters from RANGES; draw k of an argument is the same
for every method that has it, so that no method is lucky in its rates. The curve is the smallest
distance that so many settings reach on average (Lucic et al. 2018, arXiv:1711.10337, figure 2).

The control is the distance by the yardstick's classifier, on MNIST in grey.
"""
import base64
import contextlib
import csv
import fcntl
import importlib
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import date
from pathlib import Path

import torch

from common import cli, files, machine, terminal
from tests.benchmarks import study_report

ROOT = Path(__file__).parents[2]
PAPER = "--lambda-real 10 --lambda-fake 10 --lambda-dis 5 --lambda-gen 0.5"
OFF = "--lambda-real 0 --lambda-fake 0 --lambda-dis 0 --lambda-gen 0"
LAZY = "-m tests.benchmarks.lazy"
ICR = "icr_gan.py --consistency-share"  # of the images that the terms see
BCR = f"{OFF} --lambda-real 10 --lambda-fake 10"
METHODS = {  # name: command
    "lsgan": "lsgan.py",
    "vanilla": "lsgan.py --loss vanilla",
    "wgan_gp": "wgan_gp.py",
    "wgan": "wgan_gp.py --clip 0.01 --lr 5e-4",
    "cn_lsgan": "cn_lsgan.py",
    "cn_lsgan-0": "cn_lsgan.py --gp-target 0 --lambda-gp 10 --lambda-rec 0",
    "ebgan": "ebgan.py --lambda-pt 0",
    "ebgan-pt": "ebgan.py",
    "began": "began.py",
    "vaegan": "vaegan.py",
    "icr-.03": f"{ICR} 1 --sigma 0.03",
    "icr-.05": f"{ICR} 1 --sigma 0.05",
    "icr-.1": f"{ICR} 1 --sigma 0.1",
    "cr": f"{ICR} 1 {OFF} --lambda-real 10",
    "bcr": f"{ICR} 1 {BCR}",
    "zcr": f"{ICR} 1 {OFF} --lambda-dis 5 --lambda-gen 0.5",
    # the course's mistake, on purpose: digits mirrored, and none moved
    "icr-course": f"{ICR} 1 {PAPER} --sigma 0.03 --flip on --shift 0",
}
OTHERS = {  # only where --methods names them: consistency on a share of the images,
    "icr-half": f"{ICR} 0.5",
    "icr-quarter": f"{ICR} 0.25",
    "icr-eighth": f"{ICR} 0.125",
    "bcr-half": f"{ICR} 0.5 {BCR}",
    "bcr-quarter": f"{ICR} 0.25 {BCR}",
    "bcr-eighth": f"{ICR} 0.125 {BCR}",
    # what of the course's T is the mistake: the mirror beside the shift, and neither of them,
    "icr-mirror": f"{ICR} 1 {PAPER} --sigma 0.03 --flip on",
    "icr-still": f"{ICR} 1 {PAPER} --sigma 0.03 --flip off --shift 0",
    # at every so manyth update,
    "icr-lazy-2": f"{LAZY} 2 --consistency-share 1",
    "icr-lazy-4": f"{LAZY} 4 --consistency-share 1",
    "icr-lazy-8": f"{LAZY} 8 --consistency-share 1",
    # and image to image, on data and with scores of their own
    "pix2pix": "pix2pix.py --dataset blueprints",
    "cyclegan": "cyclegan.py --dataset stripes",
}
# the distance that the course behind this project reports, of its own digits and networks
COURSE = {"lsgan": 26.58, "wgan_gp": 42.21, "icr-.03": 61.626, "icr-.05": 60.286, "icr-.1": 54.920}
COURSE["icr-course"] = COURSE["icr-.03"]
BASE, AGAIN = "lsgan", study_report.AGAIN
REFERENCE_EVERY = 8  # runs
# what a run can say last and be a result all the same; any other failure is one of the machine
DIVERGED, LATE = "turned NaN or infinite", "had not ended after"
RANGES = {  # of --settings; an argument that a method's own command gives stays
    "lr": lambda r, old: 10 ** r.uniform(-4, -2),
    "beta1": lambda r, old: r.choice([0.0, 0.5, 0.9]),
    "beta2": lambda r, old: r.choice([0.9, 0.99, 0.999]),
    "lr_decay": lambda r, old: r.choice([0.0, 0.5, 1.0]),
    "width": lambda r, old: r.choice([8, 16, 32]),
    "n_critic": lambda r, old: r.choice([1, 2, 5]),
    "sigma": lambda r, old: 10 ** r.uniform(-2, -0.5),
    "lambda_": lambda r, old: old * 10 ** r.uniform(-1, 1),  # every weight that is on
}
OURS = (  # arguments of every run that --add cannot give
    "--dataset --subset --steps --max-minutes --seed --device --threads --precision --eval-every "
    "--eval-samples --sample-every --data-dir --cache-dir --out-dir --quiet --resume --help"
).split()
SCORES = ("fid", "precision", "recall", "density", "coverage")
GROUP = study_report.GROUP  # what a table is of
KEY = (*GROUP, "method", "setting", "seed")
COLUMNS = (*KEY, "args", "steps", "images", "seconds", "features", *SCORES, "control", "failed")
COLUMNS += ("torch", "date", "machine", "jobs", "wall", "evaluations", "samples")


# ---- what is to be done ----------------------------------------------------------------------


def arguments_of(words):
    """Args of a command of METHODS."""
    path, *typed = words if words[:2] != LAZY.split() else ("icr_gan.py", *words[3:])
    return cli.parse(importlib.import_module(Path(path).stem).Args, typed)


def drawn(words, k):
    """Arguments of the k-th random setting of a method's command, as words; none for k = 0."""
    if not k:
        return []
    found, given = [], [word.split("=")[0] for word in words]
    for key, old in vars(arguments_of(words)).items():
        rule = RANGES["lambda_"] if key.startswith("lambda_") and old else RANGES.get(key)
        flag = "--" + key.replace("_", "-")
        if rule and flag not in given:
            # by the argument, not the method: all that have it get the same
            found += [flag, f"{rule(random.Random(f'{key} {k}'), old):.4g}"]
    return found


def listed(a):
    """The runs that arguments a ask for, in the order of the work, as dicts of KEY and args."""
    methods, jobs = METHODS | OTHERS, []

    def add(method, command, seed, setting):
        words = shlex.split(command)
        extra = [] if method == AGAIN else drawn(words + shlex.split(a.add), setting)
        data = words[words.index("--dataset") + 1] if "--dataset" in words else a.dataset
        budget = f"{a.minutes:g} min" if a.minutes else f"{a.steps} steps"
        group = data, a.add, a.subset, budget, a.precision, a.n
        key = {k: str(v) for k, v in zip(KEY, (*group, method, setting, seed), strict=True)}
        jobs.append(key | {"args": shlex.join(words + extra)})

    done = 0
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        for setting in range(1, a.settings + 1) if a.settings else (0,):
            for name in a.methods:
                if done % REFERENCE_EVERY == 0 and not a.no_reference:
                    # named by its place, so that a longer study has more of them
                    place = f"before-{name}-{setting}-{seed}"
                    add(AGAIN, METHODS[BASE], 0, place)
                add(name, methods[name], seed, setting)
                done += 1
    return jobs


def same(one, other, *columns):
    return all(str(one[c]) == str(other[c]) for c in columns)


def key_of(row):
    return tuple(str(row[k]) for k in KEY)


# ---- one run ---------------------------------------------------------------------------------


class Study:
    """The processes of a study, its csv, and the folder in which its runs lie while they train."""

    def __init__(self, a, path, out_dir):
        self.a, self.path, self.out_dir = a, path, out_dir
        self.running, self.lock, self.stopping = set(), threading.RLock(), False
        self.scoring, self.scored = threading.Lock(), False
        self.signum = None  # of the signal that stopped it
        self.rates = {}  # updates of G per second by data, added and method, of default runs
        self.rows = load(path)
        for row in self.rows:
            self._learn(row)

    def _learn(self, row):
        default = row["setting"] == "0" or row["method"] == AGAIN
        if row["steps"] and default and row["dtype"] == self.a.precision:
            rate = int(row["steps"]) / max(1e-9, float(row["seconds"]))
            self.rates[row["dataset"], row["added"], row["method"]] = rate

    def command(self, *words, limit=None):
        """(exit code, stdout, the last line of stderr) of a Python process, which stop() ends."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            with self.lock:
                if self.stopping:
                    return -signal.SIGTERM, "", "stopped"
                process = subprocess.Popen(
                    [sys.executable, *words], cwd=ROOT, stdout=out, stderr=err,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                self.running.add(process)
                if self.stopping:  # by a signal while it was being started
                    process.kill()
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                process.kill()
                return 1, "", f"{LATE} {limit / 60:g} min"
            finally:
                code = process.wait()
                self.running.discard(process)
            out.seek(0), err.seek(0)
            lines = [line for line in err.read().splitlines() if line.strip()]
            return code, out.read(), lines[-1] if lines else ""

    def stop(self, signum=None, frame=None):
        with self.lock:
            self.stopping, self.signum = True, self.signum or signum
            for process in list(self.running):
                process.kill()  # nothing of a run that did not end is kept

    def shared(self):
        """Arguments that all runs have."""
        a = self.a
        words = f"--threads 1 --precision {a.precision} --eval-samples {a.n} --sample-every 0"
        words = [*words.split(), "--quiet", "--device", a.device, "--data-dir", a.data_dir]
        return [*words, "--cache-dir", a.cache_dir]

    def prepare(self, jobs):
        """Fill the caches of the jobs once, before many processes would fill them at once."""
        if all(j["dataset"] != self.a.dataset for j in jobs):
            return  # image to image alone, which must not ask for mnist
        out = str(self.out_dir / "first")
        words = ["--steps", "1", "--dataset", self.a.dataset, "--eval-every", "0", "--out-dir", out]
        for word in shlex.split(self.a.add):  # a larger image has a cache of its own
            with contextlib.suppress(ValueError):
                words += more_arguments(word, [BASE])
        code, _, said = self.command("lsgan.py", *self.shared(), *words)
        if code and not self.stopping:
            raise cli.Diverged(f"a first step of lsgan.py failed: {said}")
        shutil.rmtree(out, ignore_errors=True)

    def control(self, folder, dataset):
        a = self.a
        if a.no_control or dataset != "mnist":
            return ""
        words = ["-m", "tests.benchmarks.study", "--n", str(a.n)]
        words += ["--data-dir", a.data_dir, "--cache-dir", a.cache_dir, "--score"]
        with self.scoring:  # the first call trains the classifier, for which the others wait
            if not self.scored:
                self.command(*words, "")
                self.scored = True
        code, text, said = self.command(*words, folder)
        if code and not self.stopping:
            terminal.warn(f"no control of {folder}: {said}")
        return text.split()[-1] if not code else ""

    def words_of(self, job, out):
        """The command line of a job, whose run folder is made in out."""
        a = self.a
        words = shlex.split(job["args"]) + self.shared()
        words += ["--max-minutes", str(a.minutes)] if a.minutes else ["--steps", str(a.steps)]
        words += ["--seed", job["seed"], "--out-dir", str(out)]
        words += [] if "--dataset" in words else ["--dataset", a.dataset]
        words += ["--subset", str(a.subset)] if a.subset else []
        words += shlex.split(job["added"])
        if a.evals == 1:
            return [*words, "--eval-every", "0"]
        known = job["dataset"], job["added"]
        guess = self.rates.get((*known, AGAIN), 30) / 2  # a method's first run has no rate yet
        steps = a.steps or 60 * a.minutes * self.rates.get((*known, job["method"]), guess)
        return [*words, "--eval-every", str(max(1, math.ceil(steps / a.evals)))]

    def run(self, job):
        """Train one job and keep its row; nothing of a run that was stopped."""
        a, began = self.a, time.monotonic()
        if key_of(job) in map(key_of, load(self.path)):
            return  # another study of this csv was faster
        out = Path(tempfile.mkdtemp(dir=self.out_dir))
        limit = 60 * (4 * a.minutes + 15) if a.minutes else None  # who is not back by then hangs
        try:
            code, _, said = self.command(*self.words_of(job, out), limit=limit)
            result = not code or DIVERGED in said or LATE in said
            failed = said.removeprefix("error: ") if code else ""
            if self.stopping or not result:
                if not self.stopping:
                    terminal.warn(f"{job['args']}, seed {job['seed']}: exit code {code}: {said}")
                return
            row = dict.fromkeys(COLUMNS, "") | job
            row |= {"torch": torch.__version__, "date": f"{date.today()}", "jobs": a.jobs}
            row["machine"] = chip(a.device)
            if failed:
                row["failed"] = failed
            else:
                (folder,) = out.iterdir()
                row |= finished(folder) | {"control": self.control(str(folder), job["dataset"])}
                shown = job["seed"] == str(a.first_seed) and job["setting"] == "0"
                if shown and job["method"] != AGAIN:
                    row["samples"] = first_samples(folder)
            if self.stopping:
                return
            row["wall"] = f"{time.monotonic() - began:.1f}"
            self.keep({k: str(v) for k, v in row.items()})
        finally:
            for folder in out.iterdir() if a.keep else ():
                name = f"{job['method']}-{job['setting']}-{job['seed']}-{folder.name}"
                shutil.move(folder, self.out_dir / name)
            shutil.rmtree(out, ignore_errors=True)

    def left(self, n, job):
        """How long n more runs like this one take, in words."""
        alike = [r for r in self.rows if r["wall"] and same(r, job, "dataset", "budget", "added")]
        found, minutes = [float(r["wall"]) for r in alike[-20:]], self.a.minutes
        each = statistics.mean(found) if found else 60 * minutes + 30 if minutes else 120
        return f"{each * math.ceil(n / self.a.jobs) / 60:.0f} min"

    def keep(self, row):
        with self.lock, alone(self.path):
            self._learn(row)
            self.rows = load(self.path)
            if key_of(row) not in map(key_of, self.rows):
                self.rows.append(row)
                save(self.path, self.rows)
        told = ", ".join(f"{k} {row[k]}" for k in ("steps", "fid", "control") if row[k])
        name = f"{row['method']} setting {row['setting']} seed {row['seed']}"
        terminal.note(f"{name}: {row['failed'] or told}")


def chip(device):
    """The name of the GPU, else that of the CPU; of no name what kind it is."""
    device = machine.device_of(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux alone has it
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1].strip()
    return platform.processor() or platform.machine()


def finished(folder):
    """What the csv keeps of a run folder."""
    rows, log = files.read_csv(folder / "metrics.csv"), files.read_csv(folder / "log.csv")
    last = rows[-1]
    found = {"steps": last["step"], "seconds": last["seconds"], "features": last["features"]}
    found["images"] = log[-1]["images"] if log else ""
    found |= {k: last[k] for k in SCORES if k in last}
    return found | {"evaluations": json.dumps(rows, separators=(",", ":"))}


def first_samples(folder):
    """The first row of the last grid, a png in base64."""
    from PIL import Image

    from common.pictures import first_row

    buffer = io.BytesIO()
    first_row(Image.open(folder / "samples.png")).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def score(folder, a):
    """Print a run's distance by the yardstick's classifier; without a folder make that ready."""
    from common import data
    from tests.benchmarks import yardstick as y

    torch.set_num_threads(1)
    images = data.load_images("mnist", a.data_dir, y.IMAGE_SIZE, 1, a.cache_dir)
    ref = y.reference(images, a.cache_dir)
    if folder:
        found = y.extract(y.classifier_of(ref), y.sample_run(*y.load_run(folder), a.n))
        terminal.result(f"{y.frechet_from_features(ref['train'], found):.4f}")


# ---- the csv ---------------------------------------------------------------------------------


def load(path):
    csv.field_size_limit(2**24)  # samples are long
    return [{"added": "", "machine": ""} | row for row in files.read_csv(path, "seed")]


@contextlib.contextmanager
def alone(path):
    """No other study reads and writes the csv meanwhile."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def save(path, rows):
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_atomic(path, text.getvalue().encode())


def train(a, path):
    """Whatever of the study is not in the csv yet; returns whether all of it is there now."""
    have, jobs = {key_of(r): r["args"] for r in load(path)}, listed(a)
    changed = {j["method"] for j in jobs if have.get(key_of(j), j["args"]) != j["args"]}
    if changed:
        names = ", ".join(sorted(changed))
        terminal.warn(f"{path} has runs by other arguments than today's, which stay: {names}")
    todo = [j for j in jobs if key_of(j) not in have]
    if not todo:
        return True
    groups = {tuple(j[c] for c in GROUP) for j in todo if a.minutes}
    beside = [r for r in load(path) if tuple(r[c] for c in GROUP) in groups]
    if others := {r["machine"] or "an unnamed machine" for r in beside} - {chip(a.device)}:
        raise ValueError(
            f"{path} has runs of as many minutes on {', '.join(sorted(others))}, to which none of "
            f"{chip(a.device)} compares: give --csv FILE"
        )

    out_dir = Path(a.out_dir)
    study = Study(a, path, out_dir)
    done = f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {path}"
    terminal.note(f"{done}; the others take about {study.left(len(todo), todo[0])}")
    if a.dry_run:
        for j in todo:
            name = f"{j['method']:12} setting {j['setting']} seed {j['seed']}"
            terminal.result(f"{name}  {j['args']}")
        return False
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="study-", dir=out_dir) as temporary:
        study.out_dir = out_dir if a.keep else Path(temporary)
        work(study, todo)
    if study.signum:
        raise cli.Stopped(study.signum, f"stopped; {path} has what had ended, the same goes on")
    return {key_of(j) for j in jobs} <= {key_of(r) for r in load(path)}


def work(study, todo):
    """Run the jobs, --jobs at once, until they, --deadline or a signal end it."""
    a, began = study.a, time.monotonic()
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    asked = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores one
    before = {s: signal.signal(s, study.stop) for s in asked}
    with ThreadPoolExecutor(a.jobs) as pool:
        try:
            study.prepare(todo)
            running = {pool.submit(study.run, j) for j in todo}
            while running and not study.stopping:
                done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for d in done:
                    d.result()
                told = f"{len(todo) - len(running)}/{len(todo)} runs"
                left = study.left(len(running), todo[0])
                terminal.progress(f"study: {told}, about {left} left")
                if a.deadline and time.monotonic() - began > 60 * a.deadline:
                    study.stop()
        finally:
            study.stop()  # also where a thread has failed
            pool.shutdown(cancel_futures=True)
            for s, handler in before.items():
                signal.signal(s, handler)


# ---- the command -----------------------------------------------------------------------------


def more_arguments(text, methods):
    """What --add says as words, --flag=value each; ValueError for what cannot be added."""
    try:
        words = cli.one_spelling(shlex.split(text))
    except ValueError as e:
        raise ValueError(f"--add: {e}: {text}") from None
    found = []
    for word in words:
        if word.startswith("--"):
            found.append(word)
        elif not found or "=" in found[-1]:
            raise ValueError(f"--add: {word} follows no argument: {text}")
        else:
            found[-1] += f"={word}"
    flags = [word.split("=")[0] for word in found]
    if len(set(flags)) < len(flags):
        raise ValueError(f"--add gives an argument twice: {text}")
    for name in methods:
        command = shlex.split((METHODS | OTHERS)[name])
        for flag in flags:
            if flag in OURS or flag in command:
                whose = "the study" if flag in OURS else name
                raise ValueError(f"--add has {flag}, which {whose} gives itself")
        try:
            arguments_of([*command, *found])
        except ValueError as e:
            raise ValueError(f"--add: {name} does not take {text}: {e}") from None
    return sorted(found)


def arguments(argv):
    p = cli.Parser(prog="python -m tests.benchmarks.study", description=__doc__)
    for flag, options, text in (
        ("--minutes", {"type": float}, "training time of each run"),
        ("--steps", {"type": int}, "or its updates of G"),
        ("--seeds", {"type": int}, "seeds of each method [3, with --settings 1]"),
        ("--first-seed", {"type": int, "default": 0}, "the others follow it [0]"),
        ("--settings", {"type": int, "default": 0}, "random draws of each method's arguments [0]"),
        ("--subset", {"type": int, "default": 0}, "train on only that many images [0: all]"),
        ("--methods", {}, f"of {', '.join([*METHODS, *OTHERS])} [all but the last {len(OTHERS)}]"),
        ("--dataset", {"default": "mnist"}, "of all of them [mnist]"),
        ("--add", {"default": ""}, "more arguments of each run, as one word: --add='--width 64'"),
        ("--precision", {"default": "fp32", "choices": ["fp32", "bf16"]}, "of all of them [fp32]"),
        ("--jobs", {"type": int, "default": 1}, "trainings at once [1]"),
        ("--deadline", {"type": float}, "end then, in minutes; what trains is lost"),
        ("--evals", {"type": int, "default": 4}, "evaluations of a run, about [4]"),
        ("--n", {"type": int, "default": 10000}, "images of each [10000]"),
        ("--no-control", {"action": "store_true"}, "no distance by the yardstick's classifier"),
        ("--no-reference", {"action": "store_true"}, "no repeated run"),
        ("--device", {"default": "cpu"}, "cpu, cuda, cuda:1 [cpu]"),
        ("--data-dir", {"default": "data"}, "[data]"),
        ("--cache-dir", {"default": "data/cache"}, "[data/cache]"),
        ("--out-dir", {"default": "runs"}, "where runs lie while they train [runs]"),
        ("--keep", {"action": "store_true"}, "leave them there"),
        ("--csv", {"metavar": "FILE"}, "[tests/benchmarks/results/study-DEVICE.csv]"),
        ("--ratios", {"metavar": "METHOD"}, "train nothing: all over this one, pair by pair"),
        ("--report", {"action": "store_true"}, "train nothing: tables and pictures beside the csv"),
        ("--dry-run", {"action": "store_true"}, "say what is left to train"),
        ("--quiet", {"action": "store_true"}, "no progress on the terminal"),
        ("--score", {"metavar": "RUN"}, "print one run's distance by that classifier"),
    ):
        p.add_argument(flag, help=text, **options)
    a = p.parse_args(argv)
    a.methods = list(dict.fromkeys(a.methods.split(","))) if a.methods else list(METHODS)
    for name in a.methods:
        if name not in METHODS | OTHERS:
            raise ValueError(f"--methods has {name}{cli.close_to(name, METHODS | OTHERS)}")
    if a.ratios and a.ratios not in METHODS | OTHERS:
        raise ValueError(f"--ratios is {a.ratios}{cli.close_to(a.ratios, METHODS | OTHERS)}")
    if not (a.report or a.ratios or a.score is not None) and bool(a.minutes) == bool(a.steps):
        raise ValueError("give --minutes or --steps, the cost of each run; or --report")
    limits = {"jobs": 1, "evals": 1, "n": 6, "settings": 0, "subset": 0, "first_seed": 0}
    for name, least in limits.items():
        if getattr(a, name) < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be at least {least}, got {getattr(a, name)}")
    for name in ("minutes", "steps", "seeds"):
        if getattr(a, name) is not None and not getattr(a, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(a, name)}")
    if a.settings and (a.seeds or 1) > 1:
        raise ValueError("--settings goes with one seed: each draw is a run")
    if a.settings and (own := [m for m in a.methods if "--dataset" in (METHODS | OTHERS)[m]]):
        raise ValueError(f"--settings compares by one distance; {own[0]} has scores of its own")
    a.seeds = a.seeds or (1 if a.settings else 3)
    trained = [*a.methods, *([] if a.no_reference else [BASE])]
    a.add = shlex.join(more_arguments(a.add, trained)) if a.add else ""
    return a


def over(base, paths):
    """Print what the methods in some csv files are to base, on the runs of one seed."""
    rows = []
    for path in paths:
        found = load(Path(str(path).strip()))
        if not found:
            raise ValueError(f"{path} has no runs yet")
        # machines without a name are one only within a file
        rows += [r | {"machine": r["machine"] or f"that of {path}"} for r in found]
    text = study_report.ratios(rows, base)
    if not text:
        where = ", ".join(map(str, paths))
        raise ValueError(f"no other method shares a seed with {base} in {where}")
    terminal.result(text)
    return text


def main(argv=None):
    """Train or report; returns the path of the csv, of --ratios their text."""
    a = arguments(argv)
    terminal.quiet = a.quiet
    if a.score is not None:
        return score(a.score, a)
    device = machine.device_of(a.device)
    name = chip(a.device) if device.type == "cuda" else "cpu"
    name = re.sub(r"\W+", "-", name).strip("-").lower()
    path = Path(a.csv or Path(__file__).parent / "results" / f"study-{name}.csv")
    if a.ratios:
        return over(a.ratios, a.csv.split(",") if a.csv else [path])
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = a.report or train(a, path)
    rows = load(path)
    if a.report or complete:
        if not rows:
            raise ValueError(f"{path} has no runs yet")
        terminal.result(
            study_report.report(rows, path.parent / path.stem, METHODS | OTHERS, COURSE, BASE)
        )
    terminal.result(f"{path}{'' if complete else '  (not complete: the same command goes on)'}")
    return path


if __name__ == "__main__":
    cli.guard(main)
