"""Named sets and folders of images -> uint8 tensors -> batches in [-1, 1].

    images = load_images("digits")              # .images uint8 [M, C, H, W], .labels, .test
    for x in Batches(images, 64, 0, "cpu"):     # float32 [64, C, H, W], endless

What is slow to make is kept under cache_dir; data_dir is read, and written by a download alone.
"""
import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import io
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import files, folders, processes, synthetic, terminal

DIGITS = 20_000, 4_000  # training and held-out images
BLUEPRINTS = 1_500, 200  # some ten seconds of drawing at 64 px
STRIPES = 1_100, 150  # in each domain
PUBLISHED = {  # name: class in torchvision.datasets, where packed files lie
    "mnist": ("MNIST", "MNIST/raw/*.gz"),
    "fashion": ("FashionMNIST", "FashionMNIST/raw/*.gz"),
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
}
NAMES = {
    "images": ["digits", *PUBLISHED],
    "pairs": ["blueprints", "facades"],
    "two domains": ["stripes", "horse2zebra"],
}
DOMAINS = "trainA, trainB, testA and testB inside"
PLACED = {  # sets that lie in data_dir
    "facades": "train and test inside, each picture a photograph with its label map on the right, "
    "the CMP Facade Database as published with pix2pix",
    "horse2zebra": f"{DOMAINS}, as published with CycleGAN",
}


@dataclass(eq=False)
class Images:
    """images uint8 [M, C, H, W], labels int64 [M] or None, test: the held-out split or None.

    counterpart: of a domain, what its test images are in the other one, where that is known.
    """

    images: torch.Tensor
    labels: torch.Tensor | None = None
    test: "Images | None" = None
    name: str = ""
    counterpart: torch.Tensor | None = None

    def __len__(self):
        return len(self.images)

    @property
    def channels(self):
        return self.images.shape[1]

    @functools.cached_property
    def fingerprint(self):
        """Short sha256 of shape and pixels, whatever the set is called and wherever it lies."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy())
        return digest.hexdigest()[:16]


@dataclass(eq=False)
class Pairs(Images):
    """images uint8 [M, CA + CB, H, W]: A's channels, then B's; channels: (CA, CB)."""

    channels: tuple[int, int] = (3, 3)


def load_images(name, data_dir="data", image_size=32, channels=0, cache_dir="data/cache"):
    """The set of this name, or the folder of images at this path -> Images.

    28 x 28 pictures are padded to 32 with their background. Of other sizes the central square is
    resized to image_size (bicubic, antialiased). channels 0: as in the data; 1 or 3: converted.
    A folder named like a set is reached as ./digits. ValueError for what cannot be loaded.
    """
    if channels not in (0, 1, 3):
        raise ValueError(f"channels is {channels}; it can be 0 (as in the data), 1 or 3")
    name = str(name)
    if name == "digits":
        images, labels = _drawn(name, sum(DIGITS), cache_dir)
        splits = zip(_padded(images).split(DIGITS), labels.split(DIGITS))
    elif name in PUBLISHED:
        splits = _published(name, Path(data_dir))
    else:
        splits = folders.sets(_folder(name, "images", data_dir), image_size, cache_dir)
    pixels, labels = zip(*splits)
    pixels = _converted([_resized(p, image_size) for p in pixels], channels)
    return _joined([Images(p, y, name=name) for p, y in zip(pixels, labels)])


def load_pairs(name, data_dir="data", image_size=64, cache_dir="data/cache"):
    """Aligned pairs, of the set of this name or the folder at this path -> Pairs.

    blueprints: A label maps, B facades; facades: A photographs, B label maps. folders.pairs says
    what a folder can hold. ValueError for what cannot be loaded.
    """
    name = str(name)
    if name == "blueprints":
        drawn = _drawn(name, sum(BLUEPRINTS), cache_dir, image_size)
        splits = zip(*(side.split(BLUEPRINTS) for side in drawn))
    else:
        splits = folders.pairs(_folder(name, "pairs", data_dir), image_size, cache_dir)
    a, b = (_converted(side) for side in zip(*splits))
    channels = a[0].shape[1], b[0].shape[1]
    sets = [torch.cat(both, 1) for both in zip(a, b)]
    return _joined([Pairs(pixels, name=name, channels=channels) for pixels in sets])


def load_domains(name, data_dir="data", image_size=64, cache_dir="data/cache"):
    """Two domains of unpaired images, of the set of this name or the folder at this path.

    Returns (A, B), two Images of equal channels, fitted like those of load_images. stripes: A
    plain, B striped; no scene is in both. ValueError for what cannot be loaded.
    """
    name, known = str(name), (None, None)
    if name == "stripes":
        n, m = STRIPES
        scenes = _drawn(name, 2 * (n + m), cache_dir, image_size)
        plain, striped = (side.split([n, n, m, m]) for side in scenes)
        splits, known = [(plain[0], striped[1]), (plain[2], striped[3])], (striped[2], plain[3])
    else:
        root = _folder(name, "two domains", data_dir)
        splits = folders.domains(root, image_size, cache_dir)
        if not splits:
            raise ValueError(f"{root} holds no two domains; wanted {DOMAINS}")
    pixels = _converted([p for side in zip(*splits) for p in side])
    both = pixels[: len(splits)], pixels[len(splits) :]
    a, b = (_joined([Images(p, name=name) for p in side]) for side in both)
    return replace(a, counterpart=known[0]), replace(b, counterpart=known[1])


def subset(images, n):
    """n of the training images, the same at every call and each subset part of a larger one.

    0 takes all. The held-out split stays whole.
    """
    if not 0 <= n <= len(images):
        raise ValueError(f"subset is {n}; {images.name or 'the set'} has {len(images)} images")
    if n == 0:
        return images
    chosen = torch.randperm(len(images), generator=synthetic.generator(0))[:n]
    labels = None if images.labels is None else images.labels[chosen]
    return replace(images, images=images.images[chosen], labels=labels)


def to_float(u8):
    """uint8 pixels -> float32 in [-1, 1]."""
    return u8.float().div_(127.5).sub_(1)


def to_uint8(x):
    """[-1, 1] -> uint8, rounded; the inverse of to_float. What lies outside is clamped."""
    return x.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class Batches:
    """Endless iterator of float32 [N, C, H, W] in [-1, 1] on device; images: Images or uint8.

    Batch number b is a function of (seed, domain, b) alone: each epoch is a permutation of its own,
    whose incomplete tail is dropped. batch_size is that of all processes together; each gets its
    own stretch of N = batch_size / ranks. drawn: how many batches were given; size: of how many
    images. On a GPU whose memory the set fits, every batch is gathered into one and the same
    tensor, as a captured update reads.
    """

    def __init__(self, images, batch_size, seed, device, domain=0):
        self.images = images if isinstance(images, Images) else Images(images)
        self.drawn, self.batch_size, self.device = 0, batch_size, torch.device(device)
        self.size = len(self.images)
        pixels, ranks = self.images.images, processes.ranks()
        if batch_size < 1 or batch_size % ranks:
            raise ValueError(
                f"batch_size is {batch_size}; wanted a positive multiple of the {ranks} processes"
            )
        if len(pixels) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, and there are only {len(pixels)} training images"
            )
        self._numbers = (seed, domain) if domain else (seed,)
        self._epoch = self._order = self._floats = None
        self._share = batch_size // ranks
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            if pixels.nbytes * 5 < free / 2:  # the bytes and their floats
                self._floats = to_float(pixels.to(self.device))
                self._batch = self._floats.new_empty(self._share, *pixels.shape[1:])

    def __iter__(self):
        return self

    def __next__(self):
        rows = self._rows()
        self.drawn += 1
        if self._floats is not None:
            return torch.index_select(self._floats, 0, rows, out=self._batch)
        batch = self.images.images[rows]
        if self.device.type == "cuda":  # not waited for; bytes are a quarter of the floats
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return to_float(batch)

    def _rows(self):
        """Numbers of the images in this process's share of the next batch."""
        n = len(self.images)
        epoch, i = divmod(self.drawn, n // self.batch_size)
        if epoch != self._epoch:
            order = torch.randperm(n, generator=synthetic.generator(*self._numbers, epoch))
            self._order = order if self._floats is None else order.to(self.device)
            self._epoch = epoch
        first = i * self.batch_size + processes.rank() * self._share
        return self._order[first : first + self._share]

    def state_dict(self):
        return {"drawn": self.drawn, "fingerprint": self.images.fingerprint}

    def load_state_dict(self, state):
        if state["fingerprint"] != self.images.fingerprint:
            raise ValueError(
                "the training images have changed since: their fingerprint is "
                f"{self.images.fingerprint}, it was {state['fingerprint']}"
            )
        self.drawn = state["drawn"]


# ---- where sets come from --------------------------------------------------------------------


def _folder(name, kind, data_dir):
    """The folder of a named set or at a path; ValueError says what else was wanted."""
    if name in NAMES[kind]:
        folder = Path(data_dir, name)
        if not folder.is_dir():
            raise ValueError(f"{name} is not in {data_dir}; wanted {folder} with {PLACED[name]}")
        return folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ValueError(f"dataset {name!r} is a file; wanted a folder of images")
    there = ", ".join(NAMES[kind])
    for other in NAMES:
        if name in NAMES[other]:
            raise ValueError(f"dataset {name!r} has {other}; wanted {kind}: {there} or a folder")
    near = difflib.get_close_matches(name.lower(), NAMES[kind], 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"dataset {name!r} is no folder here and none of {there}{meant}")


def _drawn(name, n, cache_dir, *size):
    """The two tensors that synthetic.NAME(n, 0, *size) draws."""
    key = [n, *size, importlib.metadata.version("pillow")]  # Pillow has the font

    def make():
        return {"two": list(getattr(synthetic, name)(n, 0, *size))}

    return files.cached(cache_dir, name, key, make, synthetic.VERSION)["two"]


def _published(name, data_dir):
    """[(images uint8 [M, C, 32, 32], labels int64 [M])] of train and test, read by torchvision."""
    kind, packed = PUBLISHED[name]
    try:
        from torchvision import datasets

        dataset = getattr(datasets, kind)
        try:
            both = [dataset(data_dir, train) for train in (True, False)]
        except RuntimeError as e:  # torchvision's for what is missing, torch's for files cut short
            if "not found" not in str(e):
                raise
            _download(dataset, data_dir, packed)
            both = [dataset(data_dir, train) for train in (True, False)]
    except MemoryError:
        raise
    except Exception as e:  # whatever urllib, ssl, pickle, tarfile and torch raise comes through
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]
        raise ValueError(
            f"{name} can be neither read from {data_dir} nor downloaded to it ({reason}); "
            "--dataset digits needs no download"
        ) from e
    splits = []
    for part, m in zip(both, (60_000, 10_000)):
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        if name == "cifar10":  # right by its checksums
            splits.append((images.permute(0, 3, 1, 2).contiguous(), labels))
        elif images.shape == (m, 28, 28) and labels.shape == (m,) and labels.max() < 10:
            splits.append((_padded(images[:, None]), labels))
        else:
            found = f"images {list(images.shape)} with labels {list(labels.shape)}"
            raise ValueError(f"{data_dir / kind} is not {name}: {found}, wanted {m} of 28 x 28")
    return splits


def _download(dataset, data_dir, packed):
    """Have torchvision fetch, check and unpack a set; each file comes to its place whole."""
    near = next(d for d in [data_dir, *data_dir.parents, Path()] if d.is_dir())  # the same disk
    with tempfile.TemporaryDirectory(prefix=".download-", dir=near) as part:

        def move(files, start, end, how):
            for file in files:
                target = Path(end) / file.relative_to(start)
                target.parent.mkdir(parents=True, exist_ok=True)
                how(file, target)

        move(data_dir.glob(packed), data_dir, part, shutil.copy)  # what a person brought
        with contextlib.redirect_stdout(io.StringIO()):
            dataset(part, download=True)
        move([f for f in Path(part).rglob("*") if f.is_file()], part, data_dir, os.replace)


# ---- pixels ----------------------------------------------------------------------------------


def _joined(sets):
    return replace(sets[0], test=sets[1] if len(sets) > 1 else None)


def _padded(pixels):
    return F.pad(pixels, (2, 2, 2, 2))


def _resized(pixels, size):
    from PIL import Image

    if tuple(pixels.shape[2:]) == (size, size):
        return pixels
    out = torch.empty(len(pixels), pixels.shape[1], size, size, dtype=torch.uint8)
    for i, image in enumerate(terminal.track(pixels, "resizing images")):
        planes = [np.asarray(folders.square(Image.fromarray(p), size)) for p in image.numpy()]
        out[i] = torch.from_numpy(np.stack(planes))
    return out


def _converted(splits, channels=0):
    """Splits with this number of channels; 0: the most that one of them has."""
    channels = channels or max(pixels.shape[1] for pixels in splits)
    return [_recoloured(pixels, channels) for pixels in splits]


def _recoloured(pixels, channels):
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(1, 3, 1, 1)

    def grey(rgb):
        r, g, b = rgb.int().unbind(1)
        return (19595 * r + 38470 * g + 7471 * b + 2**15 >> 16).to(torch.uint8)[:, None]

    # Pillow's mode L; by parts, since int32 of the whole set would be four times it
    return torch.cat([grey(part) for part in pixels.split(1000)])
