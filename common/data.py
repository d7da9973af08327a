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
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import files, folders, processes, synthetic, terminal

DIGITS = 20_000, 4_000  # training and held-out images of the built-in sets
BLUEPRINTS = 2_000, 200
STRIPES = 1_000, 100  # in each domain
PUBLISHED = {  # name: class in torchvision.datasets, where the packed files lie
    "mnist": ("MNIST", "MNIST/raw/*.gz"),
    "fashion": ("FashionMNIST", "FashionMNIST/raw/*.gz"),
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz"),
}
NAMES = {
    "images": ["digits", *PUBLISHED],
    "pairs": ["blueprints", "facades"],
    "two domains": ["stripes", "horse2zebra"],
}


def fingerprint(pixels):
    """Short sha256 of a uint8 tensor's shape and values, wherever it came from."""
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(pixels.contiguous().numpy())
    return digest.hexdigest()[:16]


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
        return fingerprint(self.images)


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
    if name in NAMES["images"]:
        loaded = _published(name, Path(data_dir)) if name in PUBLISHED else _digits(cache_dir)
        splits = [(_resized(pixels, image_size), labels) for pixels, labels in loaded]
    else:
        splits = folders.sets(_existing(name, "images"), image_size, cache_dir)
    pixels = _converted([pixels for pixels, _ in splits], channels)
    sets = [Images(p, labels, None, name) for p, (_, labels) in zip(pixels, splits)]
    return replace(sets[0], test=sets[1]) if len(sets) > 1 else sets[0]


def load_pairs(name, data_dir="data", image_size=64, cache_dir="data/cache"):
    """Aligned pairs, of the set of this name or the folder at this path -> Pairs.

    blueprints: A label maps, B facades; facades: A photographs, B label maps. The layouts of
    folders: folders.pairs. ValueError for what cannot be loaded.
    """
    name = str(name)
    if name == "blueprints":
        drawn = _drawn(name, sum(BLUEPRINTS), image_size, cache_dir)
        splits = list(zip(*(pixels.split(BLUEPRINTS) for pixels in drawn)))
    else:
        layout = "train and test inside, each picture a photograph and to its right the label map"
        source = "the CMP Facade Database as published with pix2pix"
        root = _existing(name, "pairs", Path(data_dir), layout, source)
        splits = folders.pairs(root, image_size, cache_dir)
    sides = [_converted(side) for side in zip(*splits)]  # A of all splits, B of all splits
    channels = tuple(side[0].shape[1] for side in sides)
    sets = [Pairs(torch.cat(both, 1), name=name, channels=channels) for both in zip(*sides)]
    return replace(sets[0], test=sets[1]) if len(sets) > 1 else sets[0]


def load_domains(name, data_dir="data", image_size=64, cache_dir="data/cache"):
    """Two domains of unpaired images, of the set of this name or the folder at this path.

    Returns (A, B), two Images of equal channels, fitted like load_images. stripes: A plain, B
    striped; no scene is in both. ValueError for what cannot be loaded.
    """
    name = str(name)
    counterparts = None, None
    if name == "stripes":
        n, m = STRIPES
        scenes = _drawn(name, 2 * (n + m), image_size, cache_dir)
        plain, striped = (pixels.split([n, n, m, m]) for pixels in scenes)
        splits = [(plain[0], striped[1]), (plain[2], striped[3])]
        counterparts = striped[2], plain[3]
    else:
        layout = "trainA, trainB, testA and testB inside"
        source = "the data sets published with CycleGAN"
        root = _existing(name, "two domains", Path(data_dir), layout, source)
        splits = folders.domains(root, image_size, cache_dir)
        if not splits:
            raise ValueError(f"{root} holds no two domains; wanted {layout}")
    pixels = iter(_converted([pixels for both in splits for pixels in both]))
    sets = [[Images(next(pixels), name=name) for _ in both] for both in splits]
    test = sets[1] if len(sets) > 1 else (None, None)
    return tuple(
        replace(domain, test=t, counterpart=c) for domain, t, c in zip(sets[0], test, counterparts)
    )


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
    """Endless iterator of float32 [N, C, H, W] in [-1, 1] on device.

    Batch number b is a function of (seed, domain, b) alone: epoch e is a permutation of its own,
    whose incomplete tail is dropped. batch_size is that of all processes together; each gets its
    own stretch of N = batch_size / ranks. On a GPU whose memory the set fits, a batch is one gather
    into one and the same tensor, overwritten by the next, as a captured update reads it.

    images: Images, or uint8 [M, C, H, W]; drawn: how many batches have been given.
    """

    def __init__(self, images, batch_size, seed, device, domain=0):
        pixels = images.images if isinstance(images, Images) else images
        ranks, device = processes.ranks(), torch.device(device)
        if batch_size < 1 or batch_size % ranks:
            wanted = f"a positive multiple of {ranks} processes" if ranks > 1 else "1 or more"
            raise ValueError(f"batch_size is {batch_size}; wanted {wanted}")
        if len(pixels) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, and there are only {len(pixels)} training images"
            )
        self.drawn, self.batch_size, self.device = 0, batch_size, device
        self._source, self._pixels, self._share = images, pixels, batch_size // ranks
        self._seed = (seed, domain) if domain else (seed,)
        self._epoch = self._order = self._floats = self._sent = None
        cuda = device.type == "cuda"
        if cuda and pixels.nbytes * 5 < torch.cuda.mem_get_info(device)[0] / 2:  # bytes and floats
            self._floats = to_float(pixels.to(device))
            self._batch = self._floats.new_empty(self._share, *pixels.shape[1:])
        elif cuda:
            self._stream = torch.cuda.Stream(device)

    def __iter__(self):
        return self

    def __next__(self):
        b, self.drawn = self.drawn, self.drawn + 1
        if self._floats is not None:
            return torch.index_select(self._floats, 0, self._rows(b), out=self._batch)
        if self.device.type == "cuda":
            return to_float(self._arrived(b))
        return to_float(self._pixels[self._rows(b)]).to(self.device)

    def _rows(self, b):
        """Numbers of the images in this process's share of batch b."""
        epoch, i = divmod(b, len(self._pixels) // self.batch_size)
        if epoch != self._epoch:
            draw = synthetic.generator(*self._seed, epoch)
            order = torch.randperm(len(self._pixels), generator=draw)
            self._order = order if self._floats is None else order.to(self.device)
            self._epoch = epoch
        first = i * self.batch_size + processes.rank() * self._share
        return self._order[first : first + self._share]

    def _arrived(self, b):
        """Batch b as bytes on the GPU, while b + 1 is sent on its way from pinned memory."""

        def send(b):  # bytes travel, a quarter of the floats
            with torch.cuda.stream(self._stream):
                batch = self._pixels[self._rows(b)].pin_memory().to(self.device, non_blocking=True)
                return b, batch, self._stream.record_event()

        number, batch, arrival = self._sent if self._sent and self._sent[0] == b else send(b)
        self._sent = send(number + 1)
        here = torch.cuda.current_stream(self.device)
        here.wait_event(arrival)
        batch.record_stream(here)  # the memory came from the other stream
        return batch

    @functools.cached_property
    def _fingerprint(self):
        return self._source.fingerprint if isinstance(self._source, Images) else fingerprint(self._pixels)

    def state_dict(self):
        return {"drawn": self.drawn, "fingerprint": self._fingerprint}

    def load_state_dict(self, state):
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the training images are not those of this run (fingerprint {self._fingerprint}, "
                f"then {state['fingerprint']})"
            )
        self.drawn = state["drawn"]


# ---- named sets ------------------------------------------------------------------------------


def _existing(name, kind, data_dir=None, layout="", source=""):
    """The folder of a named set or at a path; ValueError says what was wanted where there is none."""
    if name in NAMES[kind]:
        folder = data_dir / name
        if not folder.is_dir():
            raise ValueError(f"{name} is not in {folder}; wanted that folder with {layout}: {source}")
        return folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ValueError(f"dataset {name!r} is a file; wanted a folder of images")
    for other, names in NAMES.items():
        if name in names:
            raise ValueError(f"dataset {name!r} has {other}; wanted {kind}: {', '.join(NAMES[kind])}")
    near = difflib.get_close_matches(name.lower(), NAMES[kind], 1)
    raise ValueError(
        f"dataset {name!r} is no folder here and none of {', '.join(NAMES[kind])}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _cached_drawing(name, n, cache_dir, draw, **key):
    key |= {"n": n, "seed": 0, "pillow": importlib.metadata.version("pillow")}  # it has the font
    make = lambda: dict(zip("ab", draw()))  # noqa: E731
    value = files.cached(cache_dir, name, key, make, synthetic.VERSION)
    return value["a"], value["b"]


def _digits(cache_dir):
    n = sum(DIGITS)
    images, labels = _cached_drawing("digits", n, cache_dir, lambda: synthetic.digits(n, seed=0))
    return list(zip(_padded(images).split(DIGITS), labels.split(DIGITS)))


def _drawn(name, n, size, cache_dir):
    draw = getattr(synthetic, name)
    return _cached_drawing(name, n, cache_dir, lambda: draw(n, 0, size), size=size)


def _published(name, data_dir):
    """[(images uint8 [M, C, 32, 32], labels int64 [M])] of train and test, by torchvision."""
    kind, packed = PUBLISHED[name]
    try:
        try:
            from torchvision import datasets

            read = functools.partial(getattr(datasets, kind), data_dir)
            both = [read(train=True), read(train=False)]
        except RuntimeError as e:  # torchvision's word for what is missing, and for cut files
            if "not found" not in str(e):
                raise
            _download(getattr(datasets, kind), data_dir, packed)
            both = [read(train=True), read(train=False)]
    except MemoryError:
        raise
    except Exception as e:  # what urllib, ssl, pickle, tarfile and torch raise comes through
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]
        raise ValueError(
            f"{name} cannot be read from {data_dir} or downloaded to it ({reason}); --dataset digits "
            "needs no download"
        ) from e
    splits = []
    for part, m in zip(both, (60_000, 10_000)):
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        if kind == "CIFAR10":
            splits.append((images.permute(0, 3, 1, 2).contiguous(), labels))  # by its checksums right
        elif images.shape == (m, 28, 28) and labels.shape == (m,) and labels.max() < 10:
            splits.append((_padded(images[:, None]), labels))
        else:
            found = f"{list(images.shape)} with labels {list(labels.shape)}"
            raise ValueError(f"{data_dir / kind} holds {found}; wanted [{m}, 28, 28] with [{m}], 0 to 9")
    return splits


def _download(dataset, data_dir, packed):
    """Have torchvision fetch, check and unpack a set; each file comes to its place whole."""
    near = next(d for d in [data_dir, *data_dir.parents, Path()] if d.is_dir())  # on the same disk
    with tempfile.TemporaryDirectory(prefix=".download-", dir=near) as part:
        for file in data_dir.glob(packed):  # brought by hand: not fetched again
            target = part / file.relative_to(data_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        with contextlib.redirect_stdout(io.StringIO()):
            dataset(part, download=True)
        for file in (f for f in Path(part).rglob("*") if f.is_file()):
            target = data_dir / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


# ---- pixels ----------------------------------------------------------------------------------


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
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)  # Pillow's mode L, 16 bits
    grey = torch.empty(len(pixels), 1, *pixels.shape[2:], dtype=torch.uint8)
    for first in range(0, len(pixels), 1000):  # int32 of the whole set would be four times it
        part = pixels[first : first + 1000].int() * weights.view(3, 1, 1)
        grey[first : first + 1000] = (part.sum(1, keepdim=True) + 2**15) >> 16
    return grey
