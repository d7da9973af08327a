"""The metrics beside pytorch-fid, torch-fidelity and prdc; and which metric sees which fault.

    pip install pytorch-fid==0.3.0 torch-fidelity prdc 'scipy<1.18'    # where there is none, no row
    python -m tests.benchmarks.metrics                    # all comparisons, one thread
    OMP_NUM_THREADS=2 python -m tests.benchmarks.metrics --only frechet --rounds 3
    python -m tests.benchmarks.metrics --faults           # table and .github/images/metrics-faults.png

All that compute the same take turns in one process, and a ratio is that of their medians. Seconds
are of the clock and of the CPU (all threads); on a machine that others use too, the latter are what
compares. MB is what the memory of the process grows by at most. Results: results/metrics-cpu.json.

frechet    from means and covariances of n x d features, d = 2048
nearest    precision, recall, density and coverage of n against n x 2048 features, k = 5 in all, as
           prdc has one k; shares are of n
features   Inception on 16 images of 299 px, network alone for the peer; the weights are made up
"""
import os

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))  # before numpy reads it

import argparse  # noqa: E402
import contextlib  # noqa: E402
import importlib.metadata  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from common import data, features, fid, files, pictures, scores, terminal  # noqa: E402
from common.precision_recall import precision_recall  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "metrics-cpu.json"
PICTURE = Path(__file__).parents[2] / ".github" / "images" / "metrics-faults.png"
N, D = 10_000, 2048


# ---- beside the peers ------------------------------------------------------------------------


def peak(reset=False):
    """Most memory of this process in MB since the last reset; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000
    return 0


def timed(ways, rounds):
    """{name: {seconds, cpu_seconds, mb, value}} of functions that take turns."""
    found = {name: [] for name in ways}
    for i in range(rounds):
        for name, call in ways.items():
            terminal.progress(f"round {i + 1}/{rounds}: {name}", now=True)
            before = peak(reset=True)
            clock, cpu = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                value = call()
            times = time.perf_counter() - clock, time.process_time() - cpu
            found[name].append((*times, peak() - before, value))
    return {
        name: {
            "seconds": round(statistics.median(r[0] for r in rows), 3),
            "cpu_seconds": round(statistics.median(r[1] for r in rows), 3),
            "mb": round(max(r[2] for r in rows)),
            "value": rows[-1][3],
        }
        for name, rows in found.items()
    }


def correlated(n, seed):
    """Features [n, D] float32 as of a network: not negative, correlated, few large directions."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=rng) * (torch.arange(1, D + 1) ** -0.5)[:, None]
    rng.manual_seed(seed)
    return F.relu(torch.randn(n, D, generator=rng) @ mix / 2 + 0.2 + 0.01 * seed)


def frechet(rounds, n):
    moments = [fid.Statistics().update(correlated(n, seed)) for seed in (1, 2)]
    mu_a, sigma_a, mu_b, sigma_b = [x.numpy() for m in moments for x in (m.mean, m.cov)]
    ways = {"ours": lambda: fid.frechet_distance(mu_a, sigma_a, mu_b, sigma_b)}
    with contextlib.suppress(ImportError):
        from pytorch_fid.fid_score import calculate_frechet_distance as of_pytorch_fid

        ways["pytorch-fid"] = lambda: float(of_pytorch_fid(mu_a, sigma_a, mu_b, sigma_b))
    with contextlib.suppress(ImportError):
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        a, b = dict(mu=mu_a, sigma=sigma_a), dict(mu=mu_b, sigma=sigma_b)
        name = "frechet_inception_distance"
        ways["torch-fidelity"] = lambda: fid_statistics_to_metric(a, b, False)[name]
    return timed(ways, rounds)


def nearest(rounds, n):
    real, fake = correlated(n, 1), correlated(n, 2)
    ways = {"ours": lambda: precision_recall(real, fake, 5, 5)}
    with contextlib.suppress(ImportError):
        from prdc import compute_prdc

        as_numbers = lambda found: {k: float(v) for k, v in found.items()}  # noqa: E731
        ways["prdc"] = lambda: as_numbers(compute_prdc(real.numpy(), fake.numpy(), 5))
    return timed(ways, rounds)


def inception(rounds, n):
    from tests.test_features import made_up, scenes

    state = made_up(features.Inception())
    with contextlib.ExitStack() as after:
        path = Path(RESULTS.parent, "inception.tmp")
        after.callback(path.unlink)
        torch.save(state, path)
        features.FILES["inception"] = path
        images = scenes(299).repeat(8, 1, 1, 1)
        x = images.float() / 255
        names = {"ours": "inception", "ours, bf16": "inception-bf16"}
        extracted = {k: features.extract(images, v) for k, v in names.items()}
    ways = {k: lambda v=v: features.extract(images, v).norm().item() for k, v in names.items()}
    with contextlib.suppress(ImportError):
        from pytorch_fid import inception as peer

        peer.load_state_dict_from_url = lambda *a, **k: state
        net = peer.InceptionV3().eval()

        def of_pytorch_fid():
            with torch.no_grad():
                return net(x)[0].norm().item()

        ways["pytorch-fid"] = of_pytorch_fid
    for call in ways.values():
        call()
    rows = timed(ways, rounds)
    exact, rounded = extracted["ours"], extracted["ours, bf16"]
    rows["ours, bf16"]["relative_error"] = ((rounded - exact).norm() / exact.norm()).item()
    return rows


def compare(only, rounds, n):
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in only:
        rows = {"frechet": frechet, "nearest": nearest, "features": inception}[name](rounds, n)
        ours = rows["ours"]
        for peer, row in rows.items():
            row["ratio"] = round(row["seconds"] / ours["seconds"], 2)
            row["cpu_ratio"] = round(row["cpu_seconds"] / ours["cpu_seconds"], 2)
            terminal.result(
                f"{name:10}{peer:16}{row['seconds']:9.2f} s {row['cpu_seconds']:9.2f} s of CPU"
                f"{row['ratio']:8.2f} x {row['cpu_ratio']:6.2f} x{row['mb']:7} MB   {row['value']}"
            )
        found[f"{name}, {THREADS} threads"] = {
            "n": 16 if name == "features" else n,
            "rounds": rounds,
            "threads": THREADS,
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "versions": versions(),
            "rows": rows,
        }
        files.write_json(RESULTS, found)


def cpu_name():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
        return f"{name}, {os.cpu_count()} cores"
    return platform.processor()


def versions():
    found = {}
    for name in ("torch", "numpy", "scipy", "pytorch-fid", "torch-fidelity", "prdc", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ---- which metric sees which fault -----------------------------------------------------------

SIDES = 5000  # images on either side, where it is not said otherwise
SEEN = ("fid", "kid", "precision", "recall", "density", "coverage", "diversity")


def faults(mnist):
    """{name: uint8 images} made from MNIST, the first without a fault."""
    rng = torch.Generator().manual_seed(0)
    test, labels, train = mnist.test.images, mnist.test.labels, mnist.images
    held_out = test[torch.randperm(len(test), generator=rng)[:SIDES]]

    def noisy(sigma):
        noise = torch.randn(held_out.shape, generator=rng) * (255 * sigma)
        return (held_out + noise).round().clamp(0, 255).to(torch.uint8)

    def blurred(sigma):
        places = torch.arange(-6, 7)
        window = torch.exp(-(places**2) / (2 * sigma**2))
        window = (window / window.sum()).view(1, 1, 1, -1)
        x = F.conv2d(F.conv2d(held_out.float(), window, padding=(0, 6)), window.mT, padding=(6, 0))
        return x.round().to(torch.uint8)

    few = train[torch.randperm(len(train), generator=rng)[:100]]
    return {
        "held-out images": held_out,
        "noise .05": noisy(0.05),
        "noise .2": noisy(0.2),
        "blur .5 px": blurred(0.5),
        "blur 1 px": blurred(1.0),
        "only digits 0 to 4": test[labels <= 4][:SIDES],
        "100 copied images": few.repeat(SIDES // 100, 1, 1, 1),
        "training images": train[scores.drawn_rows(len(train), SIDES)],
        "n = 200": held_out[:200],
    }


def row_of(images, against):
    found, drawn = features.extract(images, "lenet"), against["real"]
    row = {"n": len(images), "fid": scores.frechet(found, against), "kid": fid.kid(found, drawn)[0]}
    return row | precision_recall(drawn, found) | {"diversity": scores.diversity(images)}


def show_faults(data_dir, cache_dir):
    mnist = data.load_images("mnist", data_dir, 32, 1, cache_dir)
    rows = {}
    for name, images in faults(mnist).items():
        against = scores.reference(mnist, "lenet", len(images), cache_dir)
        rows[name] = row_of(images, against)
    heads = [pictures.fid_label("lenet", m) for m in SEEN]
    terminal.result(f"| fault | n | {' | '.join(heads)} |\n|---|{'---|' * (len(SEEN) + 1)}")
    for name, row in rows.items():
        values = " | ".join(written(m, row[m]) for m in SEEN)
        terminal.result(f"| {name} | {row['n']} | {values} |")
    pictures.save(matrix(rows, heads), PICTURE)
    terminal.result(str(PICTURE))


def written(metric, value):
    return f"{value:.2f}" if metric == "fid" else f"{value:.3f}"


def change(metric, value, base, spread=0.05):
    """From -1 to 1: how much worse (> 0) or seemingly better than without a fault."""
    if metric == "fid":
        return max(-1, min(1, torch.tensor(value / base).log2().item() / 4))
    if metric == "kid":
        return max(-1, min(1, (value - base) / 0.5))
    if metric == "diversity":  # off in either direction is worse
        return min(1, abs(value - base) / spread)
    return max(-1, min(1, (base - value) / 0.5))


def matrix(rows, heads):
    """PIL image: a row of cells for each fault, the redder the worse, blue: better than real."""
    from PIL import Image, ImageDraw

    left, top, width, height = 190, 34, 104, 30
    size = left + width * len(SEEN) + 8, top + height * len(rows) + 8
    image = Image.new("RGB", size, "white")
    draw, base = ImageDraw.Draw(image), next(iter(rows.values()))
    for j, head in enumerate(heads):
        place = left + width * (j + 0.5), top / 2
        draw.text(place, head, "black", pictures.font(14), anchor="mm")
    for i, (name, row) in enumerate(rows.items()):
        y = top + height * i
        draw.text((left - 10, y + height / 2), name, "black", pictures.font(14), anchor="rm")
        for j, metric in enumerate(SEEN):
            c = change(metric, row[metric], base[metric])
            pale = round(255 * (1 - 0.75 * abs(c)))
            color = (255, pale, pale) if c > 0 else (pale, pale, 255)
            x = left + width * j
            draw.rectangle((x + 1, y + 1, x + width - 1, y + height - 1), color)
            text = written(metric, row[metric])
            place = x + width / 2, y + height / 2
            draw.text(place, text, "black", pictures.font(14), anchor="mm")
    return image


def main():
    p = argparse.ArgumentParser(prog="python -m tests.benchmarks.metrics")
    p.add_argument("--only", default="frechet,nearest,features", help="[all three]")
    p.add_argument("--rounds", type=int, default=3, help="[3]")
    p.add_argument("--n", type=int, default=N, help=f"[{N}]")
    p.add_argument("--faults", action="store_true", help="in place of the comparisons")
    p.add_argument("--data-dir", default="data", help="where MNIST lies [data]")
    p.add_argument("--cache-dir", default="data/cache", help="[data/cache]")
    a = p.parse_args()
    torch.set_num_threads(THREADS)
    if a.faults:
        show_faults(a.data_dir, a.cache_dir)
    else:
        compare(a.only.split(","), a.rounds, a.n)


if __name__ == "__main__":
    main()
