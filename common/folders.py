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
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# that Pillow knows by their first bytes and decodes by itself; EPS would start another program
FORMATS = "PNG JPEG JPEG2000 MPO GIF WEBP AVIF BMP DIB TIFF PPM QOI".split()
MOST_PIXELS = 2**28  # of one file, 1 GB once decoded; the largest cameras have 2e8
MOST_NAMES = 10  # broken files named before only their number is given
VERSION = 1  # of the decoding; raise it with every change that alters a pixel


def sets(root, size, cache_dir):
    """[(pixels uint8 [M, C, size, size], labels int64 [M] or None)] of training and held-out split.

    Folders inside a split are its classes, unless there is one alone or pictures beside them.
    """
    root = _unpacked(root)
    found = [(folder, *_listing(folder)) for folder in _splits(root) or [root]]
    # classes of all splits together, so that a label means the same in each
    first = [[name.split("/")[0] for name in stats] for _, stats, _ in found]
    flat = any("/" not in name for _, stats, _ in found for name in stats)
    classes = {name: i for i, name in enumerate(sorted(set().union(*first)))}
    splits = []
    for (folder, stats, others), names in zip(found, first):
        (pixels,), kept = _decoded(folder, stats, others, size, cache_dir)
        labels = None if flat or len(classes) == 1 else [classes[names[i]] for i in kept.tolist()]
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
        found = [(folder, *_listing(folder)) for folder in folders]
        named = [_by_stem(folder, stats) for folder, stats, _ in found]
        both = sorted(named[0].keys() & named[1].keys())
        if not both:
            raise ValueError(
                f"no picture in {folders[0]} has the name of one in {folders[1]}, so there are no "
                "pairs; two domains of unpaired pictures are another kind of set"
            )
        for (_, stats, others), names in zip(found, named):
            others["without a partner"] += len(stats) - len(both)
        decoded = [
            _decoded(folder, {names[s]: stats[names[s]] for s in both}, others, size, cache_dir, "all")
            for (folder, stats, others), names in zip(found, named)
        ]
        whole = set.intersection(*(set(kept.tolist()) for _, kept in decoded))  # broken on neither side
        splits.append([
            pixels[torch.tensor([i in whole for i in kept.tolist()])] for (pixels,), kept in decoded
        ])
    for folder in [] if splits else _splits(root) or [root]:
        splits.append(_decoded(folder, *_listing(folder), size, cache_dir, "halves")[0])
    return splits


def domains(root, size, cache_dir):
    """[(A, B)] of training and held-out split, uint8 [M, C, size, size], of unpaired pictures."""
    root = _unpacked(root)
    return [
        [_decoded(folder, *_listing(folder), size, cache_dir)[0][0] for folder in folders]
        for folders in _sides(root)
    ]


# ---- which folders ---------------------------------------------------------------------------


def _folders(folder):
    return sorted(d for d in folder.iterdir() if d.is_dir() and not _no_data(d.name))


def _no_data(name):
    return name.startswith(".") or name in SYSTEM


def _unpacked(root):
    """root, or the only thing in it where that is a folder, as archives often hold one."""
    while True:
        inside = [p for p in root.iterdir() if not _no_data(p.name)]
        name = inside[0].name.lower() if len(inside) == 1 and inside[0].is_dir() else "train"
        if name in SPLITS or SIDE.fullmatch(name):
            return root
        root = inside[0]


def _splits(root):
    """Folders of the training and the held-out split; [] where root is a single set."""
    inside = _folders(root)
    known = {SPLITS[d.name.lower()]: d for d in inside if d.name.lower() in SPLITS}
    if known and 0 not in known:
        held_out = known[min(known)]
        raise ValueError(f"{root} holds {held_out.name} and no train; to use it, pass {held_out}")
    if len(known) < 2 and len(inside) > 1:  # a class may be called train
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
    for sides in found.values():
        if len(sides) == 1:
            ((side, folder),) = sides.items()
            raise ValueError(f"{folder} is there without its counterpart {'B' if side == 'a' else 'A'}")
    if found and 0 not in found:
        raise ValueError(f"{root} has {min(found[min(found)].values())} and no trainA and trainB")
    return [(found[i]["a"], found[i]["b"]) for i in sorted(found)[:2]]


def _check_classes(folder, names):
    """ValueError where folders look like splits, so that no test picture passes for a class's."""
    sided = [name for name in names if (m := SIDE.fullmatch(name.lower())) and m[1]]
    kinds = {}
    for name in names:
        for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name):  # seg_train, val2017, TestImages
            if word.lower() in SPLITS:
                kinds[name] = SPLITS[word.lower()] > 0
    if sided or len(set(kinds.values())) == 2:
        found = sided or list(kinds)
        raise ValueError(
            f"{folder} holds {', '.join(found[:4])}, which are no classes; pass one of them, such as "
            f"{folder / found[0]}, or a folder with train and test (or val) inside"
        )


# ---- which files -----------------------------------------------------------------------------


def _listing(folder):
    """({path below folder with /: what identifies its content}, Counter of other files' endings)."""
    from PIL import Image

    def unreadable(e):
        raise e

    Image.init()
    endings = {ending for ending, f in Image.registered_extensions().items() if f in FORMATS}
    stats, others, seen = {}, collections.Counter(), set()
    for here, dirs, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here, real = Path(here), os.path.realpath(here)
        if real in seen or _is_run(names):  # a link that leads in a circle; grids of samples
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not _no_data(d))
        _check_classes(here, dirs)
        for path in (here / name for name in names if not name.startswith(".")):
            if not path.is_file():
                continue
            ending = path.suffix.lower()
            if ending in endings or not ending:  # whether a file without is one shows when decoding
                s = path.stat()
                identity = s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino
                stats[path.relative_to(folder).as_posix()] = identity
            else:
                others[ending] += 1
    if not stats:
        looked = " ".join(sorted(endings))
        raise ValueError(f"no images in {folder}: looked for {looked}, found {_counts(others)}")
    return dict(sorted(stats.items())), others


def _is_run(names):
    """Whether a folder with these files is a run's, or holds the pictures of a report."""
    return "table.md" in names or (
        "args.json" in names and not {"checkpoint.pt", "log.csv"}.isdisjoint(names)
    )


def _by_stem(folder, names):
    found = {}
    for name in names:
        stem = name.removesuffix(Path(name).suffix)
        if stem in found:
            raise ValueError(f"{folder} has two pictures of one name: {found[stem]} and {name}")
        found[stem] = name
    return found


def _counts(numbers):
    return ", ".join(f"{n} {what}" for what, n in numbers.most_common(5) if n) or "no files"


# ---- decoding --------------------------------------------------------------------------------


def _decoded(folder, stats, others, size, cache_dir, fit="square"):
    """[uint8 [M, C, size, size]] of the files that can be read, and which they are, int64 [M].

    fit: "square" takes the central square, "all" the whole picture, "halves" left and right, which
    are two tensors. C is 1 where all are grey. One line tells what was passed over.
    """
    names = list(stats)
    key = {
        "where": os.path.realpath(folder),
        "files": hashlib.sha256(json.dumps(list(stats.items())).encode()).hexdigest(),
        "size": size,
        "fit": fit,
        "pillow": importlib.metadata.version("pillow"),
    }

    def make():
        pixels, failed = _decode_all(folder, names, size, fit)
        kept = torch.tensor([i for i in range(len(names)) if i not in failed], dtype=torch.int64)
        images = []
        for part in pixels:
            part = part[kept] if failed else part
            if all((p == p[..., :1]).all() for p in part.split(1000)):
                part = part[..., :1]
            images.append(part.permute(0, 3, 1, 2).contiguous())
        return {"images": images, "kept": kept, "failed": failed}

    value = files.cached(cache_dir, "folder", key, make, VERSION)
    failed = {names[i]: reason for i, reason in sorted(value["failed"].items())}
    endings = {name: Path(name).suffix.lower() for name in failed}
    for name in [name for name in failed if endings[name]][:MOST_NAMES]:
        terminal.warn(f"passed over {folder / name}: {failed[name]}")
    if len(failed) == len(names):
        raise ValueError(f"none of the {len(names)} images in {folder} can be read")
    others = others + collections.Counter(
        f"broken {ending}" if ending else "without ending" for ending in endings.values()
    )
    if others:
        terminal.warn(
            f"{folder}: {len(names) - len(failed)} images used, {others.total()} files passed over "
            f"({_counts(others)})"
        )
    return value["images"], value["kept"]


def _decode_all(folder, names, size, fit):
    """([uint8 [M, size, size, 3]], one or two, and {index: reason} of those that are no images."""
    from PIL import Image, UnidentifiedImageError

    parts = 2 if fit == "halves" else 1
    pixels = [torch.empty(len(names), size, size, 3, dtype=torch.uint8) for _ in range(parts)]
    failed = {}

    def decode(some):
        for i in some:
            content = (folder / names[i]).read_bytes()  # a file that cannot be read at all raises
            try:
                image = opened(content, 3 * size)
                for part, fitted in zip(pixels, _fitted(image, size, fit), strict=True):
                    part.numpy()[i] = np.asarray(fitted)
            except UnidentifiedImageError:
                failed[i] = "no image of a known format"
            except Exception as e:  # Pillow's readers raise anything at a broken file
                if isinstance(e, MemoryError) or "out of memory" in str(e):
                    raise  # says nothing about the file
                failed[i] = files.first_line(e)
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


def opened(content, enough=None):
    """A file's bytes -> Pillow image, RGB: its first frame, upright, on white where it is clear.

    enough: pixels of the shorter side that will do, for a JPEG to be decoded at a fraction.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
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
        boxes = [(0, 0, width, height)]
    elif width % 2:
        raise ValueError(f"{width} x {height} pixels cannot be halved")
    else:
        boxes = [(0, 0, width // 2, height), (width // 2, 0, width, height)]
    return [_resize(image, size, box) for box in boxes]


def square(image, size):
    """The central square of a Pillow image, size x size; 28 x 28 is padded to 32 before.

    Padding has the commonest colour of the rim: MNIST from a folder is MNIST from its own files.
    """
    from PIL import Image

    if image.size == (28, 28):
        pixels = np.asarray(image)
        rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colour = collections.Counter(map(tuple, rim.reshape(112, -1).tolist())).most_common(1)[0][0]
        padded = Image.new(image.mode, (32, 32), colour)
        padded.paste(image, (2, 2))
        image = padded
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return _resize(image, size, (left, top, left + side, top + side))


def _resize(image, size, box):
    from PIL import Image

    return image.resize((size, size), Image.Resampling.BICUBIC, box)
