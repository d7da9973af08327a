"""Scores of generated against real images.

    python -m common.evaluate --real mnist --fake runs/icr_gan-mnist-20261123-014500-s0
    python -m common.evaluate --real photos/train --fake photos/made --features inception
    python -m common.evaluate --real mnist --floor    # held-out images: no generator does better
    python -m common.evaluate --real photos --stats photos.npz    # mu, sigma, as of pytorch-fid

--real: digits, mnist, fashion, cifar10 (the training split), a folder of pictures, an array .npy,
or statistics .npz of pytorch-fid or --stats. --fake: images as well, or a run folder or its
checkpoint, which is sampled from. Pictures: all that Pillow reads, in folders at any depth; of
other sizes than --image-size the central square is resized, bicubic and antialiased. Arrays:
uint8 [M, H, W, C], [M, C, H, W] or [M, H, W].

Both sides are quantised to uint8 before features are taken, so a number does not change when
samples are saved as PNG. The Frechet distance compares with the whole real side; KID, precision,
recall, density and coverage with as many real images as generated ones, drawn with a fixed seed, as
n are of a larger folder. Diversity is 1 - MS-SSIM of random pairs: less than that of real images is
a collapse, more is not like the data. The variance per pixel tells whether samples are drawn
towards the mean image; a collapse onto a few different images need not lower it.
"""
from pathlib import Path

import numpy as np
import torch

from common import (
    cli, data, features, fid, files, folders, machine, pictures, run, scores, terminal,
)  # fmt: skip
from common.precision_recall import precision_recall

NEAREST = {"precision": 3, "recall": 3, "density": 5, "coverage": 5}  # with their k
METRICS = ("fid", "kid", *NEAREST, "is", "diversity", "variance")
USUAL = ("fid", *NEAREST, "variance")
CHUNK = 500  # images generated at a time
NOISE = 0.1  # standard deviation, in [0, 1], of noise on real images: a diversity that is too high


# ---- what is compared ------------------------------------------------------------------------


def array(path):
    """data.Images of a .npy file; ValueError where it is no array of images."""
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as an array: {files.first_line(e)}") from None
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or not {1, 3} & {x.shape[1], x.shape[3]}:
        wanted = "wanted uint8 [M, H, W, C], [M, C, H, W] or [M, H, W]"
        raise ValueError(f"{path} is {x.dtype} {list(x.shape)}; {wanted}")
    x = x.transpose(0, 3, 1, 2) if x.shape[3] in (1, 3) else x
    return data.Images(torch.from_numpy(np.ascontiguousarray(x)), name=str(path))


def statistics(path):
    """Of a .npz file with mu and sigma, what scores.frechet takes."""
    try:
        with np.load(path, allow_pickle=False) as f:
            mu, sigma = (torch.from_numpy(f[name]) for name in ("mu", "sigma"))
    except (OSError, EOFError, KeyError, ValueError, TypeError) as e:
        raise ValueError(f"{path} does not hold mu and sigma: {files.first_line(e)}") from None
    return {"mu": mu, "sigma": sigma, "m": None}


def own_size(path):
    """Pixels of the shorter side of a folder's first picture, or of an array's; else None."""
    if path.endswith(".npy"):
        return array(path).images.shape[2]
    for file in sorted(Path(path).rglob("*")):
        try:
            return min(folders.opened(file.read_bytes()).size)
        except Exception:  # no picture; Pillow's readers raise anything
            continue
    return None


def images_of(side, a):
    """data.Images of a named set, a folder or a .npy, of a.image_size and a.channels (0: any)."""
    size, channels = a.image_size, a.channels
    if not side.endswith(".npy"):
        return data.load_images(side, a.data_dir, size, channels, a.cache_dir)
    found = array(side)
    if found.images.shape[2:] != (size, size) or channels not in (0, found.channels):
        wanted = f"{channels or 'any'} x {size} x {size}"
        raise ValueError(f"{side} holds {list(found.images.shape[1:])} images, wanted {wanted}")
    return found


def sampled(nets, args, script, a):
    """uint8 images [a.n, C, H, W] of a run."""
    if (args.image_size, args.channels) != (a.image_size, a.channels):
        raise ValueError(
            f"the run makes {args.channels} x {args.image_size} px images, the real side is "
            f"{a.channels} x {a.image_size}"
        )
    rng, found = torch.Generator().manual_seed(a.seed), []
    for first in range(0, a.n, CHUNK):
        z = script.latents(min(CHUNK, a.n - first), args, rng)
        found.append(data.to_uint8(script.sample(nets, args, z)).cpu())
        terminal.progress(f"sampling {min(first + CHUNK, a.n)}/{a.n} images")
    return torch.cat(found)


# ---- scores ----------------------------------------------------------------------------------


def measured(metrics, fake, real, against, name, device):
    """{metric: (number, text about it)} of uint8 images fake [n, C, H, W]; more numbers after _.

    real: data.Images, or None where against, the reference, is of a file.
    """
    n, found, row = len(fake), features.extract(fake, name, device), {}
    if "fid" in metrics:
        m = against["m"] or "the file's"
        row["fid"] = scores.frechet(found, against), f"{n} generated, {m} real"
    if real is None:
        return row
    drawn = against["real"]
    sides = f"{n} generated, {len(drawn)} real"
    if "kid" in metrics:
        row["kid"], row["kid_std"] = fid.kid(found, drawn)
        size = min(n, len(drawn), 1000)
        row["kid"] = row["kid"], f"+- {row['kid_std']:.2g} over 100 subsets of {size}; {sides}"
    if {*NEAREST} & {*metrics}:
        for m, value in precision_recall(drawn, found).items():
            row |= {m: (value, f"k = {NEAREST[m]}; {sides}")} if m in metrics else {}
    if "is" in metrics:
        row["is"], row["is_std"] = scores.inception_score(features.logits(found, name))
        row["is"] = row["is"], f"+- {row['is_std']:.2g} over 10 splits; {n} generated"
    test, split = (real.test, "held-out") if real.test else (real, "real")
    for m in {"diversity", "variance"} & {*metrics}:
        of = scores.diversity if m == "diversity" else scores.pixel_variance
        row[m], row[f"{m}_real"] = of(fake), of(test.images)
        row[m] = row[m], f"{row[f'{m}_real']:.4g} of {len(test)} {split}; {n} generated"
    if "diversity" in metrics:
        noise = torch.randn(test.images.shape, generator=torch.Generator().manual_seed(0))
        noised = (test.images + noise * (NOISE * 255)).round_().clamp_(0, 255).to(torch.uint8)
        row["diversity_noised"] = value = scores.diversity(noised)
        text = f"1 - MS-SSIM of {scores.scales_of(fake.shape[3])} scales, 1000 pairs"
        text += f"; {value:.4g} noised by {NOISE}, {row['diversity'][1]}"
        row["diversity"] = row["diversity"][0], text
    return row


def arguments(argv):
    p = cli.Parser(prog="python -m common.evaluate", description=__doc__)
    add = p.add_argument
    add("--real", required=True, help="a named set, a folder of images, .npy or .npz")
    add("--fake", help="the same but .npz, or a run folder or its checkpoint")
    add("--floor", action="store_true", help="in place of --fake: the real set's held-out split")
    add("--stats", metavar="FILE", help="in place of --fake: write the real statistics there")
    add("--metrics", help=f"of {','.join(METRICS)} [{','.join(USUAL)}]")
    add("--features", default="auto", help=f"{', '.join(features.NAMES)} [auto: by channels]")
    add("--weights", metavar="FILE", help="of inception or vgg16 [torch's hub cache or a download]")
    add("--n", type=int, default=10000, help="generated images; of a folder at most all [10000]")
    add("--image-size", type=int, help="of both sides [the run's; inception, vgg16: as found; 32]")
    add("--channels", type=int, default=0, choices=(0, 1, 3), help="0 = as the real images [0]")
    add("--data-dir", default="data", help="where data sets lie [data]")
    add("--cache-dir", default="data/cache", help="decoded images and statistics [data/cache]")
    add("--seed", type=int, default=0, help="of the latents of a run [0]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    add("--json", metavar="FILE", help="write the metrics there too")
    a = p.parse_args(argv)
    ranges = {"n": (scores.LEAST, 2**31), "image_size": (8, 1024), "seed": (0, 2**63 - 1)}
    for name, (least, most) in ranges.items():
        value, flag = getattr(a, name), "--" + name.replace("_", "-")
        if value is not None and not least <= value <= most:
            raise ValueError(f"{flag} must be from {least} to {most}, got {value}")
    if (a.fake is not None) + a.floor + (a.stats is not None) != 1:
        raise ValueError("give one of --fake (images or a run), --floor, and --stats FILE")
    stored = a.real.endswith(".npz")
    asked = a.metrics.split(",") if a.metrics else ["fid"] if stored else USUAL
    a.metrics = list(dict.fromkeys(asked))
    for m in a.metrics:
        if m not in METRICS:
            near = cli.close_to(m, METRICS)
            raise ValueError(f"--metrics: {m} is none of {', '.join(METRICS)}{near}")
    if stored and (a.metrics != ["fid"] or not a.fake):
        raise ValueError(f"{a.real} holds mean and covariance alone: give --fake and --metrics fid")
    network = a.features.removesuffix("-bf16")
    if a.weights and network not in ("inception", "vgg16"):
        raise ValueError(f"--weights is for inception and vgg16, and --features is {a.features}")
    if a.weights:
        features.FILES[network] = a.weights
    return a


def main(argv=None):
    a, trained = arguments(argv), None
    machine.exact()
    device, path = machine.device_of(a.device), Path(a.fake or "")
    if path.name in ("checkpoint.pt", "generator.pt"):
        path = path.parent
    if a.fake and (path / "args.json").exists():
        nets, args, script = trained = run.load(path, str(device))
        if not hasattr(script, "latents"):
            raise ValueError(f"{script.__name__}.py translates: give a folder from common.sample")
        a.image_size, a.channels = a.image_size or args.image_size, a.channels or args.channels
    if a.features.startswith(("inception", "vgg16")):
        a.image_size = a.image_size or own_size(a.fake or a.real) or own_size(a.real)
    a.image_size = a.image_size or 32

    real = None if a.real.endswith(".npz") else images_of(a.real, a)
    a.channels = a.channels if real is None else real.channels
    if a.floor and real.test is None:
        raise ValueError(f"{a.real} has no held-out split to take the floor from")
    if trained:
        fake = sampled(*trained, a)
    elif not a.stats:
        fake = (real.test if a.floor else images_of(a.fake, a)).images
        fake, a.channels = fake[scores.drawn_rows(len(fake), a.n)], fake.shape[1]
    name = features.resolve(a.features, a.channels)
    if a.stats:
        against = scores.reference(real, name, scores.LEAST, a.cache_dir, device)
        np.savez(a.stats, mu=against["mu"].numpy(), sigma=against["sigma"].numpy())
        terminal.result(f"{a.stats}: {name} features of {against['m']} images of {a.real}")
        return
    if real is not None:
        against = scores.reference(real, name, len(fake), a.cache_dir, device)
    else:
        against = statistics(a.real)
    row = measured(a.metrics, fake, real, against, name, device)
    split = "training split" if real and real.test else "all images" if real else "statistics"
    where = f"features {name}, {a.channels} x {a.image_size} px"
    terminal.result(f"{a.fake or 'held-out split'} against {a.real} ({split}), {where}")
    for m in a.metrics:
        value, text = row[m]
        row[m] = value
        label = f"IS ({name})" if m == "is" else pictures.fid_label(name, m)
        terminal.result(f"  {label:<18} {value:.5g}  ({text})")
    if a.json:
        about = dict(real=a.real, fake=a.fake or "held-out split", split=split, n=len(fake))
        about |= dict(real_images=against["m"], features=name)
        about |= dict(image_size=a.image_size, channels=a.channels)
        files.write_json(a.json, about | {k: round(v, 6) for k, v in row.items()})


if __name__ == "__main__":
    cli.guard(main)
