"""Pictures of a run from its files: grids, strips over training, animations, charts.

Every sub-folder of grids NAME/STEP.png is a set of pictures, every column of numbers in log.csv and
metrics.csv a line in a chart.
"""
import io
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
from torch.nn.functional import pad

from common import data, files

COLUMNS = 8  # of a grid
GAP = 2  # pixels between the images of a grid
FRAME = 40  # their grey, which no image has along a whole row
SHORT = 64  # smaller images are enlarged to about this height, for eyes
STEPS = 10  # rows of a strip over training, at most
FRAMES = 60  # of an animation, at most
ANIMATED = 600  # pixels of its longer side, at most
COLORS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2".split()
SHARES = ("precision", "recall", "density", "coverage")
COUNTS = ("step", "seconds", "images", "n", "features")  # columns that are no result
SCALE = 2  # charts are drawn larger and reduced, which smooths their lines


def save(image, path, **how):
    """A PIL image to path, whole or not at all; how: what Image.save takes."""
    buffer = io.BytesIO()
    image.save(buffer, Path(path).suffix[1:], **how)
    with files.writing(path):
        files.write_atomic(path, buffer.getvalue())


def font(size):
    from PIL import ImageFont

    return ImageFont.load_default(size)


# ---- grids -----------------------------------------------------------------------------------


def to_picture(image):
    """PIL image of one uint8 [C, H, W]: grey for one channel, RGB for three."""
    from PIL import Image

    array = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return Image.fromarray(array.contiguous().cpu().numpy())


def grid(images, columns=COLUMNS):
    """PIL image of uint8 images [N, C, H, W] in rows of that many columns, small ones enlarged."""
    n, channels, height, _ = images.shape
    columns = min(columns, n)
    zoom = max(1, SHORT // height)
    images = images.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    cells = pad(images, (0, GAP, 0, GAP), value=FRAME)
    cells = pad(cells, (0, 0, 0, 0, 0, 0, 0, -n % columns), value=FRAME)  # fills up the last row
    cells = cells.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # channel, row, y, column, x
    sheet = cells.reshape(channels, cells.shape[1] * cells.shape[2], -1)
    return to_picture(pad(sheet, (GAP, 0, GAP, 0), value=FRAME))


def to_sheet(images):
    """PIL image of images in [-1, 1]: [N, C, H, W] in rows of 8, [R, K, C, H, W] in R rows of K."""
    if images.dim() == 5:
        return grid(data.to_uint8(images.flatten(0, 1)), images.shape[1])
    return grid(data.to_uint8(images))


def first_row(sheet):
    """The first row of images of a grid."""
    lines = (np.asarray(sheet) == FRAME).reshape(sheet.height, -1).all(1)
    end = next((y for y in range(GAP + 1, sheet.height) if lines[y : y + GAP].all()), sheet.height)
    return sheet.crop((0, 0, sheet.width, end + GAP))


def grids(folder):
    """{name: [(step, path), ...]} of the sets of grids in a run folder, samples first."""
    found = {}
    for path in sorted(Path(folder).glob("*/*.png"), key=lambda p: (p.parent.name != "samples", p)):
        if path.stem.isdecimal():
            found.setdefault(path.parent.name, []).append((int(path.stem), path))
    return {name: sorted(steps) for name, steps in found.items()}


def spread(items, most):
    """At most that many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


# ---- sheets ----------------------------------------------------------------------------------


def sheet(pictures, columns, gap=8):
    """PIL image of PIL images side by side in rows of that many columns, on white."""
    from PIL import Image

    at, x, y, below = [], 0, 0, 0
    for i, p in enumerate(pictures):
        if i and i % columns == 0:
            x, y, below = 0, y + below + gap, 0
        at.append((x, y))
        x, below = x + p.width + gap, max(below, p.height)
    width = max(x + p.width for (x, _), p in zip(at, pictures))
    whole = Image.new("RGB", (width, y + below), "white")
    for p, corner in zip(pictures, at):
        whole.paste(p, corner)
    return whole


def captioned(picture, text):
    """The picture under a text, in as many lines as its width asks for."""
    from PIL import Image, ImageDraw

    letters = max(4, (picture.width - 8) // 8)
    lines = textwrap.wrap(text, letters, break_on_hyphens=False)
    top = 8 + 16 * len(lines)
    image = Image.new("RGB", (max(picture.width, 40), picture.height + top), "white")
    image.paste(picture, (0, top))
    ImageDraw.Draw(image).text((4, 4), "\n".join(lines), "black", font(14), spacing=2)
    return image


def beside(text, picture):
    """The picture with a short text at its left."""
    from PIL import Image, ImageDraw

    label = Image.new("RGB", (64, picture.height), "white")
    ImageDraw.Draw(label).text((56, picture.height // 2), text, "black", font(14), anchor="rm")
    return sheet([label, picture], 2, gap=0)


# ---- charts ----------------------------------------------------------------------------------


def ticks(low, high, log):
    """Round values from low to high: even steps, or powers of ten with their 2 and 5."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [m * 10.0**e for e in powers for m in ((1,) if high / low > 1e3 else (1, 2, 5))]
        return [t for t in found if low <= t <= high]
    size = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= (high - low) / 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def thinned(xs, ys, most=400):
    """Means over equal stretches, where a line has more points than a chart has pixels."""
    size = -(-len(xs) // most)
    cuts = [slice(i, i + size) for i in range(0, len(xs), size)]
    return [xs[c][-1] for c in cuts], [math.fsum(ys[c]) / len(ys[c]) for c in cuts]


def chart(title, series, share=False, width=480, height=300):
    """PIL image of lines over steps; logarithmic where values > 0 span 50-fold.

    series: (label, xs, ys) each, at least one of them with points; the i-th has the i-th colour.
    share: values are shares, so the axis goes from 0 to 1, or higher where they do.
    """
    from PIL import Image, ImageDraw

    s, small, grey = SCALE, font(12 * SCALE), "#444444"
    inked = zip(series, itertools.cycle(COLORS))
    series = [(label, ink, *thinned(xs, ys)) for (label, xs, ys), ink in inked if xs]
    height += 16 * (len(series) - 1)  # a line each for the labels
    left, right, top, bottom = 60 * s, (width - 16) * s, (height - 244) * s, (height - 32) * s

    every = [y for *_, ys in series for y in ys]
    low, high, last = min(every), max(every), max(1, *(xs[-1] for _, _, xs, _ in series))
    log = not share and low > 0 and high / low > 50
    pad = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    if share:
        low, high = 0.0, max(1.0, high) * 1.02
    elif log:
        low, high = low / 1.2, high * 1.2
    else:
        low, high = (low if 0 <= low < pad else low - pad), high + pad

    def at_x(x):
        return left + x / last * (right - left)

    def at_y(y):
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return bottom - part * (bottom - top)

    image = Image.new("RGB", (width * s, height * s), "white")
    pen = ImageDraw.Draw(image)
    pen.text((left, 8 * s), title, "black", font(15 * s))
    for y in ticks(low, high, log):
        pen.line([(left, at_y(y)), (right, at_y(y))], "#dddddd", s)
        pen.text((left - 6 * s, at_y(y)), f"{y:.4g}", grey, small, anchor="rm")
    for x in ticks(0, last, False):
        pen.line([(at_x(x), bottom), (at_x(x), bottom + 4 * s)], grey, s)
        text = f"{x:g}" if x < 1e4 else f"{x / 1000:g}k"
        pen.text((at_x(x), bottom + 6 * s), text, grey, small, anchor="mt")
    pen.line([(left, bottom), (right, bottom)], grey, s)
    for i, (label, ink, xs, ys) in enumerate(series):
        points = [(at_x(a), at_y(b)) for a, b in zip(xs, ys)]
        pen.line(points, ink, 2 * s, joint="curve")
        for x, y in points if len(points) <= 30 else ():
            pen.ellipse([x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s], ink)
        if label:
            y = (32 + 16 * i) * s
            pen.line([(left, y + 8 * s), (left + 16 * s, y + 8 * s)], ink, 3 * s)
            pen.text((left + 20 * s, y), label, "black", small)
    return image.resize((width, height), Image.Resampling.LANCZOS)


# ---- tables ----------------------------------------------------------------------------------


def fid_label(features, name="fid"):
    """What a column is called: FID is that of Inception alone, other networks stand beside it."""
    head, _, tail = name.partition("_")
    if head not in ("fid", "kid"):
        return name
    of = "" if features == "inception" else f" ({features})"
    return f"{head.upper()}{of} {tail}".strip()


def numbers(rows, name):
    """(steps, values) of a column, without what is no finite number."""
    pairs = []
    for row in rows:
        try:
            pairs.append((int(row["step"]), float(row[name])))
        except (KeyError, TypeError, ValueError):
            continue
    pairs = [p for p in pairs if math.isfinite(p[1])]
    return [p[0] for p in pairs], [p[1] for p in pairs]


def columns(tables):
    """Names of the columns of results with a number in some row of the tables, in order."""
    names = dict.fromkeys(name for rows in tables for name in (rows[0] if rows else ()))
    return [n for n in names if n not in COUNTS and any(numbers(rows, n)[0] for rows in tables)]


def by_features(scores):
    """{features: {label: rows}}: scores of different features are never set beside each other."""
    found = {}
    for label, rows in scores.items():
        if rows:
            found.setdefault(rows[-1].get("features", ""), {})[label] = rows
    return found


def charts(logs, scores):
    """Charts of log.csv and metrics.csv tables {label: rows} of runs.

    Of one run the losses stand together, columns named alike up to their first _, and the shares;
    of several every column has a chart with a line for each run, runs by features.
    """
    one, found = len(logs) == 1, []

    def add(title, tables, names, share=False):
        each = [(label, name) for label in logs for name in names]
        told = [label or (name if len(names) > 1 else "") for label, name in each]
        points = [numbers(tables.get(label, []), name) for label, name in each]
        found.append(chart(title, [(t, *p) for t, p in zip(told, points)], share))

    groups = {}
    for name in columns(logs.values()):
        alike = "losses" if name.startswith("loss_") else name.split("_")[0]
        groups.setdefault(alike if one else name, []).append(name)
    for alike, names in groups.items():
        add(alike if alike == "losses" else ", ".join(names), logs, names)
    parts = by_features(scores)
    for features, some in parts.items():
        names = columns(some.values())
        shares = [name for name in names if name in SHARES]
        if one and shares:
            add(", ".join(shares), some, shares, True)
        for name in names:
            if not (one and name in shares):
                title = fid_label(features, name)
                title += f" ({features})" if len(parts) > 1 and title == name else ""
                add(title, some, [name], name in SHARES)
    return found


# ---- one run ---------------------------------------------------------------------------------


def strip_name(name):
    return "progress.png" if name == "samples" else f"{name}-progress.png"


def of_run(folder):
    """Renew the pictures of a run folder from what it has so far.

    Of every set: NAME.png, the last grid; NAME-progress.png (of samples: progress.png), its first
    row over training; NAME.gif. And curves.png.
    """
    from PIL import Image

    folder = Path(folder)
    for name, steps in grids(folder).items():
        last = Image.open(steps[-1][1])
        save(last, folder / f"{name}.png")
        rows = [beside(f"{t}", first_row(Image.open(p))) for t, p in spread(steps, STEPS)]
        save(sheet(rows, 1, gap=0), folder / strip_name(name))
        frames = [Image.open(path) for _, path in spread(steps, FRAMES)]
        for frame in frames:
            frame.thumbnail((ANIMATED, ANIMATED))
        times = [250] * (len(frames) - 1) + [2000]
        animated = dict(save_all=True, append_images=frames[1:], duration=times, loop=0)
        save(frames[0], folder / f"{name}.gif", **animated)
    logs, scores = (files.read_csv(folder / name) for name in ("log.csv", "metrics.csv"))
    found = charts({"": logs}, {"": scores})
    if found:
        save(sheet(found, 2 if len(found) < 5 else 3), folder / "curves.png")


def score_line(row):
    """One line of text for a row of metrics, values as numbers or strings."""
    features, parts = row.get("features", ""), []
    for name in columns([[{"step": 0} | row]]):
        parts.append(f"{fid_label(features, name)} {float(row[name]):.4g}")
    on = [f"{k} {row[k]}" for k in ("n", "features") if k in row]
    return f"{', '.join(parts)}  ({', '.join(on)})"


def summary(folder):
    """The final metrics and the paths of a run, as text for the terminal."""
    folder = Path(folder)
    rows = files.read_csv(folder / "metrics.csv")
    names = [n for s in grids(folder) for n in (f"{s}.png", strip_name(s), f"{s}.gif")]
    names += ["curves.png", "metrics.json", "generator.pt"]
    there = "  ".join(n for n in names if (folder / n).exists())
    return "\n".join([*map(score_line, rows[-1:]), f"{folder}/  {there}"])
