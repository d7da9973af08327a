"""Pictures from a trained run.

    python -m common.sample RUN                              # RUN/grid.png, of 64
    python -m common.sample RUN --n 1000 --out FOLDER        # single PNGs
    python -m common.sample RUN --interpolate 8              # RUN/interpolate.png, 8 steps a row
    python -m common.sample RUN --between a.png b.png        # RUN/between.png, of two encoded
    python -m common.sample RUN --input PHOTOS --out FOLDER  # image to image: translations

Translations have the names and sizes of their inputs, which are extended by reflection to what
the network takes and cropped back. The folder --out must be empty or new: nothing is mixed.
"""
import collections
import inspect
from pathlib import Path

import numpy as np
import torch

from common import cli, data, files, folders, machine, pictures, run, terminal

CHUNK = 256  # images sampled at a time
SPREAD = 4  # pictures of a spread are that many times as bright as the spread


def to_tensor(picture):
    """Pillow image -> float [1, C, H, W] in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(picture))
    return data.to_float(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()))


def opened(path, channels):
    """Pillow image of any file, grey for one channel, else RGB; ValueError names what cannot be."""
    try:
        picture = folders.opened(Path(path).read_bytes())
    except Exception as e:  # Pillow's readers raise anything at a broken file
        raise ValueError(f"{path} cannot be read as a picture: {files.first_line(e)}") from None
    return picture.convert("L") if channels == 1 else picture


def drawn(nets, args, script, z):
    """uint8 images [N, C, H, W] for latents z, in pieces."""
    pieces = terminal.track(z.split(CHUNK), "sampling")
    return torch.cat([data.to_uint8(script.sample(nets, args, part)).cpu() for part in pieces])


def generated(a, nets, args, script):
    """(name, uint8 images, columns of their grid) of an image GAN, as the command line a asks."""
    if a.input or a.direction or a.dropout or a.draws > 1:
        wrong = "--input, --direction, --dropout and --draws are for image to image"
        raise ValueError(f"{wrong}; {script.__name__}.py takes no pictures in")
    rng = torch.Generator().manual_seed(a.seed)
    path = torch.linspace(0, 1, a.interpolate or 8).tolist()
    if a.between:
        if not hasattr(script, "encode"):
            raise ValueError(f"--between needs an encoder, which {script.__name__}.py has not")
        ends = [folders.square(opened(p, args.channels), args.image_size) for p in a.between]
        x = torch.cat([to_tensor(end) for end in ends])
        try:
            first, last = script.encode(nets, args, x).cpu().split(1)
        except KeyError as e:
            raise ValueError(f"{a.run} has no checkpoint.pt, and with it no network {e}") from None
        z = torch.cat([script.between(first, last, t) for t in path])
        x, images = data.to_uint8(x), drawn(nets, args, script, z)
        return "between", torch.cat([x[:1], images, x[1:]]), len(path) + 2
    if a.interpolate:
        first, last = script.latents(2 * (a.n or 8), args, rng).chunk(2)
        z = torch.stack([script.between(first, last, t) for t in path], 1)
        return "interpolate", drawn(nets, args, script, z.flatten(0, 1)), len(path)
    n = a.n or 64
    columns = pictures.COLUMNS if n <= 64 else round(n**0.5)
    return "grid", drawn(nets, args, script, script.latents(n, args, rng)), columns


def translate(a, nets, args, script, out):
    """Write the translation of every picture under a.input to out; returns a line about them."""
    takes = inspect.signature(script.sample).parameters
    options = {"direction": a.direction, "dropout": a.dropout and a.dropout == "on"}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in takes:
            raise ValueError(f"--{name} is nothing that {script.__name__}.py can choose")
    if a.draws > 1 and not options.get("dropout", "dropout" in takes):
        raise ValueError("--draws needs the noise of dropout; without it all draws are the same")
    layers = nets["generator_ema"].modules()
    channels = next(m.in_channels for m in layers if hasattr(m, "in_channels"))
    multiple = getattr(script, "multiple", lambda args: args.image_size)(args)
    root, names = listing(a.input)
    taken = collections.Counter(name.with_suffix("") for name in names)
    spreads, done = [], 0
    for name in terminal.track(names, "translating"):
        try:
            x = to_tensor(opened(root / name, channels))
        except ValueError as e:
            terminal.warn(str(e))
            continue
        x, (top, left, height, width) = extended(x, multiple, args.image_size)
        torch.manual_seed(a.seed)  # so that a picture's draws are its own, whatever lies beside it
        ys = [script.sample(nets, args, x, **options).cpu() for _ in range(a.draws)]
        ys = torch.cat(ys)[:, :, top : top + height, left : left + width]
        path = out / (name.with_suffix("") if taken[name.with_suffix("")] == 1 else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        images = {f"-{i + 1}" if a.draws > 1 else "": y for i, y in enumerate(data.to_uint8(ys))}
        if a.draws > 1:
            spread = 127.5 * ys.std(0, correction=0).mean(0, keepdim=True)
            spreads.append(spread.mean().item())
            images["-spread"] = (SPREAD * spread).round().clamp(max=255).to(torch.uint8)
        for end, image in images.items():
            pictures.to_picture(image).save(path.with_name(f"{path.name}{end}.png"))
        done += 1
    if not done:
        raise ValueError(f"--input {a.input} holds no picture that can be read")
    told = f", mean spread {np.mean(spreads):.2f} of 255" if spreads else ""
    return f"{out}  {done} translated{told}"


def listing(path):
    """(folder, names below it) of the pictures that path is or holds."""
    from PIL import Image

    path = Path(path)
    if path.is_file():
        return path.parent, [Path(path.name)]
    if not path.is_dir():
        raise ValueError(f"--input {path} is not there")
    known = {end for end, kind in Image.registered_extensions().items() if kind in folders.FORMATS}
    names = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in known)
    return path, [n for n in names if not any(part.startswith(".") for part in n.parts)]


def extended(x, multiple, least):
    """x reflected at its rims to the next multiple, and (top, left, height, width) of x in it.

    least: height and width at least, those of training, below which networks can fail.
    """
    height, width = x.shape[2:]
    wanted = [-(-max(length, least) // multiple) * multiple for length in (height, width)]
    more = [w - length for w, length in zip(wanted, (height, width))]
    rims = [(m // 2, m - m // 2) for m in more]
    x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *rims], "reflect"))
    return x, (rims[0][0], rims[1][0], height, width)


def main(argv=None):
    p = cli.Parser(prog="python -m common.sample", description=__doc__)
    add = p.add_argument
    add("run", metavar="RUN", help="run folder")
    add("--n", type=int, help="how many images [64], or rows of --interpolate [8]")
    add("--seed", type=int, default=0, help="of latents and dropout [0]")
    add("--out", metavar="FOLDER", help="write single PNGs there instead of one grid")
    add("--interpolate", type=int, metavar="STEPS", help="between pairs of latents, a row each")
    add("--between", nargs=2, metavar="PICTURE", help="from one encoded picture to another")
    add("--input", metavar="PATH", help="a picture, or a folder of them, to translate")
    add("--direction", choices=("AtoB", "BtoA"), help="of a translation both ways [AtoB]")
    add("--dropout", choices=("on", "off"), help="noise of the translation [on]")
    add("--draws", type=int, default=1, help="translations of each picture, with their spread [1]")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, auto [cpu]")
    a = p.parse_args(argv)
    for name, least in (("n", 1), ("draws", 1), ("interpolate", 2), ("seed", 0)):
        value = getattr(a, name)
        if value is not None and not least <= value < 2**63:
            raise ValueError(f"--{name} must be at least {least} and fit 63 bits, got {value}")
    out = a.out and Path(a.out)
    if out and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; name a new folder, so that nothing is mixed")
    machine.exact()
    nets, args, script = run.load(a.run, str(machine.device_of(a.device)))

    if not hasattr(script, "latents"):
        if not (a.input and out) or a.n or a.interpolate or a.between:
            raise ValueError(f"{script.__name__}.py translates: give --input and --out, no latents")
        terminal.result(translate(a, nets, args, script, out))
        return
    name, images, columns = generated(a, nets, args, script)
    if not out:
        path = Path(a.run) / f"{name}.png"
        pictures.save(pictures.grid(images, columns), path)
        terminal.result(str(path))
        return
    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(terminal.track(images, "writing", len(images))):
        pictures.to_picture(image).save(out / f"{i:06d}.png")
    terminal.result(str(out))


if __name__ == "__main__":
    cli.guard(main)
