"""Tables, charts and samples of a study, from the rows of its csv alone; see study.py."""
import base64
import io
import json
import math
import random
import re
import statistics
from html import escape
from itertools import cycle
from pathlib import Path

from common import files

SHARES = ("precision", "recall", "density", "coverage")
COLORS = (
    "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22 "
    "#0b3c5d #b8860b #556b2f #8b0000 #4b0082 #20b2aa #ff1493 #708090"
).split()
DRAWS = 1000  # of a bootstrap
AGAIN = "reference"


# ---- numbers ---------------------------------------------------------------------------------


def number(text):
    """float of a cell, None where it holds no finite number."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def values(rows, column):
    return [v for v in (number(r.get(column)) for r in rows) if v is not None]


def mean_std(found, form=".2f"):
    """Text of mean and standard deviation; of one value the value."""
    if not found:
        return "-"
    text = f"{statistics.mean(found):{form}}"
    return f"{text} ± {statistics.stdev(found):{form}}" if len(found) > 1 else text


def apart(a, b):
    """-1, 0 or 1: whether the mean of a is below, within or above the spread of b's: 2 standard
    errors of their difference. 0 where either has fewer than two values."""
    if min(len(a), len(b)) < 2:
        return 0
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    difference = statistics.mean(a) - statistics.mean(b)
    return 0 if abs(difference) <= 2 * error else int(math.copysign(1, difference))


def on_shared_seeds(rows, base):
    """Those of both on the seeds that both have, for seeds are run in the order of the clock, and
    a machine that slows meets the later ones; all of both where they share none."""
    seeds = {r["seed"] for r in rows} & {r["seed"] for r in base}
    both = ([r for r in found if r["seed"] in seeds] for found in (rows, base))
    return tuple(both) if seeds else (rows, base)


def expected_minimum(found, k):
    """Mean of the smallest of k values drawn from those found, with replacement; exact."""
    n = len(found)
    below = [((n - i) / n) ** k for i in range(n + 1)]  # that none of the i smallest is drawn
    return sum(v * (below[i] - below[i + 1]) for i, v in enumerate(sorted(found)))


def bootstrap(found, k, seed=0):
    """5 and 95 % of expected_minimum over sets drawn from those found."""
    r = random.Random(seed)
    drawn = sorted(expected_minimum(r.choices(found, k=len(found)), k) for _ in range(DRAWS))
    return drawn[round(0.05 * (DRAWS - 1))], drawn[round(0.95 * (DRAWS - 1))]


def best_so_far(row):
    """[(seconds, smallest distance until then), ...] of a run's evaluations."""
    points, best = [], math.inf
    for e in json.loads(row["evaluations"] or "[]"):
        if (value := number(e.get("fid"))) is not None:
            best = min(best, value)
            points.append((float(e["seconds"]), best))
    return points


def by(rows, *columns):
    """{values of the columns: rows}, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[c] for c in columns), []).append(row)
    return found


# ---- charts, as svg --------------------------------------------------------------------------


class Chart:
    """A picture with a logarithmic axis of distances upwards, and something linear along."""

    WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 860, 520, 60, 40, 50, 170

    def __init__(self, title, along, last, every):
        """last: the end of the axis along; every: distances that must fit."""
        self.low, self.high, self.last = min(every) / 1.2, max(every) * 1.2, last
        self.right, self.base = self.WIDTH - self.LEGEND, self.HEIGHT - self.BOTTOM
        self.parts = [f'<text x="{self.LEFT}" y="22" font-size="16">{escape(title)}</text>']
        self.text(self.right, self.base + 40, along, anchor="end")
        for e in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for m in (1, 2, 5):
                if self.low <= (v := m * 10.0**e) <= self.high:
                    self.line([(self.LEFT, self.y(v)), (self.right, self.y(v))], "#ddd", 1)
                    self.text(self.LEFT - 6, self.y(v) + 4, f"{v:g}", anchor="end")
        self.line([(self.LEFT, self.base), (self.right, self.base)], "#444", 1)

    def x(self, value):
        return self.LEFT + (self.right - self.LEFT) * value / self.last

    def y(self, value):
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.base - part * (self.base - self.TOP)

    def text(self, x, y, text, color="#222", anchor="start"):
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text {place} font-size="12" fill="{color}">{escape(text)}</text>')

    def line(self, points, color, width=2):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        form = f'fill="none" stroke="{color}" stroke-width="{width}"'
        self.parts.append(f'<polyline points="{path}" {form}/>')

    def band(self, xs, lows, highs, color):
        there = list(zip(map(self.x, xs), map(self.y, lows)))
        back = list(zip(map(self.x, xs), map(self.y, highs)))[::-1]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in there + back)
        self.parts.append(f'<polygon points="{path}" fill="{color}" fill-opacity=".08"/>')

    def ticks_along(self, marks):
        for value, text in marks:
            self.text(self.x(value), self.base + 18, text, anchor="middle")

    def legend(self, names):
        for i, (name, color) in enumerate(names):
            y = self.TOP + 17 * i
            self.line([(self.right + 12, y), (self.right + 30, y)], color, 3)
            self.text(self.right + 36, y + 4, name)

    def svg(self):
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.WIDTH}" height="{self.HEIGHT}" '
            'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>'
        )
        return "\n".join([head, *self.parts, "</svg>\n"])


def budget_chart(title, methods):
    """Smallest distance against training time, mean over seeds. methods: {name: rows}."""
    curves = {}
    for name, rows in methods.items():
        runs = [p for p in map(best_so_far, rows) if p]
        times = sorted({t for points in runs for t, _ in points})
        curve = []
        for t in times:  # from where every run has been evaluated
            now = [[v for at, v in points if at <= t] for points in runs]
            if all(now):
                curve.append((t, statistics.mean(v[-1] for v in now)))
        if curve:
            curves[name] = curve
    if not curves:
        return None
    last = max(t for curve in curves.values() for t, _ in curve)
    chart = Chart(title, "seconds of training", last, [v for c in curves.values() for _, v in c])
    chart.ticks_along((last * i / 6, f"{last * i / 6:.0f}") for i in range(7))
    for color, curve in zip(cycle(COLORS), curves.values()):
        chart.line([(chart.x(t), chart.y(v)) for t, v in curve], color)
        for t, v in curve:
            x, y = chart.x(t), chart.y(v)
            chart.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    chart.legend(zip(curves, cycle(COLORS)))
    return chart.svg()


def minimum_chart(title, methods):
    """Expected smallest distance against the number of random settings. methods: {name: values}."""
    last = max(map(len, methods.values()))
    curves = {}
    for name, found in methods.items():
        ks = range(1, len(found) + 1)
        bands = [bootstrap(found, k) for k in ks]
        curves[name] = (list(ks), [expected_minimum(found, k) for k in ks], *zip(*bands))
    ends = [v for curve in curves.values() for v in curve[2] + curve[3]]
    chart = Chart(title, "random settings tried", last, ends)
    chart.ticks_along((k, str(k)) for k in range(1, last + 1))
    for color, (ks, means, lows, highs) in zip(cycle(COLORS), curves.values()):
        chart.band(ks, lows, highs, color)
        chart.line([(chart.x(k), chart.y(v)) for k, v in zip(ks, means)], color)
    chart.legend(zip(curves, cycle(COLORS)))
    return chart.svg()


def box_chart(title, methods):
    """A box of quartiles, its median, and every value as a point. methods: {name: values}."""
    chart = Chart(title, "", len(methods), [v for found in methods.values() for v in found])
    for i, (name, found) in enumerate(methods.items()):
        color, wide = COLORS[i % len(COLORS)], 0.3
        at, left, right = chart.x(i + 0.5), chart.x(i + 0.5 - wide), chart.x(i + 0.5 + wide)
        if len(found) > 1:
            quartiles = statistics.quantiles(found, method="inclusive")
            low, middle, high = map(chart.y, quartiles)
            chart.line([(left, low), (right, low), (right, high), (left, high), (left, low)], color)
            chart.line([(left, middle), (right, middle)], color, 3)
        for v in found:
            dot = f'cx="{at:.1f}" cy="{chart.y(v):.1f}" r="3" fill="{color}" fill-opacity=".6"'
            chart.parts.append(f"<circle {dot}/>")
        chart.text(at, chart.base + 16 + 14 * (i % 2), name, anchor="middle")
    return chart.svg()


def samples_sheet(methods):
    """PIL image with one captioned row of samples for each method; None where there are none."""
    from PIL import Image, ImageDraw

    strips = []
    for name, rows in methods.items():
        kept = next((r["samples"] for r in rows if r["samples"]), None)
        if kept:
            strips.append((name, Image.open(io.BytesIO(base64.b64decode(kept))).convert("RGB")))
    if not strips:
        return None
    size = 110 + max(p.width for _, p in strips), sum(p.height + 4 for _, p in strips)
    sheet, y = Image.new("RGB", size, "white"), 0
    pen = ImageDraw.Draw(sheet)
    for name, picture in strips:
        sheet.paste(picture, (110, y))
        pen.text((104, y + picture.height // 2), name, "black", anchor="rm")
        y += picture.height + 4
    return sheet


# ---- text ------------------------------------------------------------------------------------


def row_text(cells):
    return "| " + " | ".join(cells) + " |"


def speed(rows):
    """Updates of G per second of every run that made some."""
    return [float(r["steps"]) / float(r["seconds"]) for r in rows if number(r["steps"])]


def table(methods, known, base):
    """Lines of a table in Markdown. methods: {name: rows}, best first."""
    features = {r["features"] for rows in methods.values() for r in rows if not r["failed"]}
    course = {name: known[name][1] for name in methods if known.get(name, (0, None))[1]}
    head = ["method", "runs", f"FID ({', '.join(sorted(features))})", *SHARES, "control"]
    head += ["updates", "per second", f"cost / {base}"] + ["the course's FID"] * bool(course)
    lines = [head, ["---"] * len(head)]
    for name, rows in methods.items():
        failed = sum(bool(r["failed"]) for r in rows)
        cells = [name, f"{len(rows)}" + (f", {failed} failed" if failed else "")]
        cells.append(mean_std(values(rows, "fid")))
        cells += [re.sub(r"\b0\.", ".", mean_std(values(rows, c), ".3f")) for c in SHARES]
        steps, own = values(rows, "steps"), speed(rows)
        cells += [mean_std(values(rows, "control")), f"{statistics.mean(steps or [0]):.0f}"]
        cells.append(f"{statistics.mean(own):.1f}" if own else "-")
        alike = [speed(r) for r in on_shared_seeds(rows, methods.get(base, []))]
        rates = [statistics.mean(found) for found in alike if found]
        cells.append(f"{rates[1] / rates[0]:.2f}" if len(rates) == 2 else "-")
        if course:
            cells.append(f"{course[name]:.1f}" if name in course else "")
        lines.append(cells)
    return [row_text(cells) for cells in lines]


def settings_table(drawn):
    """Lines of a table of random settings. drawn: {name: rows}, best first."""
    lines = [["method", "settings", "failed", "best", "median", "best arguments"], ["---"] * 6]
    for name, rows in drawn.items():
        found = values(rows, "fid")
        failed = f"{sum(bool(r['failed']) for r in rows)}"
        best = min(rows, key=lambda r: number(r["fid"]) or math.inf)
        ends = f"{min(found):.2f}", f"{statistics.median(found):.2f}"
        lines.append([name, f"{len(rows)}", failed, *ends, f"`{best['args']}`"])
    return [row_text(cells) for cells in lines]


def own_scores(methods):
    """Lines with every number of the last evaluations, for methods with scores of their own."""
    lines = []
    for name, rows in methods.items():
        found = [json.loads(r["evaluations"])[-1] for r in rows if r["evaluations"]]
        keys = [k for k in (found[0] if found else {}) if k not in ("step", "seconds", "n")]
        told = [f"{k} {mean_std(values(found, k), '.4g')}" for k in keys if values(found, k)]
        lines.append(f"- {name}, {len(found)} runs: {', '.join(told)}")
    return lines


def differences(methods, base):
    """Lines that say which methods differ from the base by more than the spread."""
    if base not in methods:
        return []
    said = {-1: [], 0: [], 1: []}
    for name, rows in methods.items():
        if name != base:
            one, other = on_shared_seeds(rows, methods[base])
            said[apart(values(one, "fid"), values(other, "fid"))].append(name)
    words = {
        -1: f"ahead of {base} by more than 2 standard errors",
        1: f"behind {base} by more than that",
        0: f"not to be told from {base}, or one run alone",
    }
    return [f"- {words[k]}: {', '.join(names)}" for k, names in said.items() if names]


def disagreements(methods):
    """Lines on pairs that the features and the yardstick's classifier put in opposite orders."""
    both = {n: (values(r, "fid"), values(r, "control")) for n, r in methods.items()}
    names = [n for n, (a, b) in both.items() if a and b]
    clear, unclear, pairs = [], 0, 0
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            pairs += 1
            (a, b), (c, d) = both[one], both[other]
            order = statistics.mean(a) - statistics.mean(c), statistics.mean(b) - statistics.mean(d)
            if order[0] * order[1] < 0:
                if apart(a, c) and apart(b, d):
                    clear.append(f"{one} and {other}")
                else:
                    unclear += 1
    if not pairs:
        return []
    text = f"- the control orders {pairs - unclear - len(clear)} of {pairs} pairs as the table does"
    text += f", {unclear} the other way within their spread" if unclear else ""
    return [text + (f"; beyond it: {', '.join(clear)}" if clear else "")]


def repeats(rows):
    """Line on the repeated run of a group: what the machine does to the same command."""
    again = [r for r in rows if r["method"] == AGAIN and not r["failed"]]
    if len(again) < 2:
        return []
    steps = values(again, "steps")
    drift = f"{min(steps):.0f} to {max(steps):.0f} updates"
    spread = mean_std(values(again, "fid"))
    return [f"- the same command with the same seed, {len(again)} times: {drift}, FID {spread}"]


def group_text(rows, known, base, what, picture):
    """Lines on runs of one cost. picture(name, data) keeps a picture and returns its line."""
    runs = [r for r in rows if r["method"] != AGAIN]
    own = by([r for r in runs if r["setting"] == "0"], "method")
    own = {n: found for (n,), found in own.items()}
    order = {n: statistics.mean(values(found, "fid") or [math.inf]) for n, found in own.items()}
    own = {n: own[n] for n in sorted(own, key=order.get)}
    drawn = by([r for r in runs if r["setting"] != "0"], "method")
    drawn = {n: found for (n,), found in drawn.items()}
    text = [f"## {what}", ""]
    if own and not any(values(found, "recall") for found in own.values()):
        text += [*own_scores(own), ""]
    elif own:
        text += [*table(own, known, base), ""]
        text += [*differences(own, base), *disagreements(own), *repeats(rows), ""]
        if svg := budget_chart(f"Smallest distance, {what}", own):
            text += [picture("budget.svg", svg.encode()), ""]
    if sheet := samples_sheet(own):
        buffer = io.BytesIO()
        sheet.save(buffer, "png", optimize=True)
        text += [picture("samples.png", buffer.getvalue()), ""]

    drawn = {n: found for n, found in drawn.items() if values(found, "fid")}
    if drawn:
        drawn = {n: drawn[n] for n in sorted(drawn, key=lambda n: min(values(drawn[n], "fid")))}
        # a setting that failed counts as the worst of all that did not
        worst = max(v for found in drawn.values() for v in values(found, "fid"))
        scores = {n: [number(r["fid"]) or worst for r in found] for n, found in drawn.items()}
        text += [*settings_table(drawn), ""]
        for name, title, made in (
            ("settings", "Expected smallest distance", minimum_chart),
            ("boxes", "Distances of random settings", box_chart),
        ):
            text += [picture(f"{name}.svg", made(f"{title}, {what}", scores).encode()), ""]
    return text


def report(rows, stem, known, base):
    """Write stem.md and the pictures it names; returns the text. known: study.METHODS."""
    stem = Path(stem)
    dates = sorted(r["date"] for r in rows)
    about = f"torch {', '.join(sorted({r['torch'] for r in rows}))}, {dates[0]} to {dates[-1]}"
    jobs = max(int(r["jobs"]) for r in rows)
    text = [f"`python -m tests.benchmarks.study --report`: {len(rows)} runs, {about}, "]
    text[0] += f"one thread each, up to {jobs} at once. Means and standard deviations over seeds."
    text.append("")
    groups = by(rows, "dataset", "subset", "budget", "dtype", "n")
    for i, ((dataset, subset, budget, dtype, n), group) in enumerate(groups.items()):

        def picture(name, data, i=i):
            path = stem.with_name(f"{stem.name}-{i}-{name}")
            files.write_atomic(path, data)
            return f"![]({path.name})"

        images = f"{subset} images of {dataset}" if subset != "0" else dataset
        what = f"{images}, {budget} each, {dtype}, {n} samples"
        text += group_text(group, known, base, what, picture)
    files.write_atomic(stem.with_suffix(".md"), "\n".join(text).encode())
    return "\n".join(text)
