"""Scores of generated against real images: Frechet distance, precision, recall, density, coverage.

    python -m common.evaluate --real mnist --fake runs/icr_gan-mnist-20261123-014500-s0
    python -m common.evaluate --real photos/train --fake photos/generated --json scores.json
    python -m common.evaluate --real mnist --floor    # real held-out images: no generator does better

Both sides are quantised to uint8 before features are taken, so a number does not change when samples
are saved as PNG. The Frechet distance compares with the whole training split; precision, recall,
density and coverage with as many real images as generated ones, drawn with a fixed seed; of a
folder with more than n images, n are drawn in the same way. The variance per pixel tells whether samples
are drawn towards the mean image; a collapse onto a few different images need not lower it.
"""
import argparse
import json
from pathlib import Path

import torch

from common import data, features, fid, terminal
from common.precision_recall import precision_recall

CHUNK = 500  # images generated and scored at a time


def drawn_rows(m, n):
    """n of m rows, or all of them, drawn with a fixed seed: folders are in order of their classes."""
    return torch.randperm(m, generator=torch.Generator().manual_seed(0))[:n]


def reference(images, feature_name, n, cache_dir="data/cache", device="cpu"):
    """Statistics of the real side, cached by content, size, features and n.

    images: data.Images; n: generated images that will be compared. Returns a dict: features (the
    resolved name), mu [d] and sigma [d, d] float64 of all images, real [min(n, M), d] float32.
    """
    name = features.resolve(feature_name, images.channels)
    chosen = min(n, len(images.images))

    def make():
        found = features.extract(images.images, name, device)
        moments = fid.Statistics()
        moments.update(found)
        return {"mu": moments.mean, "sigma": moments.cov, "real": found[drawn_rows(len(found), chosen)]}

    key = {"content": images.fingerprint, "features": name, "weights": features.version(name), "n": chosen}
    return data.cached(cache_dir, "statistics", key, make) | {"features": name}


def features_of(generate, n, name, device="cpu", check=lambda: None):
    """Features [n, d] float32 of n images from generate(count) -> float [count, C, H, W] in [-1, 1].

    check is called between chunks; what it raises ends the work.
    """
    parts = []
    for first in range(0, n, CHUNK):
        check()
        parts.append(features.extract(data.to_uint8(generate(min(CHUNK, n - first))), name, device))
        terminal.progress(f"scoring {min(first + CHUNK, n)}/{n} samples")
    check()
    return torch.cat(parts)


def in_order(parts, n):
    """Features [n, d] from those of each rank, which took its share of every chunk."""
    pieces, taken = [], [0] * len(parts)
    for first in range(0, n, CHUNK):
        sizes = [len(share) for share in torch.empty(min(CHUNK, n - first)).tensor_split(len(parts))]
        for i, size in enumerate(sizes):
            pieces.append(parts[i][taken[i] : taken[i] + size])
            taken[i] += size
    return torch.cat(pieces)


def score(fake, real):
    """Metrics of features fake [n, d] against what `reference` returned, as one dict for a table."""
    moments = fid.Statistics()
    moments.update(fake)
    distance = fid.frechet_distance(moments.mean, moments.cov, real["mu"], real["sigma"])
    row = {"n": len(fake), "features": real["features"], "fid": distance} | precision_recall(real["real"], fake)
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


class PixelVariance:
    """Mean over pixels of the variance over images, of uint8 [N, C, H, W] in parts, on the scale of [-1, 1]."""

    def __init__(self):
        self.n, self.sum, self.squares = 0, 0.0, 0.0

    def update(self, images):
        for part in images.split(CHUNK):
            x = data.to_float(part).double()
            self.n += len(x)
            self.sum = self.sum + x.sum(0)
            self.squares = self.squares + x.square().sum(0)
        return self

    @property
    def value(self):
        mean = self.sum / self.n
        return (self.squares / self.n - mean.square()).mean().item()


def fid_label(feature_name):
    """FID is that of Inception features alone; any other network is named beside it."""
    return "FID" if feature_name == "inception" else f"FID ({feature_name})"


def lines(row):
    """One line of text for a row of metrics, values as numbers or strings."""
    parts = [f"{fid_label(row['features'])} {float(row['fid']):.2f}"]
    parts += [f"{k} {float(row[k]):.3f}" for k in ("precision", "recall", "density", "coverage")]
    return ", ".join(parts) + f"  ({row['n']} samples)"


def _command(argv=None):
    from common import run

    p = run.Parser(prog="python -m common.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--real", required=True, help="digits, mnist, fashion, cifar10 or a folder of images")
    p.add_argument("--fake", help="a folder of images, or a run folder, which is sampled from")
    p.add_argument("--floor", action="store_true", help="in place of --fake: the held-out split of the real set")
    p.add_argument("--n", type=int, default=10000, help="generated images; of a folder at most what it holds [10000]")
    p.add_argument("--image-size", type=int, default=None, help="both sides are brought to it [the run's, or 32]")
    p.add_argument("--channels", type=int, default=0, choices=(0, 1, 3), help="0 = as the real images [0]")
    p.add_argument("--features", default="auto", help=f"{', '.join(features.NAMES)} [auto: by channels]")
    p.add_argument("--data-dir", default="data", help="where data sets lie [data]")
    p.add_argument("--cache-dir", default="data/cache", help="decoded images and statistics [data/cache]")
    p.add_argument("--seed", type=int, default=0, help="of the latents of a run [0]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    p.add_argument("--json", metavar="FILE", help="write the metrics there too")
    a = p.parse_args(argv)
    if a.n < 6:
        raise ValueError(f"--n must be at least 6, got {a.n}")
    if (a.fake is None) != a.floor:
        raise ValueError("give either --fake, a folder of images or a run, or --floor")
    device, spread = run.device_of(a), PixelVariance()
    trained = not a.floor and (Path(a.fake) / "args.json").exists()
    if trained:
        nets, args, script = run.load(a.fake, a.device)
        a.image_size = a.image_size or args.image_size
        a.channels = a.channels or args.channels
    real = data.load_images(a.real, a.data_dir, a.image_size or 32, a.channels, a.cache_dir)
    if trained:
        if (args.image_size, args.channels) != (a.image_size, real.channels):
            raise ValueError(
                f"the run makes {args.channels} x {args.image_size} px images, the real side was asked for as {real.channels} x {a.image_size}"
            )
        z = torch.Generator().manual_seed(a.seed)
        name = features.resolve(a.features, real.channels)

        def generate(n):
            images = script.sample(nets, args, script.latents(n, args, z))
            spread.update(data.to_uint8(images).cpu())
            return images

        found = features_of(generate, a.n, name, device)
    else:
        if a.floor and real.test is None:
            raise ValueError(f"{a.real} has no held-out split to take the floor from")
        source = real.test if a.floor else data.load_images(a.fake, a.data_dir, a.image_size or 32, real.channels, a.cache_dir)
        fake = source.images[drawn_rows(len(source.images), a.n)]
        spread.update(fake)
        found = features.extract(fake, features.resolve(a.features, real.channels), device)
    row = score(found, reference(real, a.features, len(found), a.cache_dir, device))
    terminal.close()
    row |= {"pixel_variance": round(spread.value, 6), "pixel_variance_real": round(PixelVariance().update(real.images).value, 6)}
    print(f"{lines(row)}\nvariance per pixel {row['pixel_variance']:.3f}, of the real images {row['pixel_variance_real']:.3f}")
    if a.json:
        row |= {"real": a.real, "fake": a.fake or "held-out split", "split": "train", "real_images": len(real.images)}
        Path(a.json).write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    from common.run import guard

    guard(_command)
