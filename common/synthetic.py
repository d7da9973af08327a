"""Data that need no download: sets drawn here, the same on every run whatever --seed is.

    digits(n, seed)    28 x 28 grey digits, white on black like MNIST, with labels

A digit starts as a glyph of Pillow's built-in font, kept as a distance to its outline rather than
as pixels: a stroke of any width, soft or sharp, is then one threshold away, and a few hundred
thousand of them are one grid_sample.
"""
import functools
import hashlib

import torch
import torch.nn.functional as F

from common import terminal

SIZE = 28  # pixels, as MNIST
CLASSES = 10
MASTER = 96  # pixels of the square in which a glyph is kept
TALL = 64  # pixels of its height there, which leaves room for thick strokes
CHUNK = 1000  # images drawn at once; part of what determines them
VERSION = 1  # of the drawing; raise it with every change that alters a pixel


def digits(n, seed):
    """n digits -> images uint8 [n, 1, 28, 28], labels int64 [n].

    Label i is i % 10, so any stretch is balanced; fewer images are a prefix of more; no two are
    alike. All of it follows from seed alone, not from torch's own generator or thread count.
    """
    field = _glyphs()
    images = torch.empty(n, 1, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.arange(n) % CLASSES
    seen = set()
    for first in range(0, n, CHUNK):
        part = _draw(field, torch.arange(first, first + CHUNK) % CLASSES, generator(seed, first))
        for i, image in enumerate(part[: n - first], first):
            tries = 0
            while (content := image.numpy().tobytes()) in seen:
                tries += 1
                image = _draw(field, labels[i : i + 1], generator(seed, i, tries))[0]
            seen.add(content)
            images[i] = image
        terminal.progress(f"drawing digits {min(first + CHUNK, n)}/{n}")
    return images, labels


# ---- blueprints and stripes, for image to image, come here ----


def generator(*numbers):
    """A generator of its own for each tuple of whole numbers; (0, 1) and (1, 0) differ."""
    # hashed, because torch keeps only 32 bits of a seed
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@functools.cache
def _glyphs():
    """[10, 1, MASTER, MASTER]: distance to the outline in glyph heights, positive inside."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(TALL / 0.7)  # digits of this font are 0.7 of its size in height
    y, x = torch.meshgrid(torch.arange(MASTER), torch.arange(MASTER), indexing="ij")
    pixels = torch.stack([y, x], -1).view(-1, 2).float()
    fields = []
    for digit in range(CLASSES):
        picture = Image.new("L", (MASTER, MASTER))
        ImageDraw.Draw(picture).text((MASTER / 2, MASTER / 2), str(digit), 255, font, anchor="mm")
        left, top, right, bottom = picture.getbbox()
        centred = Image.new("L", (MASTER, MASTER))
        centred.paste(picture, ((MASTER - left - right) // 2, (MASTER - top - bottom) // 2))
        ink = torch.tensor(list(centred.tobytes())).view(1, MASTER, MASTER) > 127
        # the nearest pixel of a kind is always one on its rim, and rims are few
        rims = [F.max_pool2d((~kind).float(), 3, 1, 1).bool() & kind for kind in (ink, ~ink)]
        to_ink, to_paper = (torch.cdist(pixels, pixels[rim.view(-1)]).amin(1) for rim in rims)
        fields.append(torch.where(ink.view(-1), to_paper, -to_ink) / (bottom - top))
    return torch.stack(fields).view(CLASSES, 1, MASTER, MASTER)


def _draw(field, labels, draw):
    """One image for each label, uint8 [len(labels), 1, 28, 28]. Lengths are pixels of the image."""
    n = len(labels)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=draw)

    def waves(points, amplitude):  # smooth noise, three fields for each image
        knots = torch.randn(n, 3, points, points, generator=draw).clamp(-2, 2) * amplitude
        return F.interpolate(knots, SIZE, mode="bicubic", align_corners=True)

    height = uniform(16, 21)
    stretch = torch.exp2(uniform(-0.25, 0.3))  # width over the font's own
    stretch[labels == 1] *= 0.75  # its flag, drawn wide, would make a 7 of it
    angle = uniform(-1, 1) * uniform(0, 0.35)  # radians
    shear = uniform(-0.2, 0.4)  # more to the right, as most people write
    wide = height * (0.75 * stretch + shear.abs() + angle.abs())  # 0.75 for 4, the widest
    room = (0.5 * (SIZE - 3 - wide)).clamp(0, 2.5)  # before the border would cut a stroke
    right, down = uniform(-1, 1) * room, uniform(-2, 2)
    stroke = uniform(-0.45, 0.8)  # added on either side of the font's own
    softness = uniform(0.9, 1.9)  # width of an edge
    white = uniform(165, 255)
    wave = waves(4, 0.85) + waves(7, 0.25)

    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    x = axis.view(1, 1, -1) - right.view(-1, 1, 1) + wave[:, 0]
    y = axis.view(1, -1, 1) - down.view(-1, 1, 1) + wave[:, 1]
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    u, v = cos * x + sin * y, cos * y - sin * x
    u = (u + shear.view(-1, 1, 1) * v) / (height * stretch).view(-1, 1, 1)
    v = v / height.view(-1, 1, 1)
    grid = torch.stack([u, v], -1) * (2 * TALL / MASTER)
    inside = F.grid_sample(field[labels], grid, padding_mode="border", align_corners=False)
    inside = inside * (height * stretch.sqrt()).view(-1, 1, 1, 1)
    pressure = stroke.view(-1, 1, 1, 1) + 0.3 * wave[:, 2:]
    ink = (0.5 + (inside + pressure) / softness.view(-1, 1, 1, 1)).clamp(0, 1)
    return (ink * white.view(-1, 1, 1, 1)).round().to(torch.uint8)
