"""Rows of metrics: what a script is scored by, for metrics.csv and common.evaluate.

    score = of_generator(generate, images, args)     # image GANs; score() -> dict, a row
    distances(fake, real, "auto")                    # image to image: {"fid", "kid"} of two sets
    psnr(a, b), ssim(a, b), diversity(images)        # of pixels; inception_score of logits

Both sides are quantised to uint8 before features are taken, so a number does not change when
samples are saved as PNG. The Frechet distance compares with the whole training split; precision,
recall, density and coverage with as many real images as generated ones, drawn with a fixed seed.
"""
import functools
import math

import torch
import torch.nn.functional as F

from common import data, features, fid, files, terminal
from common.precision_recall import precision_recall

CHUNK = 500  # images generated and scored at a time
READ = 20480  # real images whose features are held at a time, a multiple of extract's batches
LEAST = 6  # points that precision_recall needs
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales, the finest first


# ---- the real side ---------------------------------------------------------------------------


def drawn_rows(m, n):
    """min(n, m) of m rows, drawn with a fixed seed: folders are in order of their classes."""
    return torch.randperm(m, generator=torch.Generator().manual_seed(0))[:n]


def reference(images, feature_name, n, cache_dir="data/cache", device="cpu"):
    """What a number n of generated images is compared with; cached by content, features and n.

    images: data.Images with M images. Returns a dict: features (the resolved name), m = M, mu [d]
    and sigma [d, d] float64 of all images, real [min(n, M), d] float32 of those drawn, and all
    [M, d] where M is at most d, as moments are not exact there.
    """
    name = features.resolve(feature_name, images.channels)
    m, rows = len(images.images), drawn_rows(len(images.images), n)

    def make():
        moments = fid.Statistics()
        for first in range(0, m, READ):
            found = features.extract(images.images[first : first + READ], name, device)
            if first == 0:
                real = found.new_empty(len(rows), found.shape[1])
            inside = (rows >= first) & (rows < first + len(found))
            real[inside] = found[rows[inside] - first]
            moments.update(found)
        value = {"m": m, "mu": moments.mean, "sigma": moments.cov, "real": real}
        return value | ({"all": found} if m <= found.shape[1] else {})

    key = {"content": images.fingerprint, "features": name, "weights": features.version(name)}
    key["n"] = len(rows)
    return files.cached(cache_dir, "statistics", key, make, version=2) | {"features": name}


@functools.cache  # once for each pair of numbers, not at every evaluation
def warn_few(n, m, d):
    """Say so where a distance of n generated and m real images in d dimensions says little."""
    if min(n, m) <= d:
        terminal.warn(
            f"a Frechet distance of {n} generated and {m} real images in {d} dimensions is mostly "
            f"bias: it compares with others of the same numbers only; wanted more than {d} of each"
        )
    elif max(n, m) > 50 * min(n, m):
        terminal.warn(
            f"{n} generated and {m} real images: the smaller number decides how far off the "
            "Frechet distance is; compare at equal numbers only"
        )


# ---- rows ------------------------------------------------------------------------------------


def frechet(fake, reference):
    """Frechet distance of features fake [n, d] to what `reference` returned."""
    warn_few(len(fake), reference["m"] or len(fake), fake.shape[1])
    if "all" in reference:
        return fid.frechet_from_features(fake, reference["all"])
    return fid.frechet_to_moments(fake, reference["mu"], reference["sigma"])


def of_features(fake, reference):
    """The row of features fake [n, d] against what `reference` returned."""
    row = {"n": len(fake), "features": reference["features"], "fid": frechet(fake, reference)}
    row |= precision_recall(reference["real"], fake)
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def of_generator(generate, images, args):
    """A function score() -> row, which compares generated images with the training split.

    generate(n, rng) -> images float [n, C, H, W] in [-1, 1], rng being a torch.Generator on the CPU
    of a fixed seed; images: data.Images; args: features, eval_samples, seed, cache_dir, dataset.
    ValueError, before anything is computed, where there are too few images or no features for them.
    """
    name, m, n = features.resolve(args.features, images.channels), len(images), args.eval_samples
    features.version(name)  # weights that cannot be had are no surprise after the training
    for what, number in ((f"{args.dataset} has {m} images", m), (f"eval_samples is {n}", n)):
        if number < LEAST:
            raise ValueError(f"{what}; scores need at least {LEAST}")
    _, channels, size, _ = images.images.shape
    measured_on = dict(dataset=args.dataset, split="train", real_images=m, sampled_in="fp32")
    measured_on |= dict(image_size=size, channels=channels)
    kept = []  # statistics of the real side, made or read at the first evaluation

    def score():
        rng = torch.Generator().manual_seed(args.seed + 1)  # not the latents of the grid
        found = []
        for first in range(0, n, CHUNK):
            fake = data.to_uint8(generate(min(CHUNK, n - first), rng))
            found.append(features.extract(fake, name, fake.device))
            terminal.progress(f"scoring {min(first + CHUNK, n)}/{n} samples")
        if not kept:
            kept.append(reference(images, name, n, args.cache_dir, fake.device))
        return of_features(torch.cat(found), kept[0]) | {"measured_on": measured_on}

    return score


def checked_features(name, channels, numbers):
    """The name of the features that distances are taken in, once it is sure that they can be.

    numbers: {what a set is called: its images}. ValueError where one has fewer than two or weights
    are missing, which is better said before the training than after it.
    """
    for what, number in numbers.items():
        if number < 2:
            raise ValueError(f"{what}: {number} of at least 2 images that distances need")
    name = features.resolve(name, channels)
    features.version(name)
    return name


def distances(fake, real, feature_name="auto", device="cpu"):
    """{"fid", "kid"} of uint8 images [n, C, H, W] and [m, C, H, W]; exact for few images too.

    fid is FID on Inception features alone, and kid the mean over subsets, not times 1000.
    """
    fake, real = (features.extract(x, feature_name, device) for x in (fake, real))
    warn_few(len(fake), len(real), fake.shape[1])
    return {"fid": fid.frechet_from_features(fake, real), "kid": fid.kid(fake, real)[0]}


def inception_score(logits, splits=10):
    """Salimans et al. 2016, arXiv:1606.03498: (mean, std) over splits of exp E KL(p(y|x) || p(y)).

    logits [n, classes], n at least splits; shuffled with a fixed seed, std of the population.
    """
    logits = logits[drawn_rows(len(logits), len(logits))].double()
    values = []
    for x in logits.log_softmax(1).tensor_split(splits):
        marginal = x.logsumexp(0) - math.log(len(x))
        values.append((x.exp() * (x - marginal)).nan_to_num(0).sum(1).mean().exp())  # 0 log 0 = 0
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


# ---- pixels ----------------------------------------------------------------------------------


def psnr(a, b):
    """10 log10(2^2 / MSE) in dB, averaged over images a, b [N, C, H, W] in [-1, 1]."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).mean().item()


def ssim(a, b):
    """Structural similarity of a, b [N, C, H, W] in [-1, 1], at least 11 px, averaged over N.

    Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5, weighted moments, the mean over
    the places where the window fits and over channels; constants (0.01 L)^2, (0.03 L)^2, L = 1.
    """
    luminance, contrast = _similarity((a.double() + 1) / 2, (b.double() + 1) / 2)
    return (luminance * contrast).mean().item()


def _similarity(a, b):
    """Luminance and contrast-structure maps [N, C, H - 10, W - 10] of SSIM; a, b in [0, 1]."""
    window = torch.exp(-torch.arange(-5, 6, dtype=a.dtype, device=a.device).square() / (2 * 1.5**2))
    window, c = window / window.sum(), a.shape[1]

    def blur(x):
        x = F.conv2d(x, window.view(1, 1, 11, 1).expand(c, -1, -1, -1), groups=c)
        return F.conv2d(x, window.view(1, 1, 1, 11).expand(c, -1, -1, -1), groups=c)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return luminance, (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)


def scales_of(size):
    """How many of MS-SSIM's 5 scales its window of 11 pixels allows: 2 at 32 px, 3 at 64."""
    if size < 11:
        raise ValueError(f"SSIM needs images of 11 pixels, got {size}")
    return min(5, (size // 11).bit_length())


def ms_ssim(a, b):
    """Multi-scale SSIM [N] of a, b [N, C, H, W] in [0, 1].

    Wang et al. 2003; the weights of the scales that there are, are divided by their sum. Negative
    structure counts as 0.
    """
    scales = scales_of(min(a.shape[2:]))
    value = 1.0
    for i, weight in enumerate(WEIGHTS[:scales]):
        luminance, contrast = _similarity(a, b)
        term = (luminance * contrast if i == scales - 1 else contrast).mean((1, 2, 3)).clamp(min=0)
        value = value * term ** (weight / sum(WEIGHTS[:scales]))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value


def diversity(images, pairs=1000):
    """1 - mean MS-SSIM of random pairs of uint8 images [N, C, H, W], N >= 2.

    Rosca et al. 2018, arXiv:1802.06847: 0 where all images are one. Read beside that of real
    images: lower is a collapse, higher not like the data.
    """
    rng, found = torch.Generator().manual_seed(0), []
    i = torch.randint(len(images), (pairs,), generator=rng)
    j = (i + torch.randint(1, len(images), (pairs,), generator=rng)) % len(images)  # never itself
    for i, j in zip(i.split(100), j.split(100)):
        found.append(ms_ssim(*(images[rows].double() / 255 for rows in (i, j))))
    return 1 - torch.cat(found).mean().item()


def pixel_variance(images):
    """Mean over pixels of the variance over uint8 images [N, C, H, W], on the scale of [-1, 1]."""
    total = squares = 0.0
    for part in images.split(CHUNK):
        x = data.to_float(part).double()
        total, squares = total + x.sum(0), squares + x.square().sum(0)
    return (squares / len(images) - (total / len(images)).square()).mean().item()
