"""Curves, grids and an animation from run folders.

    python -m common.report RUN                 # renews the pictures inside RUN
    python -m common.report RUN RUN ... --out DIR   # several runs side by side, with one table

Of one run: samples.png (the last grid), progress.png (one row of fixed latents over the course of
training), samples.gif (all grids), curves.png. Of several: curves.png on shared axes, samples.png
with the final grids, table.md.
"""
import argparse
import math
from pathlib import Path

from common import evaluate, terminal
from common.run import SCRIPTS, Parser, guard, read_args, read_csv, script_of
from common.sample import GAP, zoom

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
FRAMES = 60  # of the animation at most
ROWS = 10  # of progress.png at most
SCORES = ("fid", "precision", "recall", "density", "coverage")
SCALE = 2  # charts are drawn larger and reduced, which smooths their lines


def _font(size):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _numbers(rows, name):
    """(steps, values) of a column, rows without a number left out."""
    pairs = [(int(r["step"]), float(r[name])) for r in rows if r.get(name) not in (None, "")]
    pairs = [p for p in pairs if math.isfinite(p[1])]
    return [p[0] for p in pairs], [p[1] for p in pairs]


# ---- charts ----------------------------------------------------------------------------------


def _ticks(low, high, log):
    """Round values from low to high: powers of ten with their 2 and 5, or 1-2-5 steps."""
    if log:
        found = [m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)]
        inside = [t for t in found if low <= t <= high]
        return [t for t in inside if len(inside) <= 6 or f"{t:e}"[0] == "1"] or inside[:6]
    raw = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thin(xs, ys, most=400):
    """Means over equal stretches, where a line has more points than a chart has pixels."""
    if len(xs) <= most:
        return xs, ys
    size = -(-len(xs) // most)
    cuts = range(0, len(xs), size)
    return [xs[min(i + size, len(xs)) - 1] for i in cuts], [sum(ys[i : i + size]) / len(ys[i : i + size]) for i in cuts]


def chart(title, series, share=False, width=480, height=300):
    """PIL image of lines over steps. series: (label, xs, ys) each; logarithmic if ys > 0 span 50-fold.

    share: the values are shares, so the axis goes from 0 to 1, or higher where they do.
    """
    from PIL import Image, ImageDraw

    s = SCALE
    small, large = _font(12 * s), _font(15 * s)
    series = [(label, *_thin(xs, ys)) for label, xs, ys in series if xs]
    widths = [32 * s + small.getlength(label) for label, _, _ in series]
    stacked = 60 * s + sum(widths) > width * s  # too much for one line of the legend: a line each
    extra = 16 * s * (len(series) - 1) if stacked else 0
    height += extra // s
    image = Image.new("RGB", (width * s, height * s), "white")
    pen = ImageDraw.Draw(image)
    pen.text((60 * s, 8 * s), title, "black", large)
    if not series:
        pen.text((60 * s, 140 * s), "nothing recorded yet", "gray", small)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    every = [y for _, _, ys in series for y in ys]
    log = not share and min(every) > 0 and max(every) / min(every) > 50
    low, high = min(every), max(every)
    if share:
        low, high = 0.0, max(1.0, high) * 1.02
    elif log:
        low, high = low / 1.2, high * 1.2
    else:
        pad = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        low, high = (low if 0 <= low < pad else low - pad), high + pad
    x_low, x_high = 0, max(1, max(xs[-1] for _, xs, _ in series))
    left, right, top, bottom = 60 * s, (width - 16) * s, 56 * s + extra, (height - 32) * s

    def at_x(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def at_y(y):
        part = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return bottom - part * (bottom - top)

    for y in _ticks(low, high, log):
        pen.line([(left, at_y(y)), (right, at_y(y))], "#dddddd", s)
        pen.text((left - 6 * s, at_y(y)), f"{y:.4g}", "#444444", small, anchor="rm")
    for x in _ticks(x_low, x_high, False):
        pen.line([(at_x(x), bottom), (at_x(x), bottom + 4 * s)], "#444444", s)
        pen.text((at_x(x), bottom + 6 * s), f"{x:g}" if x < 1e4 else f"{x / 1000:g}k", "#444444", small, anchor="mt")
    pen.line([(left, bottom), (right, bottom)], "#444444", s)
    along, x = 32 * s, left
    for i, (label, xs, ys) in enumerate(series):
        ink = COLORS[i % len(COLORS)]
        points = [(at_x(a), at_y(b)) for a, b in zip(xs, ys)]
        if len(points) > 1:
            pen.line(points, ink, 2 * s, joint="curve")
        if len(points) <= 30:
            for a, b in points:
                pen.ellipse([a - 3 * s, b - 3 * s, a + 3 * s, b + 3 * s], ink)
        if label:
            pen.line([(x, along + 8 * s), (x + 16 * s, along + 8 * s)], ink, 3 * s)
            pen.text((x + 20 * s, along), label, "black", small)
        if stacked:
            along += 16 * s
        else:
            x += widths[i]
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _sheet(pictures, columns, color="white", gap=8):
    """PIL image of pictures side by side in rows of that many columns."""
    from PIL import Image

    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(p.width for p in row) + gap * (len(row) - 1) for row in rows)
    height = sum(max(p.height for p in row) for row in rows) + gap * (len(rows) - 1)
    sheet, y = Image.new("RGB", (width, height), color), 0
    for row in rows:
        x = 0
        for p in row:
            sheet.paste(p, (x, y))
            x += p.width + gap
        y += max(p.height for p in row) + gap
    return sheet


def _captioned(picture, text):
    """The picture under a text, in as many lines as its width asks for."""
    from PIL import Image, ImageDraw

    font, lines = _font(14), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= picture.width - 8 else [lines[-1], word]
    top = 8 + 16 * len(lines)
    image = Image.new("RGB", (max(picture.width, 40), picture.height + top), "white")
    image.paste(picture, (0, top))
    ImageDraw.Draw(image).text((4, 4), "\n".join(lines), "black", font, spacing=2)
    return image


# ---- one run ---------------------------------------------------------------------------------


def _grids(folder):
    """(step, path) of the grids of a run, in order."""
    return sorted((int(p.stem), p) for p in (Path(folder) / "samples").glob("*.png") if p.stem.isdigit())


def _spread(items, most):
    """At most that many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def loss_charts(logs):
    """Charts of log.csv tables {label: rows}: losses of D and G together, then each other column."""
    first = next(iter(logs.values()), [])
    names = [n for n in (first[0] if first else {}) if n not in ("step", "seconds", "images")]
    if len(logs) == 1:
        rows = next(iter(logs.values()))
        both = [(n, *_numbers(rows, n)) for n in names if n.startswith("loss_")]
        rest = [n for n in names if not n.startswith("loss_")]
        found = [chart("losses", both)]
        return found + ([chart("terms, before their weights", [(n, *_numbers(rows, n)) for n in rest])] if rest else [])
    return [
        chart(n, [(label, *_numbers(rows, n)) for label, rows in logs.items()])
        for n in ("loss_d", "loss_g")
        if any(n in (rows[0] if rows else {}) for rows in logs.values())
    ]


def score_charts(tables):
    """Charts of metrics.csv tables {label: rows}."""
    rows = next((r for r in tables.values() if r), [])
    title = evaluate.fid_label(rows[-1]["features"]) if rows else "FID"
    found = [chart(title, [(label, *_numbers(r, "fid")) for label, r in tables.items()])]
    if len(tables) == 1:
        rows = next(iter(tables.values()))
        return found + [chart("precision, recall, density, coverage", [(n, *_numbers(rows, n)) for n in SCORES[1:]], True)]
    return found + [chart(n, [(label, *_numbers(r, n)) for label, r in tables.items()], True) for n in SCORES[1:]]


def pictures(folder):
    """samples.png, progress.png, samples.gif and curves.png of one run, from what it has so far."""
    from PIL import Image

    folder = Path(folder)
    grids = _grids(folder)
    if grids:
        last = Image.open(grids[-1][1])
        last.save(folder / "samples.png")
        size = read_args(folder)["args"]["image_size"]
        strip = size * zoom(size) + GAP
        rows = []
        for step, path in _spread(grids, ROWS):
            whole = Image.open(path).convert("RGB")
            rows.append(_beside(f"{step}", whole.crop((0, 0, whole.width, min(strip + GAP, whole.height)))))
        _sheet(rows, 1, gap=0).save(folder / "progress.png")
        frames = [Image.open(path).convert("RGB" if last.mode == "RGB" else "L") for _, path in _spread(grids, FRAMES)]
        times = [250] * (len(frames) - 1) + [2000]
        frames[0].save(folder / "samples.gif", save_all=True, append_images=frames[1:], duration=times, loop=0)
    logs, tables = read_csv(folder / "log.csv"), read_csv(folder / "metrics.csv")
    _sheet(loss_charts({"": logs}) + score_charts({"": tables}), 2).save(folder / "curves.png")


def _beside(text, picture):
    """The picture with a step number at its left."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (picture.width + 56, picture.height), "white")
    image.paste(picture, (56, 0))
    ImageDraw.Draw(image).text((50, picture.height // 2), text, "black", _font(14), anchor="rm")
    return image


def summary(folder):
    """The final metrics and the paths of a run, as text for the terminal."""
    folder = Path(folder)
    rows = read_csv(folder / "metrics.csv")
    found = [evaluate.lines(rows[-1])] if rows else []
    shown = ("samples.png", "progress.png", "samples.gif", "curves.png", "metrics.json", "generator.pt")
    names = [n for n in shown if (folder / n).exists()]
    return "\n".join(found + [f"{folder}/  {'  '.join(names)}"])


# ---- several runs ----------------------------------------------------------------------------


def _labels(folders):
    """Short names: the script and what was typed that the runs do not share, else the folder's name."""
    saved = [read_args(f) for f in folders]
    skip = {"out_dir", "quiet", "device", "threads", "log_every", "sample_every", "eval_every"}
    found = []
    for folder, run in zip(folders, saved):
        defaults = vars(script_of(folder).Args()) if run["script"] in SCRIPTS else {}
        typed = {k: v for k, v in run["args"].items() if k in defaults.keys() - skip and v not in (None, defaults[k])}
        told = [k for k, v in typed.items() if any(s["args"].get(k) != v for s in saved)]
        values = [f"{typed[k]:g}" if isinstance(typed[k], float) else str(typed[k]) for k in told]
        found.append(" ".join([run["script"]] + [f"{k} {v}" for k, v in zip(told, values)]))
    return found if len(set(found)) == len(found) else [Path(f).resolve().name for f in folders]


def compare(folders, out):
    """curves.png, samples.png and table.md of several runs in the folder out; returns the table."""
    from PIL import Image

    labels = _labels(folders)
    logs = {label: read_csv(Path(f) / "log.csv") for label, f in zip(labels, folders)}
    tables = {label: read_csv(Path(f) / "metrics.csv") for label, f in zip(labels, folders)}
    if len(networks := {r["features"] for rows in tables.values() for r in rows}) > 1:
        raise ValueError(f"scores of different features cannot share a column: {', '.join(sorted(networks))}")
    head = ["run", "steps", "seconds", "n", evaluate.fid_label(networks.pop()) if networks else "FID", *SCORES[1:]]
    body = []
    for label, rows in tables.items():
        if rows:
            r = rows[-1]
            body.append([label, r["step"], f"{float(r['seconds']):.0f}", r["n"], f"{float(r['fid']):.2f}"])
            body[-1] += [f"{float(r[k]):.3f}" for k in SCORES[1:]]
        else:
            body.append([label] + ["not scored yet"] + [""] * (len(head) - 2))
    text = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    _sheet(loss_charts(logs) + score_charts(tables), 3).save(out / "curves.png")
    finals = [(label, _grids(f)) for label, f in zip(labels, folders)]
    final = [_captioned(Image.open(g[-1][1]).convert("RGB"), label) for label, g in finals if g]
    if final:
        _sheet(final, min(4, len(final))).save(out / "samples.png")
    return text


def _command(argv=None):
    p = Parser(prog="python -m common.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    p.add_argument("--out", metavar="DIR", default="runs/report", help="for the pictures of several runs [runs/report]")
    a = p.parse_args(argv)
    for folder in a.runs:
        read_args(folder)
    if len(a.runs) == 1:
        pictures(a.runs[0])
        print(summary(a.runs[0]))
        return
    print(compare(a.runs, a.out))
    terminal.close()
    print(f"{a.out}/  curves.png  samples.png  table.md")


if __name__ == "__main__":
    guard(_command)
