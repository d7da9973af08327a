"""Tables, charts and samples of a study, from the rows of its csv alone; see study.py."""
import base64
import io
import json
import math
import random
import re
import statistics
from html import escape
from itertools import chain, cycle
from pathlib import Path

from common import files

SHARES = ("precision", "recall", "density", "coverage")
COLORS = (
    "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #17becf #8c564b #e377c2 #7f7f7f #bcbd22 "
    "#0b3c5d #b8860b #556b2f #8b0000 #4b0082 #20b2aa #ff1493 #708090"
).split()
DRAWS = 1000  # of a bootstrap
GROUP = ("dataset", "added", "subset", "budget", "dtype", "n")  # what a table is of
AGAIN = "reference"
GREY_DIGITS = "mnist", "digits"  # the course's figures are of such
FAILED = 5000.0  # the distance that a setting counts with that diverged: noise comes near it
T95 = (  # quantiles of Student's t at .975, by degrees of freedom from 1; the last stands for more
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


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


def fid(row):
    return number(row["fid"])


def control(row):
    return number(row["control"])


def speed(row):
    """Updates of G per second; None where it made none."""
    return float(row["steps"]) / float(row["seconds"]) if number(row["steps"]) else None


def ratio(rows, base, value, clock=False):
    """(mean, low, high) of value over that of base, on the `pairs` of their runs.

    A geometric mean with its 95 % interval by Student's t of the logarithms: a collapsed run then
    weighs by its factor, and a machine that slows meets both of a pair. None without a pair; of one
    pair the interval is all numbers.
    """
    logs = [math.log(one / other) for one, other in pairs(rows, base, value, clock)]
    if not logs:
        return None
    mean, n = statistics.mean(logs), len(logs)
    if n == 1:
        return math.exp(mean), 0.0, math.inf
    half = T95[min(n - 1, len(T95)) - 1] * statistics.stdev(logs) / math.sqrt(n)
    return tuple(map(math.exp, (mean, mean - half, mean + half)))


def pairs(rows, base, value, clock=False):
    """[(value of a run, that of the base's run of its seed and setting)], where neither is 0.

    What was trained for equal time is paired on one machine alone, what the clock says (a speed)
    also among runs of which as many trained at once.
    """

    def partner(row):
        found = [r for r in base if (r["seed"], r["setting"]) == (row["seed"], row["setting"])]
        near = [r for r in found if r["machine"] == row["machine"]]
        if clock:
            near = [r for r in near if r["jobs"] == row["jobs"]]
        return near if clock or near or row["budget"].endswith("min") else found

    both = [(value(r), value(other)) for r in rows for other in partner(r)[:1]]
    return [(one, other) for one, other in both if one and other]


def apart(found):
    """-1, 0 or 1: whether the interval of a ratio lies below 1, holds it, or lies above."""
    _, low, high = found or (1, 0, math.inf)
    return (low > 1) - (high < 1)


def expected_minimum(found, k):
    """Mean of the smallest of k of the values found, over all choices of k: without bias."""
    n = len(found)
    weights = (math.comb(n - 1 - i, k - 1) for i in range(n))  # k - 1 others, all of them larger
    return sum(v * w for v, w in zip(sorted(found), weights)) / math.comb(n, k)


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


def at(points, t):
    """The distance at time t on the line between two evaluations, in logarithms."""
    for (t0, v0), (t1, v1) in zip(points, points[1:]):
        if t <= t1:
            part = (t - t0) / (t1 - t0)
            return v0 * (v1 / v0) ** part
    return points[-1][1]


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
            for m in (1, 2, 5) if self.high > 4 * self.low else range(1, 10):
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
    """Smallest distance against training time, mean over runs that were evaluated more than once.

    methods: {name: rows}. None where no method has such runs. A curve spans the times that all of
    its runs were evaluated around.
    """
    curves = {}
    for name, rows in methods.items():
        runs = [p for p in map(best_so_far, rows) if len(p) > 1]
        if runs:
            first, last = max(p[0][0] for p in runs), min(p[-1][0] for p in runs)
            times = [first + (last - first) * i / 24 for i in range(25)]
            some = f" ({len(runs)} of {len(rows)})" if len(runs) < len(rows) else ""
            curves[name + some] = [(t, statistics.mean(at(p, t) for p in runs)) for t in times]
    if not curves:
        return None
    last = max(t for curve in curves.values() for t, _ in curve)
    chart = Chart(title, "seconds of training", last, [v for c in curves.values() for _, v in c])
    chart.ticks_along((last * i / 6, f"{last * i / 6:.0f}") for i in range(7))
    for color, curve in zip(cycle(COLORS), curves.values()):
        chart.line([(chart.x(t), chart.y(v)) for t, v in curve], color)
    chart.legend(zip(curves, cycle(COLORS)))
    return chart.svg()


def minimum_chart(title, methods):
    """Expected smallest distance against the number of random settings. methods: {name: values}.

    Its 5 and 95 % are drawn to half of the settings: beyond, a bootstrap knows nothing better than
    the best that was found.
    """
    last = max(map(len, methods.values()))
    curves = {}
    for name, found in methods.items():
        means = [expected_minimum(found, k) for k in range(1, len(found) + 1)]
        bands = [bootstrap(found, k) for k in range(1, len(found) // 2 + 1)]
        curves[name] = means, bands
    every = [v for means, bands in curves.values() for v in (*means, *chain(*bands))]
    chart = Chart(title, "random settings tried", last, every)
    chart.ticks_along((k, str(k)) for k in range(1, last + 1))
    for color, (means, bands) in zip(cycle(COLORS), curves.values()):
        if bands:
            chart.band(range(1, len(bands) + 1), *zip(*bands), color)
        chart.line([(chart.x(k), chart.y(v)) for k, v in enumerate(means, 1)], color)
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


def failures(rows):
    return sum(bool(r["failed"]) for r in rows)


def runs_text(rows):
    return f"{len(rows)}" + (f", {failures(rows)} failed" if failures(rows) else "")


def table(methods, course, base):
    """Lines of a table in Markdown. methods: {name: rows}, best first."""
    features = {r["features"] for rows in methods.values() for r in rows if not r["failed"]}
    told = any(name in course for name in methods)
    head = ["method", "runs", f"FID ({', '.join(sorted(features))})", *SHARES, "control"]
    head += ["updates", "per second", f"cost / {base}", f"FID / {base}, 95 %"]
    head += ["FID of the course, by its own networks"] * told
    lines = [head, ["---"] * len(head)]
    for name, rows in methods.items():
        cells = [name, runs_text(rows), mean_std(values(rows, "fid"))]
        cells += [re.sub(r"\b0\.", ".", mean_std(values(rows, c), ".3f")) for c in SHARES]
        steps, own = values(rows, "steps"), [v for v in map(speed, rows) if v]
        cells.append(mean_std(values(rows, "control")))
        made = [f"{statistics.mean(steps):.0f}", f"{statistics.mean(own):.1f}"] if own else []
        cells += made or ["-", "-"]
        cost = ratio(methods.get(base, []), rows, speed, clock=True)
        cells.append(f"{cost[0]:.2f}" if cost else "-")
        far = ratio(rows, methods.get(base, []), fid) if name != base else None
        cells.append(interval(far))
        cells += [f"{course[name]:.1f}" if name in course else ""] * told
        lines.append(cells)
    return [row_text(cells) for cells in lines]


def interval(found):
    """Text of a ratio."""
    if not found:
        return "-"
    form = "{:.2f} (one pair)" if math.isinf(found[2]) else "{:.2f} ({:.2f} to {:.2f})"
    return form.format(*found)


def ratios(rows, base):
    """Text: each method over the base, pair by pair, in every score and the cost of an update."""
    known = {"FID": fid, "control": control}
    known |= {k: lambda row, k=k: number(row[k]) for k in SHARES}
    lines, runs = [], [r for r in rows if r["setting"] == "0" and r["method"] != AGAIN]
    for group, found in by(sorted(runs, key=lambda r: int(r["seed"])), *GROUP).items():
        methods = {name: own for (name,), own in by(found, "method").items()}
        theirs = methods.pop(base, [])
        cells = [["method", "pairs", *known, "cost", "seed: FID"]]
        for name, own in methods.items():
            both = {r["seed"]: pairs([r], theirs, fid) for r in own}
            each = [f"{seed}: {a / b:.2f}" for seed, of_it in both.items() for a, b in of_it]
            cell = [name, f"{len(each)}" + (f", {failures(own)} failed" if failures(own) else "")]
            for value in known.values():
                n = len(pairs(own, theirs, value))
                cell.append(interval(ratio(own, theirs, value)))
                cell[-1] += f", {n} pairs" if n not in (0, 1, len(each)) else ""
            cell += [interval(ratio(theirs, own, speed, clock=True)), ", ".join(each)]
            cells += [cell] * bool(each)
        if len(cells) > 1:
            cells.insert(1, ["---"] * len(cells[0]))
            lines += [f"## {described(*group)}: over {base}", "", *map(row_text, cells)]
            shown = {base: theirs} | {row[0]: methods[row[0]] for row in cells[2:]}
            lines += [*circumstances(shown), ""]
    return "\n".join(lines)


def circumstances(methods):
    """Lines on what differs among the runs of a group beside their methods."""
    rows = [r for own in methods.values() for r in own]
    lines = []
    if (crowd := max(int(r["jobs"]) for r in rows)) > 1:
        lines.append(f"- up to {crowd} trained at once, which slows each: costs are of that")
    chips = {name or "an unnamed machine": runs for (name,), runs in by(rows, "machine").items()}
    if len(chips) > 1:
        named = (f"{c}: {', '.join(sorted({r['method'] for r in v}))}" for c, v in chips.items())
        lines.append(f"- {'; '.join(named)}")
    unlike = [name for name, own in methods.items() if len({r["args"] for r in own}) > 1]
    return lines + [f"- by unlike arguments: {', '.join(unlike)}"] * bool(unlike)


def settings_table(drawn, base):
    """Lines of a table of random settings. drawn: {name: rows}, best first."""
    lines = [["method", "settings", "best", "median", "expected best of 4", "of 8"]]
    lines[0] += [f"ahead of {base}", "best arguments"]
    lines.append(["---"] * len(lines[0]))
    theirs = {r["setting"]: distance(r) for r in drawn.get(base, [])}
    for name, rows in drawn.items():
        found = [distance(r) for r in rows]
        cells = [name, runs_text(rows), f"{min(found):.1f}", f"{statistics.median(found):.1f}"]
        for k in (4, 8):
            few = 2 * k > len(rows)  # for a bootstrap of it
            band = "" if few else " ({:.1f} to {:.1f})".format(*bootstrap(found, k))
            cells.append(f"{expected_minimum(found, k):.1f}{band}" if k <= len(rows) else "-")
        both = [distance(r) < theirs[r["setting"]] for r in rows if r["setting"] in theirs]
        cells.append(f"in {sum(both)} of {len(both)}" if both and name != base else "-")
        cells.append(f"`{min(rows, key=distance)['args']}`")
        lines.append(cells)
    return [row_text(cells) for cells in lines]


def distance(row):
    """The distance that a setting counts with."""
    return FAILED if row["failed"] else fid(row)


def own_scores(methods):
    """Lines with every number of the last evaluations, for methods with scores of their own."""
    lines = []
    for name, rows in methods.items():
        found = [json.loads(r["evaluations"])[-1] for r in rows if r["evaluations"]]
        first = found[0] if found else {}
        about = ", ".join(f"{k} {first[k]}" for k in ("n", "features") if k in first)
        keys = [k for k in first if k not in ("step", "seconds", "n")]
        told = [f"{k} {mean_std(values(found, k), '.4g')}" for k in keys if values(found, k)]
        lines.append(f"- {name}, {runs_text(rows)} runs ({about}): {', '.join(told)}")
    return lines


def differences(methods, base):
    """Lines that say which methods differ from the base by more than chance, seed for seed."""
    if base not in methods:
        return []
    said = {"ahead": [], "behind": [], "level": [], "alone": [], "failed": []}
    for name, rows in methods.items():
        found = ratio(rows, methods[base], fid)
        if name == base:
            continue
        if failures(rows):
            said["failed"].append(f"{name} ({failures(rows)} of {len(rows)})")
        elif not found or math.isinf(found[2]):
            said["alone"].append(name)
        else:
            said[("level", "behind", "ahead")[apart(found)]].append(name)
    words = {
        "ahead": f"ahead of {base}, by the interval of the ratio on the seeds of both",
        "behind": f"behind {base}",
        "level": f"not to be told from {base}",
        "alone": f"fewer than two seeds shared with {base}",
        "failed": "some runs failed, so not compared",
    }
    return [f"- {words[k]}: {', '.join(names)}" for k, names in said.items() if names]


def disagreements(methods):
    """Lines on pairs that the features and the yardstick's classifier put in opposite orders."""
    both = {n: [r for r in rows if fid(r) and control(r)] for n, rows in methods.items()}
    names = [n for n, rows in both.items() if rows and not failures(methods[n])]
    clear, unclear, pairs = [], 0, 0
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            found = [ratio(both[one], both[other], value) for value in (fid, control)]
            if None in found or math.isinf(found[0][2]):  # one pair has no spread
                continue
            pairs += 1
            if (found[0][0] - 1) * (found[1][0] - 1) < 0:
                if all(map(apart, found)):
                    clear.append(f"{one} and {other}")
                else:
                    unclear += 1
    if not pairs:
        return []
    alike = pairs - unclear - len(clear)
    text = f"- the control orders {alike} of {pairs} pairs as the distance does"
    text += f", {unclear} the other way within their spread" if unclear else ""
    return [text + (f"; beyond it: {', '.join(clear)}" if clear else "")]


def repeats(rows):
    """Line on the repeated run of a group: what the machine does to the same command."""
    again = [r for r in rows if r["method"] == AGAIN and not r["failed"]]
    if len(again) < 2:
        return []
    rates = [speed(r) for r in again]
    drift = f"{min(rates):.1f} to {max(rates):.1f} updates per second"
    spread = mean_std(values(again, "fid"))
    return [f"- the same command with the same seed, {len(again)} times: {drift}, FID {spread}"]


def group_text(rows, course, base, what, picture):
    """Lines on runs of one cost. picture(name, data) keeps a picture and returns its line."""
    runs = [r for r in rows if r["method"] != AGAIN]
    own = by([r for r in runs if r["setting"] == "0"], "method")
    own = {n: found for (n,), found in own.items()}
    order = {n: statistics.mean(values(found, "fid") or [math.inf]) for n, found in own.items()}
    own = {n: own[n] for n in sorted(own, key=lambda n: (failures(own[n]) > 0, order[n]))}
    text = [f"## {what}", ""]
    done = [r for found in own.values() for r in found if not r["failed"]]
    if done and not values(done, "recall"):  # image to image
        text += [*own_scores(own), ""]
    elif own:
        text += [*table(own, course, base), ""]
        text += [*differences(own, base), *disagreements(own), *repeats(rows)]
        text += [*circumstances(own), ""]
        if svg := budget_chart(f"Smallest distance, {what}", own):
            text += [picture("budget.svg", svg.encode()), ""]
    if sheet := samples_sheet(own):
        buffer = io.BytesIO()
        sheet.save(buffer, "png", optimize=True)
        text += [picture("samples.png", buffer.getvalue()), ""]

    drawn = by([r for r in runs if r["setting"] != "0"], "method")
    scores = {n: [distance(r) for r in found] for (n,), found in drawn.items()}
    scores = {n: scores[n] for n in sorted(scores, key=lambda n: min(scores[n]))}
    if scores:
        text += [*settings_table({n: drawn[n,] for n in scores}, base), ""]
        text += [f"One that failed counts as {FAILED:g}; in brackets 5 and 95 % by bootstrap.", ""]
        for name, title, made in (
            ("settings", "Expected smallest distance", minimum_chart),
            ("boxes", "Distances of random settings", box_chart),
        ):
            text += [picture(f"{name}.svg", made(f"{title}, {what}", scores).encode()), ""]
    return text


def described(dataset, added, subset, budget, dtype, n):
    """What the runs of a GROUP have in common."""
    images = f"{subset} images of {dataset}" if subset != "0" else dataset
    return f"{images}, {budget} each, {dtype}, up to {n} samples{added and ', '}{added}"


def report(rows, stem, known, course, base):
    """Write stem.md and the pictures it names; returns the text.

    known: commands by method, course: distances by method, see study.py.
    """
    stem = Path(stem)
    dates = sorted(r["date"] for r in rows)
    about = f"torch {', '.join(sorted({r['torch'] for r in rows}))}, {dates[0]} to {dates[-1]}"
    about += f", {', '.join(sorted({r['machine'] or 'an unnamed machine' for r in rows}))}"
    jobs = max(int(r["jobs"]) for r in rows)
    text = [f"`python -m tests.benchmarks.study --report`: {len(rows)} runs, {about}, "]
    text[0] += f"one thread each, up to {jobs} at once. Means and standard deviations over seeds; "
    text[0] += "ratios are geometric means over the seeds that both have, with a 95 % interval by "
    text[0] += "Student's t, of which one in twenty misses by chance."
    own = [r for r in rows if r["setting"] == "0" and r["method"] != AGAIN]
    old = {r["method"] for r in own if r["args"] != known.get(r["method"])}
    text += ["", f"By other arguments than today's: {', '.join(sorted(old))}."] * bool(old) + [""]
    names = set()
    for (dataset, added, subset, budget, dtype, n), group in by(rows, *GROUP).items():
        images = f"{dataset}-{subset}" if subset != "0" else dataset
        # a dataset can be a path
        data = re.sub(r"[^\w.]+", "-", f"{images} {added}").strip("-")
        name = f"{stem.name}-{data}-{budget.replace(' ', '')}-{dtype}-{n}"
        name += f"-{len(names)}" if name in names else ""  # a/b beside a-b
        names.add(name)

        def picture(kind, data, name=name):
            path = stem.with_name(f"{name}-{kind}")
            files.write_atomic(path, data)
            return f"![]({path.name})"

        what = described(dataset, added, subset, budget, dtype, n)
        told = course if dataset in GREY_DIGITS else {}
        text += group_text(group, told, base, what, picture)
    files.write_atomic(stem.with_name(f"{stem.name}.md"), "\n".join(text).encode())
    return "\n".join(text)
