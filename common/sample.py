"""Pictures from a trained run.

    python -m common.sample RUN                        # RUN/grid.png, of 64
    python -m common.sample RUN --n 1000 --out FOLDER  # single PNGs
"""
import argparse
from pathlib import Path

import torch

from common import data, terminal

COLUMNS = 8  # of the grids in a run folder, which are as high as wide
GAP = 2  # pixels between the images of a grid
CHUNK = 256


def draw(sample, nets, args, z):
    """uint8 images [N, C, H, W] for latents z, in pieces, as `sample` of a script makes them."""
    return torch.cat([data.to_uint8(sample(nets, args, part)).cpu() for part in z.split(CHUNK)])


def picture(image):
    """PIL image of one uint8 [C, H, W], grey for one channel and RGB for three."""
    from PIL import Image

    array = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return Image.fromarray(array.contiguous().numpy())


def zoom(size):
    """How many times the pixels of a small image are enlarged in a grid, for eyes."""
    return max(1, 64 // size)


def grid(images, columns=COLUMNS):
    """PIL image of uint8 images [N, C, H, W] in rows of that many columns, small ones enlarged."""
    from PIL import Image

    n, c, h, w = images.shape
    k = zoom(h)
    rows = -(-n // columns)
    sheet = Image.new("L" if c == 1 else "RGB", (columns * (w * k + GAP) + GAP, rows * (h * k + GAP) + GAP), "black")
    for i, image in enumerate(images):
        at = (GAP + i % columns * (w * k + GAP), GAP + i // columns * (h * k + GAP))
        sheet.paste(picture(image).resize((w * k, h * k), Image.Resampling.NEAREST), at)
    return sheet


def _command(argv=None):
    from common import run

    p = run.Parser(prog="python -m common.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", metavar="RUN", help="run folder")
    p.add_argument("--n", type=int, default=64, help="how many images [64]")
    p.add_argument("--seed", type=int, default=0, help="of the latents [0]")
    p.add_argument("--out", metavar="FOLDER", help="write single PNGs there instead of one grid")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto [cpu]")
    a = p.parse_args(argv)
    if a.n < 1:
        raise ValueError(f"--n must be positive, got {a.n}")
    run.device_of(a)
    nets, args, script = run.load(a.run, a.device)
    images = draw(script.sample, nets, args, script.latents(a.n, args, torch.Generator().manual_seed(a.seed)))
    if not a.out:
        path = Path(a.run) / "grid.png"
        grid(images, min(a.n, COLUMNS if a.n <= 64 else round(a.n**0.5))).save(path)
        print(path)
        return
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(terminal.track(images, "writing", len(images))):
        picture(image).save(out / f"{i:06d}.png")
    terminal.close()
    print(out)


if __name__ == "__main__":
    from common.run import guard

    guard(_command)
