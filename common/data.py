"""Named sets and folders of images -> uint8 tensors -> batches in [-1, 1].

    images = load_images("digits")            # .images uint8 [M, C, H, W], .labels, .test
    for x in batches(images, 64, seed=0):     # float32 [64, C, H, W], endless

What is slow to make is kept under cache_dir; data_dir is read, and written by a download alone.
"""
import collections
import contextlib
import difflib
import functools
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import uuid
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import synthetic, terminal

EXTENSIONS = ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm .pbm".split()
MOST_PIXELS = 2**28  # of one file, 1 GB once decoded; the largest cameras have 2e8
MOST_NAMES = 10  # broken files named before only their number is given

DIGITS_TRAIN, DIGITS_TEST = 20_000, 4_000

IDX = ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"]
MNIST_MD5 = [  # of the unpacked files
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
]
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3fb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


@dataclass(eq=False)
class Images:
    """images uint8 [M, C, H, W], labels int64 [M] or None, test: the held-out split or None."""

    images: torch.Tensor
    labels: torch.Tensor | None = None
    test: "Images | None" = None
    name: str = ""

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


def load_images(name, data_dir="data", image_size=32, channels=0, cache_dir="data/cache"):
    """The set of this name, or the folder of images at this path -> Images.

    28 x 28 sets are padded to 32 with black. Where a size differs from image_size, the central
    square is resized (bicubic, antialiased). channels 0: as in the data; 1 or 3: converted.
    A folder named like a set is reached as ./digits. ValueError for what cannot be loaded.
    """
    name = str(name)
    if channels not in (0, 1, 3):
        raise ValueError(f"channels is {channels}; it can be 0 (as in the data), 1 or 3")
    if name in SETS:
        splits = [
            (_resized(pixels, image_size), labels)
            for pixels, labels in SETS[name](Path(data_dir), cache_dir)
        ]
    else:
        splits = _folder(_existing(name), image_size, cache_dir)
    channels = channels or max(pixels.shape[1] for pixels, _ in splits)
    sets = [Images(_converted(p, channels), labels, None, name) for p, labels in splits]
    return replace(sets[0], test=sets[1]) if len(sets) > 1 else sets[0]


def subset(images, n, batch_size=1):
    """n of the training images, the same at every call and each subset part of a larger one.

    0 takes all. The held-out split stays whole. ValueError where less than a batch is left.
    """
    if not 0 <= n <= len(images):
        raise ValueError(f"subset is {n}; {images.name or 'the set'} has {len(images)} images")
    left = n or len(images)
    if left < batch_size:
        raise ValueError(f"batch_size is {batch_size}, and there are only {left} training images")
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


def batches(images, batch_size, seed, start=0, device="cpu", rank=0, ranks=1, static=False):
    """Endless iterator of float32 [N, C, H, W] in [-1, 1]; images: uint8 tensor or Images.

    Batch number b is a function of (seed, b) alone: epoch e is a permutation from (seed, e), its
    incomplete tail is dropped, and start, the number of batches drawn before, costs nothing.
    batch_size is that of all ranks together; each gets its own stretch of batch_size / ranks.
    static: where the set fits the device as floats, each batch is one gather into one and the same
    tensor, overwritten by the next, as a captured update reads it.
    """
    pixels = images.images if isinstance(images, Images) else images
    if batch_size < 1 or batch_size % ranks:
        raise ValueError(f"batch_size is {batch_size}; wanted a positive multiple of {ranks} ranks")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}; wanted one of 0 to {ranks - 1}")
    if len(pixels) < batch_size:
        raise ValueError(f"batch_size is {batch_size}, and there are only {len(pixels)} images")
    if start < 0:
        raise ValueError(f"start is {start}; wanted the number of batches drawn before")
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    share = batch_size // ranks
    if static and pixels.nbytes * 5 < free / 2:  # the bytes and their floats
        floats = to_float(pixels.to(device))
        batch = floats.new_empty(share, *pixels.shape[1:])
        rows = _rows(len(pixels), batch_size, seed, start, rank, share, device)
        return (torch.index_select(floats, 0, row, out=batch) for row in rows)
    if device.type == "cuda" and pixels.nbytes < free / 2:
        pixels = pixels.to(device)
    rows = _rows(len(pixels), batch_size, seed, start, rank, share, pixels.device)
    chosen = (pixels.index_select(0, row) for row in rows)
    if device.type != pixels.device.type:
        chosen = _ahead(chosen, device)
    return map(to_float, chosen)


def _rows(n, batch_size, seed, start, rank, share, device):
    """Numbers of the images of one rank's batches, endless."""
    per_epoch = n // batch_size
    epoch, i = divmod(start, per_epoch)
    while True:
        order = torch.randperm(n, generator=synthetic.generator(seed, epoch)).to(device)
        for first in range(i * batch_size + rank * share, per_epoch * batch_size, batch_size):
            yield order[first : first + share]
        epoch, i = epoch + 1, 0


def _ahead(batches, device):
    """uint8 batches on a GPU, each on its way from pinned memory while the one before is in use."""
    stream = torch.cuda.Stream(device)

    def send(batch):  # bytes travel, a quarter of the floats
        with torch.cuda.stream(stream):
            return batch.pin_memory().to(device, non_blocking=True), stream.record_event()

    sent = send(next(batches))
    while True:
        (batch, arrived), sent = sent, send(next(batches))
        here = torch.cuda.current_stream(device)
        here.wait_event(arrived)
        batch.record_stream(here)  # the memory came from the other stream
        yield batch


def cached(cache_dir, kind, key, make, version=1):
    """make(), a dict of tensors, strings and numbers, or what an earlier call with this key kept.

    key: a JSON value of all that determines the result; version: raised when make changes. What
    cannot be read is made again. Where cache_dir cannot be written, this goes on without.
    """
    text = json.dumps([version, key], sort_keys=True)
    path = Path(cache_dir) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept["key"] == text:
            return kept["value"]
    except Exception:  # absent, or damaged in one of the many ways that torch.load reports
        pass
    value = make()
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(mine, "xb") as f:
            torch.save({"key": text, "value": value}, f)
        os.replace(mine, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's own words for a full disk
        _warn(f"nothing is kept in {cache_dir}: {_first_line(e)}")
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
    return value


# ---- named sets: (data_dir, cache_dir) -> (images, labels) of train and of test ----


def _digits(data_dir, cache_dir):
    n = DIGITS_TRAIN + DIGITS_TEST
    key = {"n": n, "seed": 0, "pillow": importlib.metadata.version("pillow")}  # it has the font

    def make():
        images, labels = synthetic.digits(n, seed=0)
        return {"images": images, "labels": labels}

    kept = cached(cache_dir, "digits", key, make, synthetic.VERSION)
    parts = [DIGITS_TRAIN, DIGITS_TEST]
    return list(zip(_padded(kept["images"]).split(parts), kept["labels"].split(parts)))


def _mnist(data_dir, cache_dir):
    return _idx_set("mnist", data_dir, "MNIST", MNIST_MD5)


def _fashion(data_dir, cache_dir):
    return _idx_set("fashion", data_dir, "FashionMNIST", [None] * 4)


def _cifar10(data_dir, cache_dir):
    folder = data_dir / "cifar-10-batches-py"
    archive = data_dir / "cifar-10-python.tar.gz"
    if not all((folder / name).is_file() for name in CIFAR10_MD5) and not archive.is_file():
        _download("cifar10", "CIFAR10", data_dir, folder.name, list(CIFAR10_MD5))
    if all((folder / name).is_file() for name in CIFAR10_MD5):
        held = {name: (folder / name).read_bytes() for name in CIFAR10_MD5}
        where = folder
    else:
        where = archive
        try:
            with tarfile.open(archive) as tar:
                held = {n: tar.extractfile(f"{folder.name}/{n}").read() for n in CIFAR10_MD5}
        except (OSError, EOFError, KeyError, AttributeError, tarfile.TarError, zlib.error) as e:
            raise ValueError(f"{archive} is damaged: {_first_line(e)}") from e
    images, labels = [], []
    for name, md5 in CIFAR10_MD5.items():
        _check_md5(where / name, held[name], md5)
        batch = _Unpickler(io.BytesIO(held[name]), encoding="bytes").load()
        images.append(torch.from_numpy(np.array(batch[b"data"])).view(-1, 3, 32, 32))
        labels.append(torch.tensor(batch[b"labels"]))
    return [(torch.cat(images[:5]), torch.cat(labels[:5])), (images[5], labels[5])]


SETS = {"digits": _digits, "mnist": _mnist, "fashion": _fashion, "cifar10": _cifar10}


class _Unpickler(pickle.Unpickler):
    """Reads arrays and plain containers; a pickle that asks for anything else is refused."""

    def find_class(self, module, name):
        array = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if array and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if array and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def _idx_set(name, data_dir, folder, md5s):
    raw = data_dir / folder / "raw"
    files = [f"{stem}-ubyte" for stem in IDX]
    if not all((raw / f).is_file() or (raw / f"{f}.gz").is_file() for f in files):
        _download(name, folder, data_dir, f"{folder}/raw", files)
    x, y, test_x, test_y = (_idx(raw / f, md5) for f, md5 in zip(files, md5s))
    for images, labels, f in ((x, y, files[0]), (test_x, test_y, files[2])):
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            shapes = f"{list(images.shape)} with labels {list(labels.shape)}"
            raise ValueError(f"{raw / f} holds {shapes}; wanted [M, 28, 28] with labels [M]")
    return [(_padded(x[:, None]), y.long()), (_padded(test_x[:, None]), test_y.long())]


def _idx(path, md5=None):
    """The uint8 tensor in an idx file, unpacked or, with .gz after its name, packed."""
    if not path.is_file():
        path = path.with_name(f"{path.name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise ValueError(f"{path} is damaged: {_first_line(e)}") from e
    if md5:
        _check_md5(path, content, md5)
    dims = content[3] if len(content) > 3 else 0
    head = 4 + 4 * dims
    if content[:3] != b"\0\0\x08" or not dims or len(content) < head:  # 8: unsigned bytes
        raise ValueError(f"{path} is no idx file of bytes")
    shape = struct.unpack_from(f">{dims}I", content, 4)
    values = np.frombuffer(content, np.uint8, offset=head)
    if len(values) != np.prod(shape, dtype=object):
        raise ValueError(f"{path} is cut short: {len(values)} bytes where {list(shape)} are stated")
    return torch.from_numpy(values.reshape(shape).copy())


def _check_md5(path, content, md5):
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"{path} is not the published file: its MD5 is {found}, not {md5}")


def _download(name, dataset, data_dir, folder, files):
    """Have torchvision fetch and check a set, and move what is missing to data_dir/folder."""
    target = data_dir / folder
    missing = [file for file in files if not (target / file).exists()]
    # on the same disk, so that each file comes to its place whole or not at all
    near = next(d for d in [data_dir, *data_dir.parents, Path()] if d.is_dir())
    try:
        from torchvision import datasets

        with tempfile.TemporaryDirectory(prefix=".download-", dir=near) as part:
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(datasets, dataset)(part, download=True)
            target.mkdir(parents=True, exist_ok=True)
            for file in missing:
                os.replace(Path(part) / folder / file, target / file)
    except Exception as e:  # whatever urllib, ssl, gzip and tarfile raise comes through
        reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]
        raise ValueError(
            f"{name} is not in {target} (no {missing[0]} there) and cannot be downloaded "
            f"({reason}); --dataset digits needs no download"
        ) from e


# ---- folders ----


def _existing(name):
    """The folder at this path; ValueError with what was wanted where there is none."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ValueError(f"dataset {name!r} is a file; wanted a folder of images")
    near = difflib.get_close_matches(name.lower(), SETS, 1)
    raise ValueError(
        f"dataset {name!r} is no folder here and none of {', '.join(SETS)}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def _folder(root, image_size, cache_dir):
    """Splits of a folder: itself, or train and test (else val) inside. Class folders label them."""
    inside = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    held_out = next((d for d in ("test", "val") if d in inside), None)
    if "train" in inside and (held_out or inside == ["train"]):
        folders = [root / "train"] + ([root / held_out] if held_out else [])
    else:
        folders = [root]
    found = [(folder, _listing(folder)) for folder in folders]
    # classes of all splits together, so that a label means the same in each
    named = [{f.split("/")[0] for f, _, _ in files if "/" in f} for _, files in found]
    classes = {name: i for i, name in enumerate(sorted(set().union(*named)))}
    flat = any("/" not in f for _, files in found for f, _, _ in files)
    splits = []
    for folder, files in found:
        pixels, kept = _decoded(folder, files, image_size, cache_dir)
        labels = None
        if len(classes) > 1 and not flat:
            labels = torch.tensor([classes[files[i][0].split("/")[0]] for i in kept.tolist()])
        splits.append((pixels, labels))
    return splits


def _listing(folder):
    """[(path below folder with /, bytes, mtime_ns)] of the images in it and below, sorted."""

    def unreadable(e):
        raise e

    files, others, seen = [], collections.Counter(), set()
    for here, dirs, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # links that lead in a circle
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not d.startswith("."))
        for name in names:
            path = Path(here, name)
            if name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() in EXTENSIONS:
                stat = path.stat()
                files.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
            else:
                others[path.suffix.lower() or "no extension"] += 1
    if not files:
        found = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5)) or "no files"
        raise ValueError(f"no images in {folder}: looked for {' '.join(EXTENSIONS)}, found {found}")
    return sorted(files)


def _decoded(folder, files, image_size, cache_dir):
    """uint8 [M, C, S, S] of the files that can be read, C 1 if all are grey, and their indices."""
    listing = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    key = {"files": listing, "size": image_size, "pillow": importlib.metadata.version("pillow")}

    def make():
        pixels, failed = _decode_all(folder, [f for f, _, _ in files], image_size)
        for i in sorted(failed)[:MOST_NAMES]:
            _warn(f"skipped {folder / files[i][0]}: {failed[i]}")
        kept = torch.tensor([i for i in range(len(files)) if i not in failed], dtype=torch.int64)
        pixels = pixels[kept] if failed else pixels
        if all((p == p[..., :1]).all() for p in pixels.split(1000)):
            pixels = pixels[..., :1]
        return {"images": pixels.permute(0, 3, 1, 2).contiguous(), "kept": kept}

    value = cached(cache_dir, "folder", key, make)
    skipped = len(files) - len(value["kept"])
    if skipped == len(files):
        raise ValueError(f"none of the {len(files)} images in {folder} can be read")
    if skipped:
        _warn(f"skipped {skipped} of {len(files)} images in {folder} that cannot be read")
    return value["images"], value["kept"]


def _decode_all(folder, names, size):
    """uint8 [M, size, size, 3], and {index: reason} for those that are no images."""
    from PIL import Image, UnidentifiedImageError

    pixels = torch.empty(len(names), size, size, 3, dtype=torch.uint8)
    out = pixels.numpy()
    failed = {}

    def decode(some):
        for i in some:
            content = (folder / names[i]).read_bytes()  # a file that cannot be read at all raises
            try:
                out[i] = _decode(content, size)
            except UnidentifiedImageError:
                failed[i] = "no image of a known format"
            except Exception as e:  # Pillow's readers raise anything at a broken file
                failed[i] = _first_line(e)
        return len(some)

    # threads, since Pillow decodes and resizes without the interpreter's lock
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = MOST_PIXELS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pictures that are odd, yet fine
            every = range(len(names))
            jobs = [pool.submit(decode, every[i : i + 32]) for i in every[::32]]
            done = 0
            for job in as_completed(jobs):
                done += job.result()
                terminal.progress(f"decoding {folder} {done}/{len(names)}")
    finally:
        pool.shutdown(cancel_futures=True)
        Image.MAX_IMAGE_PIXELS = limit
    return pixels, failed


def _decode(content, size):
    """A file's bytes -> uint8 [size, size, 3]: its first frame, upright, on white where clear."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}")
        image.draft(None, (3 * size, 3 * size))  # a JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _eight_bit(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image = _square(image, size)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _eight_bit(image):
    """Mode L from whole numbers of 16 bits, or from floats that reach to 1 or to 255."""
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, np.float32))
    if image.mode[0] == "I":
        values = values / 257
    elif values.max() <= 1:
        values = values * 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


# ---- pixels ----


def _square(image, size):
    """The central square of a Pillow image, resized to size x size."""
    from PIL import Image

    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def _padded(pixels):
    return F.pad(pixels, (2, 2, 2, 2))


def _resized(pixels, size):
    from PIL import Image

    if tuple(pixels.shape[2:]) == (size, size):
        return pixels
    out = torch.empty(len(pixels), pixels.shape[1], size, size, dtype=torch.uint8)
    for i, image in enumerate(terminal.track(pixels, "resizing images")):
        planes = [np.asarray(_square(Image.fromarray(plane), size)) for plane in image.numpy()]
        out[i] = torch.from_numpy(np.stack(planes))
    return out


def _converted(pixels, channels):
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


def _first_line(e):
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _warn(text):
    terminal.close()
    print(text, file=sys.stderr, flush=True)
