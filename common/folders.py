"""Pictures on disk -> uint8 tensors: sets with splits and classes, pairs, two domains.

A split is what people call train or training, and test or testing (else val, valid, validation),
in any case. Hidden and system folders and run folders are no data. Decoded pictures are kept in the
cache, under all that says which files they came from.
"""
import collections
import hashlib
import importlib.metadata
import io
import json
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

from common import files, terminal

# where test and val are both there, test is the held-out split
SPLITS = {"train": 0, "training": 0, "test": 1, "testing": 1, "val": 2, "valid": 2, "validation": 2}
SIDE = re.compile("(?:({0})[-_ /]?)?([ab])|([ab])/({0})".format("|".join(SPLITS)))  # trainA, A/test
SYSTEM = "__MACOSX/@eaDir/#recycle/$RECYCLE.BIN/System Volume Information/lost+found".split("/")
# what Pillow knows by the first bytes and decodes by itself (EPS would start another program)
FORMATS = "PNG JPEG JPEG2000 GIF WEBP AVIF BMP DIB TIFF PPM QOI".split()
MOST_PIXELS = 2**28  # of one file, 1 GB once decoded; the largest cameras have 2e8
MOST_NAMES = 10  # broken files named before only their number is given
VERSION = 1  # of the decoding; raise it with every change that alters a pixel


def sets(root, size, cache_dir):
    """[(pixels uint8 [M, C, size, size], labels int64 [M] or None)] of training and held-out split.

    Folders inside a split are its classes, unless there is one alone or pictures beside them.
    """
    root = _unpacked(root)
    found = [(folder, *_listing(folder)) for folder in _splits(root) or [root]]
    below = [[path.relative_to(folder).parts for path in paths] for folder, paths, _ in found]
    # classes of all splits together, so that a label means the same in each
    names = sorted({parts[0] for split in below for parts in split})
    classed = len(names) > 1 and all(len(parts) > 1 for split in below for parts in split)
    splits = []
    for (folder, paths, others), parts in zip(found, below):
        (pixels,), kept = _decoded(folder, [[p] for p in paths], others, size, cache_dir, "square")
        labels = [names.index(parts[i][0]) for i in kept] if classed else None
        splits.append((pixels, labels and torch.tensor(labels)))
    return splits


def pairs(root, size, cache_dir):
    """[(A, B)] of training and held-out split, uint8 [M, C, size, size] each.

    Either A is the left and B the right half of each picture, or folders A and B hold pictures of
    equal names, endings aside (A and B, with or in the splits, or trainA and trainB). Both are
    resized to size x size whatever their shape.
    """
    root = _unpacked(root)
    splits = []
    for folders in _sides(root):
        stems, others = [], collections.Counter()
        for folder in folders:
            paths, more = _listing(folder)
            stems.append({str(p.relative_to(folder).with_suffix("")): p for p in paths})
            if len(stems[-1]) < len(paths):
                raise ValueError(f"{folder} has pictures whose names differ in the ending alone")
            others += more
        both = sorted(stems[0].keys() & stems[1].keys())
        if not both:
            raise ValueError(
                f"no picture in {folders[0]} has the name of one in {folders[1]}, so there are no "
                "pairs; two domains of unpaired pictures are another kind of set"
            )
        others["without a partner"] += sum(map(len, stems)) - 2 * len(both)
        items = [[named[stem] for named in stems] for stem in both]
        where = os.path.commonpath(folders)
        splits.append(_decoded(where, items, others, size, cache_dir, "whole")[0])
    for folder in [] if splits else _splits(root) or [root]:
        paths, others = _listing(folder)
        items = [[p] for p in paths]
        splits.append(_decoded(folder, items, others, size, cache_dir, "halves")[0])
    return splits


def domains(root, size, cache_dir):
    """[(A, B)] of training and held-out split, uint8 [M, C, size, size]; [] where none are."""

    def pixels(folder):
        paths, others = _listing(folder)
        return _decoded(folder, [[p] for p in paths], others, size, cache_dir, "square")[0][0]

    return [(pixels(a), pixels(b)) for a, b in _sides(_unpacked(root))]


# ---- which folders and files -----------------------------------------------------------------


def _folders(folder):
    return sorted(d for d in folder.iterdir() if d.is_dir() and not _no_data(d.name))


def _no_data(name):
    return name.startswith(".") or name in SYSTEM


def _unpacked(root):
    """root, or the only thing in it where that is a folder, as archives often hold one."""
    root = Path(os.path.abspath(root))
    while True:
        inside = [p for p in root.iterdir() if not _no_data(p.name)]
        if len(inside) != 1 or not inside[0].is_dir():
            return root
        if (name := inside[0].name.lower()) in SPLITS or SIDE.fullmatch(name):
            return root
        root = inside[0]


def _splits(root):
    """Folders of the training and the held-out split; [] where root is a single set."""
    inside = _folders(root)
    known = {SPLITS[d.name.lower()]: d for d in inside if d.name.lower() in SPLITS}
    if known and 0 not in known:
        held_out = known[min(known)]
        raise ValueError(f"{root} holds {held_out.name} and no train; to use it, pass {held_out}")
    if not known or len(known) == 1 < len(inside):  # a class may be called train
        return []
    if unused := [d.name for d in inside if d not in known.values()]:
        terminal.warn(f"{root}: not used beside its splits: {', '.join(unused)}")
    return [known[i] for i in sorted(known)[:2]]


def _sides(root):
    """[(A, B)] of training and held-out split, folders; [] where there are no two sides."""
    found = collections.defaultdict(dict)
    inside = _folders(root)
    for path in inside + [below for d in inside for below in _folders(d)]:
        if m := SIDE.fullmatch(path.relative_to(root).as_posix().lower()):
            found[SPLITS[m[1] or m[4] or "train"]][m[2] or m[3]] = path
    if found and (0 not in found or any(len(sides) < 2 for sides in found.values())):
        names = sorted(str(p.relative_to(root)) for sides in found.values() for p in sides.values())
        raise ValueError(f"{root} holds {', '.join(names)}; wanted A and B, and both of each split")
    return [(found[i]["a"], found[i]["b"]) for i in sorted(found)[:2]]


def _check_classes(folder, names):
    """ValueError where folders look like splits, so that no test picture passes for a class's."""
    like, sided = {}, False  # name: whether it looks like a held-out split
    for name in names:
        words = {w.lower() for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}  # val2017, TestImages
        if (m := SIDE.fullmatch(name.lower())) and m[1]:
            words, sided = {m[1]}, True
        like |= {name: SPLITS[word] > 0 for word in words & SPLITS.keys()}
    if sided or len(set(like.values())) == 2:
        found = sorted(like, key=like.get)  # training first, for the advice
        raise ValueError(
            f"{folder} holds {', '.join(found[:4])}, which are no classes; pass one of them, such "
            f"as {folder / found[0]}, or a folder with train and test (or val) inside"
        )


def _listing(folder):
    """(paths of the pictures in folder and below, Counter of the other files by ending)."""
    from PIL import Image

    def unreadable(e):
        raise e

    endings = {ending for ending, f in Image.registered_extensions().items() if f in _formats()}
    paths, others, seen = [], collections.Counter(), set()
    for here, dirs, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here, real = Path(here), os.path.realpath(here)
        if real in seen or _is_run(names):  # a link that leads in a circle; grids of samples
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not _no_data(d))
        _check_classes(here, dirs)
        for path in (here / name for name in names if not name.startswith(".")):
            if path.is_file():
                ending = path.suffix.lower()
                if ending in endings or not ending:  # what that is shows when it is decoded
                    paths.append(path)
                else:
                    others[ending] += 1
    if not paths:
        looked, found = " ".join(sorted(endings)), _counts(others) or "no files"
        raise ValueError(f"no images in {folder}: looked for {looked}, found {found}")
    return sorted(paths, key=str), others


def _is_run(names):
    """Whether a folder with these files is a run's, or holds the pictures of a report."""
    run = "args.json" in names and ("checkpoint.pt" in names or "log.csv" in names)
    return run or "table.md" in names


def _counts(numbers):
    return ", ".join(f"{n} {what}" for what, n in numbers.most_common(5))


# ---- decoding --------------------------------------------------------------------------------


def _decoded(where, items, others, size, cache_dir, fit):
    """[uint8 [M, C, size, size]] of the items whose files can be read, and which these are.

    items: lists of paths, one for each tensor; or of one path where fit is "halves", which gives
    left and right. Fit "square" takes the central square, "whole" everything. C is 1 where all are
    grey. One line tells what was passed over.
    """
    stats = [[str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
             for item in items for p in item for s in [p.stat()]]  # fmt: skip
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    key = [digest, size, fit, importlib.metadata.version("pillow")]

    def make():
        pixels, failed = _decode(where, items, size, fit)
        kept = torch.tensor([i for i in range(len(items)) if i not in failed], dtype=torch.int64)
        images = []
        for part in pixels:
            part = part[kept] if failed else part
            if all((p == p[..., :1]).all() for p in part.split(1000)):
                part = part[..., :1]
            images.append(part.permute(0, 3, 1, 2).contiguous())
        return {"images": images, "kept": kept, "failed": [failed[i] for i in sorted(failed)]}

    value = files.cached(cache_dir, "folder", key, make, VERSION)
    failed = [(Path(path), reason) for path, reason in value["failed"]]
    for path, reason in [f for f in failed if f[0].suffix][:MOST_NAMES]:
        terminal.warn(f"passed over {path}: {reason}")
    if len(failed) == len(items):
        raise ValueError(f"none of the {len(items)} images in {where} can be read")
    others = others + collections.Counter(
        f"broken {path.suffix.lower()}" if path.suffix else "without ending" for path, _ in failed
    )
    if others:
        used = len(items) - len(failed)
        terminal.warn(f"{where}: {used} used, {others.total()} passed over: {_counts(others)}")
    return value["images"], value["kept"].tolist()


def _decode(where, items, size, fit):
    """[uint8 [len(items), size, size, 3]], and {index: (path, reason)} of the broken ones."""
    from PIL import Image, UnidentifiedImageError

    parts = 2 if fit == "halves" else len(items[0])
    pixels = [torch.empty(len(items), size, size, 3, dtype=torch.uint8) for _ in range(parts)]
    filled, failed = [0] * len(items), {}

    def decode(some):
        for i, path in [(i, path) for i in some for path in items[i]]:
            content = path.read_bytes()  # one that cannot be read at all raises
            try:
                for picture in _fitted(opened(content, 6 * size), size, fit):
                    pixels[filled[i]].numpy()[i] = np.asarray(picture)
                    filled[i] += 1
            except UnidentifiedImageError:
                failed[i] = str(path), "no image of a known format"
            except Exception as e:  # Pillow's readers raise anything at a broken file
                if isinstance(e, MemoryError) or "out of memory" in str(e):
                    raise  # says nothing about the file
                failed[i] = str(path), files.first_line(e)
        return len(some)

    # threads, since Pillow decodes and resizes without the interpreter's lock
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = MOST_PIXELS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pictures that are odd, yet fine
            every = range(len(items))
            jobs = [pool.submit(decode, every[i : i + 32]) for i in every[::32]]
            done = 0
            for job in as_completed(jobs):
                done += job.result()
                terminal.progress(f"decoding {where} {done}/{len(items)}")
    finally:
        pool.shutdown(cancel_futures=True)
        Image.MAX_IMAGE_PIXELS = limit
    return pixels, failed


def _formats():
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every Pillow


def opened(content, enough=0):
    """A file's bytes -> Pillow image, RGB: its first frame, upright, on white where it is clear.

    enough: pixels of either side that will do, for a JPEG to be decoded at a fraction of its size.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}")
        if enough:
            image.draft(None, (enough, enough))
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats")
    if image.mode[0] == "I":  # whole numbers of 16 bits
        values = np.asarray(image, np.float32) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _fitted(image, size, fit):
    if fit == "square":
        return [square(image, size)]
    width, height = image.size
    if fit == "whole":
        return [_resized(image, size)]
    if width % 2:
        raise ValueError(f"{width} x {height} pixels cannot be halved")
    halves = [(x, 0, x + width // 2, height) for x in (0, width // 2)]
    return [_resized(image.crop(half), size) for half in halves]


def square(image, size):
    """The central square of a Pillow image, size x size; 28 x 28 is padded to 32 before.

    The padding has the commonest colour of the rim, so MNIST in a folder equals the named set.
    """
    from PIL import ImageOps

    if image.size == (28, 28):
        pixels = np.asarray(image)
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colour = collections.Counter(map(tuple, rim.tolist())).most_common(1)[0][0]
        image = ImageOps.expand(image, 2, colour)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return _resized(image.crop((left, top, left + side, top + side)), size)


def _resized(image, size):  # Pillow's own box would let what lies beyond it bleed in
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BICUBIC)
