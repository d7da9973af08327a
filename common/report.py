"""Curves, grids and a page to look at, from run folders.

    python -m common.report RUN                     # renews the pictures inside RUN
    python -m common.report RUN RUN ... --out DIR   # several runs side by side, with one table

Of one run: for every set of pictures the last grid, a strip over training and an animation;
curves.png. Of several: curves on shared axes, the final grids, table.md. Either way index.html,
with a slider over the steps; a report of several keeps copies of their grids and can be moved.
"""
import html
import json
import shutil
from pathlib import Path
from urllib.parse import quote

from common import cli, files, pictures, terminal

ACROSS = "dataset subset image_size seed max_minutes".split()  # what other scripts' runs share too
ASIDE = """out_dir data_dir cache_dir resume quiet device threads
    log_every sample_every eval_every""".split()  # these change no result
SHOWN = 40  # grids of a set in a report of several runs, at most
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222 }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.15em; margin: 1.6em 0 .5em }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .8em; border-bottom: 1px solid #ddd }}
td {{ text-align: right }} td:first-child, th:first-child {{ text-align: left }}
.row {{ display: flex; flex-wrap: wrap; gap: 1em }} .row > * {{ flex: 0 1 auto; min-width: 12em }}
figure {{ margin: 0; max-width: 46em }} figcaption {{ margin-bottom: .3em }}
img {{ max-width: 100% }} input {{ width: 24em; max-width: 70%; vertical-align: middle }}
</style>
<h1>{title}</h1>
{body}
<script>
for (const slider of document.querySelectorAll("input")) {{
  const section = slider.closest("section"), steps = JSON.parse(slider.dataset.steps);
  slider.parentNode.hidden = steps.length < 2;
  slider.oninput = () => {{
    const step = steps[slider.value];
    slider.nextElementSibling.value = "step " + step;
    for (const image of section.querySelectorAll("img[data-grids]")) {{
      const past = JSON.parse(image.dataset.grids).filter(([t]) => t <= step);
      if (past.length) image.src = past[past.length - 1][1];
    }}
  }};
  slider.oninput();
}}
</script>
</html>
"""

# ---- what the runs are called, and their scores ----------------------------------------------


def differing(saved):
    """{argument: values} of the runs where they are not all the same; None where a run has none."""
    names = dict.fromkeys(name for run in saved for name in run["args"] if name not in ASIDE)
    found = {name: [run["args"].get(name) for run in saved] for name in names}
    found = {"script": [run["script"] for run in saved]} | found
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def labels(folders, saved):
    """A short name for each run: its script, and what differs from other runs of that script."""
    found = []
    for run in saved:
        alike = differing([other for other in saved if other["script"] == run["script"]])
        differs = alike.keys() | (differing(saved).keys() & set(ACROSS))
        told = [f"{k} {v}" for k, v in run["args"].items() if k in differs and v is not None]
        found.append(" ".join([run["script"], *told]))
    names = [Path(f).resolve().name for f in folders]
    if len(set(zip(found, names))) < len(folders):
        names = [str(f) for f in folders]
    return [f"{x} ({n})" if found.count(x) > 1 else x for x, n in zip(found, names)]


def tables(scores):
    """Tables of the final rows, as lists of rows: one for each network behind the scores."""
    found = []
    for features, some in pictures.by_features(scores).items():
        names = pictures.columns(some.values())
        head = ["run", "steps", "seconds", "n", "features"]
        rows = [head + [pictures.fid_label(features, name) for name in names]]
        for label, (*_, last) in some.items():
            values = [pictures.numbers([last], name)[1] for name in names]
            row = [label, last["step"], f"{float(last['seconds']):.0f}", last["n"], features]
            rows.append(row + ["".join(f"{v:.4g}" for v in value) for value in values])
        found.append(rows)
    if missing := [label for label, rows in scores.items() if not rows]:
        found.append([["run", "scores"]] + [[label, "not scored yet"] for label in missing])
    return found


def markdown(rows):
    """A table as text, with | inside a cell kept apart from those between cells."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    return "\n".join(f"| {line} |" for line in lines)


# ---- the page --------------------------------------------------------------------------------


def html_table(rows):
    text = [["<td>" + html.escape(str(cell)) for cell in row] for row in rows]
    text[0] = [cell.replace("<td>", "<th>", 1) for cell in text[0]]
    return "<table>" + "".join("\n<tr>" + "".join(row) for row in text) + "</table>"


def html_set(name, runs, strip):
    """Grids of one set with a slider; runs: {label: [(step, path beside the page), ...]}."""
    steps = sorted({t for some in runs.values() for t, _ in some})
    shown = [(label, [(t, quote(p.as_posix())) for t, p in some]) for label, some in runs.items()]
    if strip:
        shown.append(("over training", [(0, quote(pictures.strip_name(name)))]))
    body = ""
    for label, some in shown:
        label, grids = html.escape(label), html.escape(json.dumps(some))
        body += f"""<figure><figcaption>{label}</figcaption>
<img src="{some[-1][1]}" alt="{html.escape(name)}, {label}" data-grids="{grids}"></figure>\n"""
    return f"""<section><h2>{html.escape(name)}</h2>
<p hidden><input type="range" max="{len(steps) - 1}" value="{len(steps) - 1}"
 data-steps="{steps}" aria-label="step"> <output></output></p>
<div class="row">{body}</div></section>"""


def write_page(out, title, sets, scores, arguments):
    """index.html in the folder out; sets: {name: {label: [(step, path)]}}, paths beside it."""
    parts = [html_set(name, runs, len(scores) == 1) for name, runs in sets.items()]
    if (out / "curves.png").exists():
        parts.append('<h2>curves</h2><img src="curves.png" alt="curves over the steps">')
    parts += ["<h2>scores</h2>", *map(html_table, tables(scores))]
    parts += ["<h2>arguments</h2>", html_table(arguments)]
    text = PAGE.format(title=html.escape(title), body="\n".join(parts))
    files.write_atomic(out / "index.html", text.encode())


def report(folder):
    """Renew the pictures of one run and write its index.html."""
    saved, label = cli.read_args(folder), folder.resolve().name
    pictures.of_run(folder)
    sets = {
        name: {label: [(t, path.relative_to(folder)) for t, path in steps]}
        for name, steps in pictures.grids(folder).items()
    }
    scores = {label: files.read_csv(folder / "metrics.csv")}
    arguments = [["argument", "value"], ["script", saved["script"]], *saved["args"].items()]
    write_page(folder, label, sets, scores, arguments)


def compare(folders, out):
    """curves.png, final grids, table.md and index.html of several runs; returns the table."""
    from PIL import Image

    if (out / "args.json").exists():
        raise ValueError(f"--out {out} is a run folder; the pictures of several go beside it")
    saved = [cli.read_args(folder) for folder in folders]
    names = labels(folders, saved)
    logs, scores = (
        {name: files.read_csv(folder / table) for name, folder in zip(names, folders)}
        for table in ("log.csv", "metrics.csv")
    )
    text = "\n\n".join(map(markdown, tables(scores)))
    out.mkdir(parents=True, exist_ok=True)
    files.write_atomic(out / "table.md", (text + "\n").encode())
    if charts := pictures.charts(logs, scores):
        pictures.save(pictures.sheet(charts, 3), out / "curves.png")

    sets = {}
    for i, (label, folder) in enumerate(zip(names, folders)):
        for name, steps in pictures.grids(folder).items():
            beside = Path(f"{i + 1}-{folder.resolve().name}", name)
            (out / beside).mkdir(parents=True, exist_ok=True)
            for t, path in pictures.spread(steps, SHOWN):
                shutil.copy(path, out / beside / path.name)
                sets.setdefault(name, {}).setdefault(label, []).append((t, beside / path.name))
    for name, runs in sets.items():
        last = [(label, Image.open(out / steps[-1][1])) for label, steps in runs.items()]
        final = [pictures.captioned(grid, label) for label, grid in last]
        pictures.save(pictures.sheet(final, min(4, len(final))), out / f"{name}.png")
    differs = [[k, *("" if v is None else v for v in vs)] for k, vs in differing(saved).items()]
    write_page(out, f"{len(folders)} runs", sets, scores, [["argument", *names], *differs])
    return text


def chosen(paths):
    """The run folders among paths, each once, without the reports that runs/* matches too."""
    found = {}
    for path in map(Path, paths):
        if (path / "index.html").exists() and not (path / "args.json").exists():
            terminal.note(f"{path} is a report and no run: passed over")
            continue
        cli.read_args(path)
        found.setdefault(path.resolve(), path)
    if not found:
        raise ValueError(f"no run folder among {', '.join(map(str, paths))}")
    return list(found.values())


def main(argv=None):
    p = cli.Parser(prog="python -m common.report", description=__doc__)
    p.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    p.add_argument("--out", metavar="DIR", help="for a report of several runs [runs/report]")
    a = p.parse_args(argv)
    folders = chosen(a.runs)
    if len(folders) == 1 and not a.out:
        report(folders[0])
        terminal.result(pictures.summary(folders[0]))
        terminal.result(str(folders[0] / "index.html"))
        return
    out = Path(a.out or "runs/report")
    terminal.result(compare(folders, out))
    terminal.result(f"{out}/  index.html  curves.png  table.md")


if __name__ == "__main__":
    cli.guard(main)
