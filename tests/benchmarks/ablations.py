"""What each part of pix2pix and of CycleGAN does: the papers' ablations, as a table and a picture.

    python -m tests.benchmarks.ablations pix2pix --steps 1000
    python -m tests.benchmarks.ablations cyclegan --steps 1000
    python -m tests.benchmarks.ablations pix2pix --dataset facades --direction BtoA --steps 1000

Every setting is trained by the script's own command line, one after the other, each in a process of
its own; what is not named here goes to all of them. A run that has ended in --out-dir with the same
arguments is not made again. The picture has the same test images in each row, as found; of cyclegan
the last is the one whose translation by the whole method is farthest from its true counterpart, if
that is known. --picture keeps those of several data sets apart.
"""
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from common import cli, data, files, pictures, run, terminal

ROOT = Path(__file__).parents[2]
WHOLE = "whole"
ABLATIONS = {  # of a script: its settings, by what stands above them in the picture
    "pix2pix": {
        "L1": "--lambda-adv 0",
        "cGAN": "--lambda-l1 0",
        "L1+cGAN": "",
        "L1+GAN": "--condition off",
        "no skips, L1": "--skips off --lambda-adv 0",
        "no skips, L1+cGAN": "--skips off",
    },
    "cyclegan": {
        WHOLE: "",
        "A-B-A": "--lambda-cycle-b 0",
        "B-A-B": "--lambda-cycle 0 --lambda-cycle-b 10",
        "no cycle": "--lambda-cycle 0",
        "idt 0": "--lambda-identity 0",
        "no skip": "--skip off",
        "no skip, idt 0": "--skip off --lambda-identity 0",
    },
}
ROWS = 6


def trained(script, setting, words, out_dir):
    """The run folder of one setting, made where it is not there yet; None where it failed."""
    words = [*words, *ABLATIONS[script][setting].split()]
    out = Path(out_dir) / script / setting.replace(", ", "-").replace(" ", "-")
    note, said = out / "words.json", shlex.join(words)
    made = json.loads(note.read_text()) if note.exists() else {}
    if said in made and (out / made[said] / "generator.pt").exists():
        return out / made[said]
    terminal.note(f"{setting}: {script}.py {said}")
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    words = [f"{script}.py", *words, "--sample-every", "0", "--out-dir", str(out), "--quiet"]
    if subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        return None
    (folder,) = set(out.iterdir()) - before
    files.write_atomic(note, json.dumps(made | {said: folder.name}, indent=1).encode())
    return folder


# ---- the table -------------------------------------------------------------------------------


def table(folders):
    """Lines in Markdown of the last metrics of runs, {name: folder}, under those of the baselines."""
    found = {name: json.loads((f / "metrics.json").read_text()) for name, f in folders.items()}
    last = list(found.values())[-1]
    rows = {**last["baselines"], **found}
    columns = [k for k, v in last.items() if isinstance(v, float) and k != "seconds"]
    lines = [["", "updates", *columns], ["---"] * (len(columns) + 2)]
    for name, row in rows.items():
        values = [f"{row[k]:.4g}" if k in row else "" for k in columns]
        lines.append([name, f"{row.get('step', '')}", *values])
    return ["| " + " | ".join(line) + " |" for line in lines]


# ---- the picture -----------------------------------------------------------------------------


def of_test_split(script, args):
    """[(direction, inputs, true counterparts or None), ...] of the test split, in [-1, 1]."""
    at = args.dataset, args.data_dir, args.image_size, args.cache_dir
    if script == "pix2pix":
        pairs = data.load_pairs(*at)
        a, b = data.to_float(pairs.test.images).split(pairs.channels, 1)
        return [("", *((a, b) if args.direction == "AtoB" else (b, a)))]
    found = []
    for way, images in zip(("AtoB", "BtoA"), data.load_domains(*at)):
        true = images.counterpart
        true = None if true is None else data.to_float(true)
        found.append((way, data.to_float(images.test.images), true))
    return found


def translated(folder, x, way):
    nets, args, script = run.load(folder)
    torch.manual_seed(0)  # of dropout
    parts = [script.sample(nets, args, part, *[way][: bool(way)]) for part in x.split(64)]
    return torch.cat(parts)


def strip(images, text):
    """One column of images under its text; grey among colours as colour."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return pictures.captioned(pictures.to_sheet(images.unsqueeze(1)), text)


def picture(script, folders, rows):
    """PIL image: a column for the input, each setting and the truth; a block for each direction."""
    args = run.load(next(iter(folders.values())))[1]
    blocks = []
    for way, x, true in of_test_split(script, args):
        picked = torch.arange(min(rows, len(x)))
        if true is not None and WHOLE in folders and script == "cyclegan":
            errors = (translated(folders[WHOLE], x, way) - true).abs().flatten(1).mean(1)
            picked[-1] = errors.argmax()
        x, true = x[picked], None if true is None else true[picked]
        columns = [strip(x, way or "input")]
        columns += [strip(translated(f, x, way), name) for name, f in folders.items()]
        columns += [] if true is None else [strip(true, "truth")]
        lower = max(c.height for c in columns)
        columns = [on_ground(c, lower) for c in columns]
        blocks.append(pictures.sheet(columns, len(columns)))
    return pictures.sheet(blocks, 1)


def on_ground(image, height):
    """The image at the foot of a white one of that height."""
    from PIL import Image

    whole = Image.new("RGB", (image.width, height), "white")
    whole.paste(image, (0, height - image.height))
    return whole


# ---- the command -----------------------------------------------------------------------------


def arguments(argv):
    p = cli.Parser(prog="python -m tests.benchmarks.ablations", description=__doc__)
    p.add_argument("script", choices=list(ABLATIONS))
    p.add_argument("--only", help="settings by their names, separated by ; [all]")
    p.add_argument("--rows", type=int, default=ROWS, help=f"images of the picture [{ROWS}]")
    p.add_argument("--out-dir", default="runs/ablations", help="[runs/ablations]")
    p.add_argument("--picture", metavar="FILE", help="[SCRIPT.png in --out-dir]")
    a, a.words = p.parse_known_args(argv)
    known = ABLATIONS[a.script]
    a.settings = a.only.split(";") if a.only else list(known)
    for name in a.settings:
        if name not in known:
            raise ValueError(f"--only has {name}; {a.script} has {'; '.join(known)}")
    if a.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {a.rows}")
    for name in a.settings:  # bad words are told before anything trains
        cli.parse(importlib.import_module(a.script).Args, [*a.words, *known[name].split()])
    return a


def main(argv=None):
    """Train what is missing, print the table, save the picture; returns its path."""
    a = arguments(argv)
    folders = {name: trained(a.script, name, a.words, a.out_dir) for name in a.settings}
    failed = [name for name, folder in folders.items() if folder is None]
    if failed:
        raise cli.Diverged(f"failed: {', '.join(failed)}")
    terminal.result("\n".join(table(folders)))
    path = Path(a.picture or Path(a.out_dir) / f"{a.script}.png")
    pictures.save(picture(a.script, folders, a.rows), path)
    terminal.result(f"{path}")
    return path


if __name__ == "__main__":
    cli.guard(main)
