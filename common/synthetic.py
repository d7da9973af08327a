"""Data that need no download: sets drawn here, the same on every run whatever --seed is.

    digits(n, seed)            28 x 28 grey digits, white on black like MNIST, with labels
    blueprints(n, seed, size)  pairs: a label map, and the front of a house rendered from it
    stripes(n, seed, size)     pairs: solids in a room, plain and striped

A digit starts as a glyph of Pillow's built-in font, kept as a distance to its outline rather than
as pixels: a stroke of any width, soft or sharp, is then one threshold away, and a few hundred
thousand of them are one grid_sample. Houses and solids are inequalities between coordinates,
asked for all pixels of SCENES pictures at once.
"""
import functools
import hashlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from common import terminal

SIZE = 28  # pixels, as MNIST
CLASSES = 10
MASTER = 96  # pixels of the square in which a glyph is kept
TALL = 64  # pixels of its height there, which leaves room for thick strokes
CHUNK = 1000  # images drawn at once; part of what determines them
SCENES = 20  # the same for blueprints and stripes, whose pictures are larger
VERSION = 1  # of the drawing; raise it with every change that alters a pixel

# classes of a label map, and their colours there
SKY, WALL, ROOF, WINDOW, SHUTTER, DOOR, BALCONY, CORNICE, SILL, STREET = range(10)
LABELS = "0d1b3e 2654a0 78284a 56ccf2 6f5ec4 eb5e55 faa348 f4eca6 98e6a8 464c5c"
PLASTER = "ceb28a ded0b4 c48062 9e4a3a b0b8ba d6b05c a8b696 98acc4 e2b8aa 786860"


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


def blueprints(n, seed, size=64):
    """n houses -> label maps and pictures of them, both uint8 [n, 3, size, size].

    The label map has the 10 colours of LABELS and says where everything is; colours, light and
    texture of the picture vary freely. All of it follows from seed alone; fewer houses are a prefix
    of more, and other sizes show the same houses.
    """
    return _scenes("blueprints", _house, n, seed, size)


def stripes(n, seed, size=64):
    """n scenes -> plain and striped, both uint8 [n, 3, size, size], row i of both the same scene.

    One to three solids in a room; only their stripes differ, which run across each solid and are
    determined by its outline. All of it follows from seed alone, as for blueprints.
    """
    return _scenes("stripes", _solids, n, seed, size)


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


# ---- blueprints and stripes: lengths are shares of the picture, x to the right, y down ----


def _scenes(name, draw, n, seed, size):
    pictures = torch.empty(2, n, 3, size, size, dtype=torch.uint8)
    for first in range(0, n, SCENES):
        pair = draw(_Dice(generator(name, seed, first)), 2 * size)
        for whole, part in zip(pictures, pair):
            if part.is_floating_point():  # [0, 1], at twice the size: edges get smooth
                part = (F.avg_pool2d(part, 2).clamp(0, 1) * 255).round()
            whole[first : first + SCENES] = part[: n - first]
        terminal.progress(f"drawing {name} {min(first + SCENES, n)}/{n}")
    return tuple(pictures)


class _Dice:
    """Random numbers for SCENES pictures, shaped to go with their pixels."""

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, low, high, *shape):
        return low + (high - low) * torch.rand(SCENES, *(shape or (1, 1)), generator=self.draw)

    def happens(self, share):
        return self(0, 1) < share

    def colour(self, choice, jitter):
        """[SCENES, 3, 1, 1] in [0, 1]: one of the colours for each picture, moved up to jitter."""
        colours = _colours(choice)
        which = torch.randint(len(colours), (SCENES,), generator=self.draw)
        return (colours[which, :, None, None] / 255 + self(-jitter, jitter, 3, 1, 1)).clamp(0, 1)

    def noise(self, down, across, size, mode="bicubic"):
        """Noise [SCENES, 1, size, size] of unit spread at down x across knots."""
        knots = torch.randn(SCENES, 1, down, across, generator=self.draw)
        return F.interpolate(knots, size, mode=mode)


def _colours(text):
    return torch.tensor([list(bytes.fromhex(word)) for word in text.split()], dtype=torch.uint8)


def _axes(size):
    axis = (torch.arange(size) + 0.5) / size
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def _house(dice, size):
    at = _layout(dice, size)
    labels = _colours(LABELS)[at.classes[:, ::2, ::2].long()].movedim(-1, 1)
    return labels, _photograph(dice, at)


def _layout(dice, size):
    """Classes of all pixels, [SCENES, size, size], and where each pixel lies in its cell."""
    x, y = _axes(size)
    left, right = dice(-0.02, 0.1), 1 - dice(-0.02, 0.1)
    ridge = dice(0.05, 0.14)
    eaves, street = ridge + dice(0.03, 0.13), dice(0.91, 0.96)
    floors, columns = dice(2, 5).floor(), dice(3, 6).floor()
    ground = street - (street - eaves) / (floors + 1) * dice(0.9, 1.2)  # where its floor begins
    top = eaves + dice(0.018, 0.034)
    narrow = dice(0.17, 0.27)  # half of a window's width, in cells
    above, below = dice(0.16, 0.28), dice(0.76, 0.84)  # ends of a window, in floors
    arch = dice(0.06, 0.16) * dice.happens(0.35)
    shutters, shops, belts, dormers = (dice.happens(share) for share in (0.35, 0.4, 0.5, 0.5))
    balconies = dice(0, 0.6) * dice.happens(0.65)  # their share of the windows

    across = (x - left) / (right - left) * columns
    column, on_ground = across.floor().clamp(0, 7), y >= ground
    down = (y - top) / (ground - top) * floors
    floor = torch.where(on_ground, floors, down.floor().clamp(0, 7))
    u = across - column - 0.5
    v = torch.where(on_ground, (y - ground) / (street - ground), down - floor)
    cell = (floor * 8 + column).long().flatten(1)
    chance = dice(0, 1, 64).gather(1, cell).view(-1, size, size)  # one number for each cell

    front = (across >= 0) & (across < columns) & (y >= top) & (y < street)
    upstairs, roof = front & ~on_ground, (y > ridge) & (y < eaves)
    door = front & on_ground & (column == (dice(0, 1) * columns).floor())
    half = torch.where(door, 0.24, torch.where(on_ground & shops, 0.38, narrow))
    head, foot = torch.where(door, 0.2, above), torch.where(door, 1.0, below)
    pane = (u.abs() < half) & (v > head + arch * (u / half).square()) & (v < foot)
    window = front & (on_ground | (chance > 0.07)) & ~door
    ends = (x - left).minimum(right - x) + 0.015
    loft = (u.abs() < 0.15) & (column % 2 == 1) & (y > 0.6 * ridge + 0.4 * eaves)
    beside = (u.abs() < 0.47) & (u.abs() < 1.8 * half) & (v > head + arch) & (v < foot)
    belt = belts & (floor > 0) & (v < 0.07)
    chimney = ((x - dice(0.15, 0.85)).abs() < 0.03) & (y > ridge - 0.045) & (y < eaves)
    ledge = (y >= eaves) & (y < top) | (y >= ground - 0.6 * (top - eaves)) & (y < ground)

    classes = torch.full((SCENES, size, size), SKY)
    for kind, where in (
        (WALL, chimney),
        (ROOF, roof & (ends > dice(0, 1.2) * (eaves - y))),
        (WINDOW, roof & dormers & loft),
        (WALL, front),
        (SHUTTER, window & upstairs & shutters & beside),
        (CORNICE, upstairs & belt),
        (WINDOW, window & pane),
        (SILL, window & (u.abs() < half + 0.05) & (v >= foot) & (v < foot + 0.07)),
        (DOOR, door & pane),
        (CORNICE, (ends > 0) & ledge),
        (STREET, y >= street),
    ):
        classes.masked_fill_(where, kind)
    balcony = window & upstairs & (chance < 0.07 + balconies) & (u.abs() < half + 0.13)
    behind = classes
    classes = classes.masked_fill(balcony & (v > foot - 0.26) & (v < foot + 0.07), BALCONY)
    bar = 0.006 * columns / (right - left)  # half of a glazing bar, in cells
    return SimpleNamespace(**locals())


def _photograph(dice, at):
    """Pictures [SCENES, 3, size, size] in [0, 1]: paint, detail, shadows, then light and noise."""
    wanted = at.u, at.v, at.x, at.y, at.across, at.half, at.head, at.foot, at.bar, at.chance
    u, v, x, y, across, half, head, foot, bar, chance = (t.unsqueeze(1) for t in wanted)
    kind, size, off_centre = at.behind.unsqueeze(1), at.size, u.abs()
    wall, white = dice.colour(PLASTER, 0.05), dice.colour("eee8dc d6cebe c4beb8", 0.03)
    paint = dice.colour("3e5c4e 344a70 703a2e 545458 8c6842", 0.03)
    sky = dice.colour("70a4dc a4bcd4 cad0d6 eec496", 0.03)
    slate = dice.colour("603e34 525864 8e523c 403e42", 0.03)
    glass, road = (dice.colour(c, 0.02) for c in ("2c384a 3e4850 222834", "807e7a 68686a 928a7e"))
    frame = torch.where(dice.happens(0.7).unsqueeze(1), white, paint)

    def striped(t, period, share):
        return ((t / period) % 1 < share).float()

    stone, seam = dice.noise(32, 16, size, "nearest"), striped(y, 1 / 32, 0.3)
    stains = 1 + 0.035 * dice.noise(6, 6, size) - 0.16 * (y - 0.75).clamp(min=0)
    bricks = stains + dice(0, 0.1).unsqueeze(1) * (0.6 * stone - 1.2 * seam)
    mirror = (0.5 + 1.5 * (u - v + 0.4) + 4 * (chance - 0.5)).clamp(0, 1)
    pane = glass + 0.45 * (sky - glass) * mirror
    lamp = _colours("f5c773")[0].view(3, 1, 1) / 255 * (1.05 - 0.35 * v)
    panels = ((off_centre - 0.12).abs() < 0.07) & ((v - 0.65).abs() < 0.27)
    rim = half - off_centre < 2.2 * bar
    bars = rim | (off_centre < bar) | ((v - 0.62 * head - 0.38 * foot).abs() < 0.03)
    curtains = (chance * 17 % 1 > 0.5) & (off_centre > 0.55 * half)
    rails = (striped(across, 1 / 9, 0.4) > 0) | (v < foot - 0.21)
    window, door, balcony = kind == WINDOW, kind == DOOR, (at.classes == BALCONY).unsqueeze(1)

    clouds = 0.08 * dice.noise(5, 5, size) + 0.05 * dice.noise(11, 11, size)
    picture = sky + (1 - sky) * (0.55 * y + clouds).clamp(0, 1)
    for where, colour in (
        (kind == WALL, wall * bricks),
        (kind == ROOF, slate * (0.9 + 0.25 * stone.abs() * (1 - seam)) * stains),
        (kind == SHUTTER, paint * (1 - 0.25 * striped(v, 1 / 12, 0.4))),
        (kind == CORNICE, white * stains),
        (kind == SILL, white * 0.95),
        (kind == STREET, road * (stains + 0.04 * stone)),
        (window, pane),
        (window & curtains, 0.5 * pane + 0.5 * white),
        (window & (chance * 37 % 1 > 0.88), lamp),
        (window & bars, frame),
        (door, paint * 0.75),
        (door & panels, paint * 1.05),
        (door & rim, frame),
        (balcony & rails, paint * 0.35),
        (balcony & (v > foot + 0.01), white * 0.92),
    ):
        picture = torch.where(where, colour, picture)

    # what stands out of the wall is lit from above and throws a shadow to the lower right
    height = torch.tensor([-9, 0, 0.4, -0.8, 0.3, -0.8, 0.9, 1, 0.6, 0])[at.classes].unsqueeze(1)
    reach, solid = size // 32, height > -5

    def moved(right, below):
        return F.pad(height, (right, 0, below, 0), mode="replicate")[..., :size, :size]

    shade = F.avg_pool2d((moved(reach // 2, reach) - height).clamp(0, 1) * solid, 3, 1, 1)
    picture = picture * (1 - 0.55 * shade) + 0.12 * (height - moved(0, 1)).clamp(0, 1) * solid
    picture = picture * (dice(0.85, 1.12) + dice(-0.25, 0.25) * (at.x - 0.5)).unsqueeze(1)
    picture = picture * (1 + dice(-0.04, 0.04, 1, 1, 1) * torch.tensor([1.0, 0, -1]).view(3, 1, 1))
    return picture + 0.025 * torch.randn(SCENES, 1, size, size, generator=dice.draw)


def _solids(dice, size):
    x, y = _axes(size)
    floor, back = dice.colour(PLASTER, 0.06), dice.colour("5c8480 787496 968e7e 586e8e", 0.06)
    depth = (y - dice(0.5, 0.7)).unsqueeze(1)  # below the far edge of the floor
    room = torch.where(depth > 0, floor * (0.65 + 0.5 * depth), back * (0.8 + 0.4 * y.unsqueeze(1)))
    plain = striped = room * (1 + 0.03 * dice.noise(6, 6, size))
    shift = dice(0, 3).floor()
    for i, share in enumerate((1.0, 0.7, 0.4)):
        here, wide, angle = dice.happens(share), dice(0.11, 0.16), dice(-0.5, 0.5)
        tall = wide * dice(1.25, 1.6)  # never round, so that the outline tells the stripes
        power = 2 * torch.exp2(dice(0, 1.2))  # from an ellipse to nearly a brick
        third = (shift + i) % 3 - 1  # side by side, so that few hide another
        right = x - 0.5 - 0.29 * third - dice(-0.06, 0.06)
        below = y - 0.3 - 0.18 * i - dice(-0.04, 0.1)
        u = (angle.cos() * right + angle.sin() * below) / wide
        v = (angle.cos() * below - angle.sin() * right) / tall
        inside = (here & (u.abs() ** power + v.abs() ** power < 1)).unsqueeze(1)
        foot = (right / wide).square() + (below / tall / 0.3 - 3).square()
        shadow = (1 - 0.45 * here * torch.exp(-4 * (foot - 0.4).clamp(min=0))).unsqueeze(1)
        light = (1.1 - 0.35 * (u + 0.45).square() - 0.3 * (v + 0.45).square()).clamp(min=0.35)
        colour = dice.colour("de5c46 eeb048 68b270 5494d6 ce78b2 e8e2d4", 0.06)
        dark = (torch.cos(9 * v + 0.5 * u.square()) < -0.1).unsqueeze(1)
        colour = colour * light.unsqueeze(1)
        plain = torch.where(inside, colour, plain * shadow)
        striped = torch.where(inside, torch.where(dark, 0.15 * colour, colour), striped * shadow)
    grain = 0.02 * torch.randn(SCENES, 1, size, size, generator=dice.draw)
    return plain + grain, striped + grain
