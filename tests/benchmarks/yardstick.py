"""Quality at equal time, on the machine at hand, by a network that is not the project's own.

    yardstick RUN RUN ...                                   # scores runs that are there
    yardstick --minutes 3 --train "lsgan.py" --train "icr_gan.py --sigma 0.05"
    yardstick --no-baseline --train "lsgan.py --subset 500 --steps 6000"

where yardstick stands for `python -m tests.benchmarks.yardstick`.

Images are MNIST in 32 x 32 grey. The features are those of a classifier that is trained here once
and kept in the cache: another network, from another seed, than the one behind the project's own
metrics, so that nothing can be tuned to both by accident. Its distances are no FID, and compare
within one cache only; what travels between machines is the ratio to the baseline.

The baseline is a plain DCGAN (Radford et al. 2015, arXiv:1511.06434) with the least-squares loss
(Mao et al. 2016, arXiv:1611.04076): BatchNorm in both networks, width 32, batches of 64, Adam 2e-4
(.5, .999), N(0, .02), float32, no average of weights. It trains before and after the commands, from
two seeds: different steps in the two rows say that the machine has drifted in between.

Minutes count training alone, from the first update on, for the baseline as for the scripts. The
floor is the distance of real test images: no generator can be expected below it.
"""
import contextlib
import importlib
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import cli, data, files, machine, run, terminal
from common.fid import frechet_from_features
from common.precision_recall import precision_recall
from common.sample import drawn as sampled

IMAGE_SIZE = 32
FEATURES = 96
CLASSIFIER_SEED = 1611
SAMPLE_SEED = 4076  # of latents and of the choice of real images; --seed is that of training
VERSION = 1  # of the cached classifier: raise it with any change of Classifier or its training
CHUNK = 500
Z_DIM, BATCH_SIZE, LR, BETAS = 100, 64, 2e-4, (0.5, 0.999)
# what the yardstick adds to a command; whatever is typed there wins
CHEAP = {"eval-every": 0, "sample-every": 0, "eval-samples": 512}
# what cannot be typed there
TAKEN = {
    "dataset": "it is MNIST",
    "out-dir": "--keep DIR keeps the runs",
    "resume": "the yardstick trains from the start",
}


# ---- the classifier --------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images [N, 1, 32, 32] in [-1, 1] -> logits [N, 10], by way of `features` [N, 96].

    BatchNorm before the last ReLU keeps every feature alive: without it a quarter of them is 0 for
    all images, and the distance sees that much less.
    """

    def __init__(self):
        super().__init__()

        def block(d_in, d_out, kernel, stride):
            conv = nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(d_out), nn.ReLU()]

        self.features = nn.Sequential(
            *block(1, 16, 5, 2),
            *block(16, 32, 3, 1),
            nn.MaxPool2d(2),
            *block(32, 64, 3, 1),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x):
        return self.head(self.features(x))


def train_classifier(images, labels, epochs=4, batch_size=128, lr=3e-3, device="cpu"):
    """A Classifier for uint8 images [N, 1, 32, 32] and their labels [N], in eval mode."""
    torch.manual_seed(CLASSIFIER_SEED)
    net = Classifier().to(device, memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), lr, fused=True)
    per_epoch = len(images) // batch_size
    steps, step = epochs * per_epoch, 0
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: per_epoch * batch_size].split(batch_size):
            opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
            x, y = data.to_float(images[rows].to(device)), labels[rows].to(device)
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            terminal.progress(f"yardstick's classifier {step}/{steps} ({100 * step // steps} %)")
    return net.eval()


@torch.no_grad()
def extract(net, images):
    """Features [N, 96] on the CPU of uint8 images [N, 1, 32, 32]."""
    device = next(net.parameters()).device
    parts = terminal.track(images.split(CHUNK), "yardstick's features")
    return torch.cat([net.features(data.to_float(part.to(device))).cpu() for part in parts])


def accuracy(net, features, labels):
    """Share of the labels [N] that the last layer gives to features [N, 96]."""
    with torch.no_grad():
        found = net.head(features.to(net.head.weight.device)).argmax(1).cpu()
    return (found == labels).double().mean().item()


def reference(images, cache_dir, device="cpu"):
    """What scores are measured by, cached: dict of weights, train, test, accuracy, seconds.

    images: common.data.Images with labels and a held-out split. weights are the classifier's, train
    and test its features [M, 96] of the two splits, accuracy that on test, seconds its training.
    """

    def make():
        began = time.perf_counter()
        net = train_classifier(images.images, images.labels, device=device)
        seconds = time.perf_counter() - began
        train, test = extract(net, images.images), extract(net, images.test.images)
        correct = accuracy(net, test, images.test.labels)
        weights = {name: value.cpu() for name, value in net.state_dict().items()}
        return dict(weights=weights, train=train, test=test, accuracy=correct, seconds=seconds)

    key = dict(content=images.fingerprint, test=images.test.fingerprint)
    return files.cached(cache_dir, "yardstick", key, make, VERSION)


def classifier_of(ref, device="cpu"):
    """The Classifier of a reference."""
    net = Classifier()
    net.load_state_dict(ref["weights"])
    return net.eval().to(device, memory_format=torch.channels_last)


def drawn(x, n):
    """At most n rows of x, the same at every call; the first ones of a set need not be typical."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(SAMPLE_SEED))[:n]]


def compare(features, train):
    """Frechet distance to all of train [M, 96]; precision and recall against as many of it."""
    near = precision_recall(drawn(train, len(features)), features)
    distance = frechet_from_features(train, features)
    return {"distance": distance, "precision": near["precision"], "recall": near["recall"]}


def score(images, ref, device="cpu"):
    """dict of distance, precision and recall of uint8 images [N, 1, 32, 32]."""
    return compare(extract(classifier_of(ref, device), images), ref["train"])


# ---- the baseline ----------------------------------------------------------------------------


class Generator(nn.Module):
    """z [N, z_dim] -> images [N, 1, 32, 32] in [-1, 1]; width at the widest resolution."""

    def __init__(self, z_dim=Z_DIM, width=32):
        super().__init__()

        def block(d_in, d_out, *conv):
            conv = nn.ConvTranspose2d(d_in, d_out, *conv, bias=False)
            return [conv, nn.BatchNorm2d(d_out), nn.ReLU()]

        self.body = nn.Sequential(
            *block(z_dim, 4 * width, 4, 1, 0),
            *block(4 * width, 2 * width, 4, 2, 1),
            *block(2 * width, width, 4, 2, 1),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
        )

    def forward(self, z):
        return self.body(z[:, :, None, None]).tanh()


class Discriminator(nn.Module):
    """Images [N, 1, 32, 32] in [-1, 1] -> scores [N], unbounded.

    BatchNorm couples the images of a call, so real and generated ones need a call each."""

    def __init__(self, width=32):
        super().__init__()

        def block(d_in, d_out):
            conv = nn.Conv2d(d_in, d_out, 4, 2, 1, bias=False)
            return [conv, nn.BatchNorm2d(d_out), nn.LeakyReLU(0.2)]

        self.body = nn.Sequential(
            *(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2)),
            *block(width, 2 * width),
            *block(2 * width, 4 * width),
            nn.Conv2d(4 * width, 1, 4, 1, 0),
        )

    def forward(self, x):
        return self.body(x).flatten()


def init(net):
    """DCGAN's: convolutions N(0, .02), scales of BatchNorm N(1, .02), biases 0."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return net


def discriminator_loss(d_real, d_fake):
    """Scores [N] each; 1 for real, 0 for generated."""
    return 0.5 * (d_real - 1).square().mean() + 0.5 * d_fake.square().mean()


def generator_loss(d_fake):
    """Scores [N]; 1 wanted."""
    return 0.5 * (d_fake - 1).square().mean()


def updates(g, d):
    """update_d(real) and update_g(n), each ending in its optimiser's step."""
    device = next(g.parameters()).device
    # fused is the same Adam in fewer calls: the baseline is plain, not slow
    opt_g = torch.optim.Adam(g.parameters(), LR, BETAS, fused=True)
    opt_d = torch.optim.Adam(d.parameters(), LR, BETAS, fused=True)

    def update_d(real):
        with torch.no_grad():
            fake = g(torch.randn(len(real), Z_DIM, device=device))
        loss = discriminator_loss(d(real), d(fake))
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()

    def update_g(n):
        d.requires_grad_(False)  # gradients pass through D, none are kept for it
        loss = generator_loss(d(g(torch.randn(n, Z_DIM, device=device))))
        opt_g.zero_grad()
        loss.backward()
        opt_g.step()
        d.requires_grad_(True)

    return update_d, update_g


def train_baseline(images, seconds=math.inf, steps=None, seed=0, device="cpu", what="baseline"):
    """(generator, steps, seconds) of the baseline, trained on common.data.Images until a limit."""
    torch.manual_seed(seed)
    g, d = init(Generator()).to(device), init(Discriminator()).to(device)
    update_d, update_g = updates(g, d)
    batches = data.Batches(images, BATCH_SIZE, seed, device)
    cuda = torch.device(device).type == "cuda"
    step, began, elapsed = 0, time.perf_counter(), 0.0
    while elapsed < seconds and step != steps:
        update_d(next(batches))
        update_g(BATCH_SIZE)
        step += 1
        if cuda and step % 50 == 0:
            torch.cuda.synchronize()  # else the clock would time how fast work is queued
        elapsed = time.perf_counter() - began
        end = f"/{steps}" if steps else ""
        terminal.progress(f"{what}: step {step}{end}, {elapsed:.0f} s of {seconds:.0f} s")
    if cuda:
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - began
    if not all(p.isfinite().all() for p in g.parameters()):
        raise cli.Diverged(f"{what} diverged within {step} steps")
    return g.eval(), step, elapsed


def sample_baseline(g, n):
    """n uint8 images of a trained Generator, from latents that are the same each time."""
    z = torch.randn(n, Z_DIM, generator=torch.Generator().manual_seed(SAMPLE_SEED))
    device = next(g.parameters()).device
    with torch.no_grad():
        return torch.cat([data.to_uint8(g(part.to(device))).cpu() for part in z.split(CHUNK)])


# ---- runs and commands -----------------------------------------------------------------------


def check_grey32(args, script, name):
    """ValueError unless a script with these Args makes the images that are measured here."""
    if not hasattr(script, "latents"):
        raise ValueError(
            f"{name}: {script.__name__}.py turns images into images; the yardstick needs latents"
        )
    size, channels = args.image_size, args.channels or 1
    if (size, channels) != (IMAGE_SIZE, 1):
        raise ValueError(
            f"{name}: its images are {size} x {size} with channels {channels}; "
            f"the yardstick needs {IMAGE_SIZE} x {IMAGE_SIZE} with channels 1"
        )


def load_run(folder, device="cpu"):
    """(nets, args, script) of a run folder; ValueError where it makes other images."""
    nets, args, script = run.load(folder, device)
    check_grey32(args, script, folder)
    return nets, args, script


def sample_run(nets, args, script, n):
    """n uint8 images of a run, from latents that are the same each time."""
    z = script.latents(n, args, torch.Generator().manual_seed(SAMPLE_SEED))
    return sampled(nets, args, script, z)


def cost(folder, args):
    """steps, seconds and images/s of a run: real images that D has learnt from in each second.

    Empty for a run that has not ended and so has no metrics.json.
    """
    path = Path(folder) / "metrics.json"
    if not path.exists():
        return {}
    try:
        last = json.loads(path.read_text())
        steps, seconds = int(last["step"]), float(last["seconds"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read as the metrics of a run: {e!r}") from None
    return speed(steps, seconds, steps * getattr(args, "n_critic", 1) * args.batch_size)


def speed(steps, seconds, images):
    """The columns of a row that say what was done in which time."""
    return dict(steps=steps, seconds=seconds, images_per_second=images / seconds)


def plan(text, added):
    """(path, arguments, Args) of a --train command; ValueError where it would not run.

    added: arguments by name, given unless typed in text; a value None stands for a bare flag.
    """
    try:
        word, *typed = shlex.split(text)
    except ValueError as e:  # of shlex, or nothing to unpack
        raise ValueError(f'--train "{text}" is no command: {e}') from None
    path = run.ROOT / Path(word).name if Path(word).parent == Path() else Path(word).resolve()
    if path not in run.ROOT.glob("*.py"):  # run folders are loaded by the scripts of this checkout
        known = ", ".join(sorted(p.name for p in run.ROOT.glob("*.py")))
        raise ValueError(f'--train "{text}": the first word must be one of {known}')
    names = {m[1].replace("_", "-") for w in typed if (m := re.match(r"--([^=]+)", w))}
    for bad, why in TAKEN.items():
        if bad in names:
            raise ValueError(f'--train "{text}": leave out --{bad}, {why}')
    if "steps" in names:  # equal steps in place of equal time
        added = {k: v for k, v in added.items() if k != "max-minutes"}
    elif "max-minutes" not in names and added.get("max-minutes") is None:
        raise ValueError(f'--train "{text}" needs --minutes, or --steps of its own')
    argv = list(typed)
    for key, value in {"dataset": "mnist", **added}.items():
        if key not in names:
            argv += [f"--{key}"] if value is None else [f"--{key}", str(value)]
    script = importlib.import_module(path.stem)
    try:
        args = cli.parse(script.Args, argv)
    except ValueError as e:
        raise ValueError(f'--train "{text}": {e}') from None
    check_grey32(args, script, f'--train "{text}"')
    return path, argv, args


def train(path, argv, out_dir, what, minutes=None):
    """Run a script as a process of its own; returns its run folder. cli.Diverged if it fails."""
    out_dir.mkdir(parents=True)
    command = [sys.executable, str(path), *argv, "--out-dir", str(out_dir)]
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=complaints)
        began = time.monotonic()
        try:
            while process.poll() is None:
                of = f" of {60 * minutes:.0f} s and scoring" if minutes else ""
                terminal.progress(f"{what}: {time.monotonic() - began:.0f} s{of}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["nothing said"])[-1]
            raise cli.Diverged(f"exit code {process.returncode}: {last}")
    (folder,) = out_dir.iterdir()
    return folder


# ---- the table -------------------------------------------------------------------------------


def with_ratios(rows):
    """The rows, each with `ratio`: its distance over the mean of those of the baselines."""
    base = [r["distance"] for r in rows if r["kind"] == "baseline" and "distance" in r]
    if not base:
        return rows
    mean = statistics.mean(base)
    return [r | {"ratio": r["distance"] / mean} if "distance" in r else r for r in rows]


def drift(rows):
    """A line of warning where the machine was not the same for both baselines, else None."""
    steps = [r["steps"] for r in rows if r["kind"] == "baseline" and "steps" in r]
    if not steps or min(steps) >= 0.9 * max(steps):
        return None
    counts = " and ".join(map(str, steps))
    return f"the machine drifted: {counts} steps of the baseline in equal time; ratios are rough"


def table(rows):
    """Lines of text for rows as with_ratios gives them."""
    columns = (
        ("steps", "steps", "{:d}"),
        ("seconds", "seconds", "{:.1f}"),
        ("images/s", "images_per_second", "{:.0f}"),
        ("distance", "distance", "{:.3f}"),
        ("precision", "precision", "{:.3f}"),
        ("recall", "recall", "{:.3f}"),
        ("ratio", "ratio", "{:.3f}"),
    )
    wide = max(len(r["name"]) for r in rows)
    lines = [" " * wide + "".join(f"{head:>11}" for head, _, _ in columns)]
    for r in rows:
        cells = [form.format(r[key]) if key in r else "-" for _, key, form in columns]
        values = f"  {r['failed']}" if "failed" in r else "".join(f"{c:>11}" for c in cells)
        lines.append(f"{r['name']:{wide}}{values}")
    return "\n".join(lines)


def arguments(argv):
    p = cli.Parser(prog="python -m tests.benchmarks.yardstick", description=__doc__)
    p.add_argument("runs", metavar="RUN", nargs="*", help="run folders to score")
    for flag, options, text in (
        ("--train", dict(action="append", default=[]), "a script and its arguments; repeatable"),
        ("--minutes", dict(type=float), "training time of the baseline and of each command"),
        ("--threads", dict(type=int, default=1), "CPU threads of everything [1]"),
        ("--no-baseline", dict(action="store_true"), "no baseline, and so no ratios"),
        ("--n", dict(type=int, default=10000), "images scored of each generator [10000]"),
        ("--seed", dict(type=int, default=0), "of all training but the classifier's [0]"),
        ("--data-dir", dict(default="data"), "where MNIST lies or is downloaded to [data]"),
        ("--cache-dir", dict(default="data/cache"), "the classifier and its features [data/cache]"),
        ("--device", dict(default="auto"), "auto, cpu, cuda, cuda:1 [auto]"),
        ("--keep", dict(metavar="DIR"), "keep the runs of --train there"),
        ("--json", dict(metavar="FILE"), "write the table there too"),
        ("--quiet", dict(action="store_true"), "no progress on the terminal"),
    ):
        p.add_argument(flag, help=text, **options)
    a = p.parse_args(argv)
    if a.minutes is not None and not 0 < a.minutes < math.inf:
        raise ValueError(f"--minutes must be positive, got {a.minutes}")
    for name, least in (("threads", 1), ("n", 6), ("seed", 0)):
        if getattr(a, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(a, name)}")
    if not a.runs and not a.train and a.minutes is None:
        raise ValueError("nothing to measure: give run folders, --train, or --minutes alone")
    if a.minutes is not None and a.no_baseline and not a.train:
        raise ValueError("--minutes with --no-baseline trains nothing: give --train")
    if a.train and a.minutes is None and not a.no_baseline:
        raise ValueError("--train needs --minutes, or --no-baseline if it has --steps of its own")
    if a.json and (Path(a.json).is_dir() or not os.access(Path(a.json).absolute().parent, os.W_OK)):
        raise ValueError(f"--json {a.json} cannot be written: give a file in an existing folder")
    return a


def measure(a, images, runs, plans, device):
    """The rows of the table, in the order of the work. a: arguments; images: common.data.Images.

    runs: (folder, what load_run gives); plans: (command, what plan gives).
    """
    ref = reference(images, a.cache_dir, device)
    rows = []

    def add(kind, name, measured):
        rows.append(dict(kind=kind, name=name) | measured)
        if "distance" in measured:
            terminal.note(f"{name}: distance {measured['distance']:.3f}")

    def baseline(seed):
        try:
            g, steps, seconds = train_baseline(images, 60 * a.minutes, seed=seed, device=device)
        except cli.Diverged as e:  # the other results are worth keeping
            return add("baseline", "baseline", dict(failed=str(e)))
        found = score(sample_baseline(g, a.n), ref, device)
        add("baseline", "baseline", speed(steps, seconds, steps * BATCH_SIZE) | found)

    def finished(folder, nets, args, script):
        return cost(folder, args) | score(sample_run(nets, args, script, a.n), ref, device)

    with_baseline = a.minutes is not None and not a.no_baseline
    for folder, loaded in runs:
        add("run", Path(folder).resolve().name, finished(folder, *loaded))
    if with_baseline:
        baseline(a.seed)
    with tempfile.TemporaryDirectory(prefix="yardstick-") as temporary:
        parent = Path(a.keep or temporary)
        began = f"{datetime.now():%Y%m%d-%H%M%S}"
        for i, (text, (path, words, args)) in enumerate(plans, 1):
            what = f"{i}/{len(plans)} {text}"
            try:
                folder = train(path, words, parent / f"{began}-{i}", what, args.max_minutes)
            except cli.Diverged as e:
                add("train", text, dict(failed=str(e)))
                continue
            kept = dict(folder=str(folder)) if a.keep else {}
            add("train", text, finished(folder, *load_run(folder, device)) | kept)
    if with_baseline and plans:
        baseline(a.seed + 1)
    add("floor", "test images", compare(drawn(ref["test"], a.n), ref["train"]))
    return dict(accuracy=ref["accuracy"], rows=with_ratios(rows))


def main(argv=None):
    """Measure and print; returns the rows."""
    a = arguments(argv)
    terminal.quiet = a.quiet
    torch.set_num_threads(a.threads)
    device = machine.device_of(a.device)

    # all that can be wrong is found before minutes are spent
    runs = [(folder, load_run(folder, str(device))) for folder in a.runs]
    added = {"data-dir": a.data_dir, "cache-dir": a.cache_dir, "max-minutes": a.minutes}
    added |= {"threads": a.threads, "seed": a.seed, "device": str(device), "quiet": None}
    plans = [(text, plan(text, added | CHEAP)) for text in a.train]
    images = data.load_images("mnist", a.data_dir, IMAGE_SIZE, 1, a.cache_dir)
    if a.keep:
        Path(a.keep).mkdir(parents=True, exist_ok=True)

    found = measure(a, images, runs, plans, str(device))
    terminal.close()
    threads = f"{a.threads} of {os.cpu_count()} CPU threads"
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    each = f", {a.minutes:g} min of training each" if a.minutes is not None else ""
    right = f"{100 * found['accuracy']:.2f} % test accuracy"
    print(f"MNIST, {a.n} samples on {on}{each}; classifier with {right}")
    print(table(found["rows"]))
    if warning := drift(found["rows"]):
        print(warning)
    if a.json:
        about = dict(date=f"{datetime.now():%Y-%m-%d %H:%M}", device=on)
        about |= dict(torch=torch.__version__, python=platform.python_version())
        about |= dict(minutes=a.minutes, threads=a.threads, n=a.n, seed=a.seed)
        files.write_json(a.json, about | found)
    if any("failed" in r for r in found["rows"]):
        raise cli.Diverged("not all training ended well: see the table")
    return found["rows"]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running command ends too
    cli.guard(main)
