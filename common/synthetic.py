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

# classes of a label map and their colours there
SKY, WALL, ROOF, WINDOW, SHUTTER, DOOR, BALCONY, CORNICE, SILL, STREET = range(10)
LABELS = (
    (13, 27, 62), (38, 84, 160), (120, 40, 74), (86, 204, 242), (111, 94, 196),
    (235, 94, 85), (250, 163, 72), (244, 236, 166), (152, 230, 168), (70, 76, 92),
)  # fmt: skip
PLASTER = (
    (206, 178, 138), (222, 208, 180), (196, 128, 98), (158, 74, 58), (176, 184, 186),
    (214, 176, 92), (168, 182, 150), (152, 172, 196), (226, 184, 170), (120, 104, 96),
)  # fmt: skip


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

    The label map has the 10 colours of LABELS and determines where everything is; colours, light
    and texture of the picture vary freely. All of it follows from seed alone; fewer houses are a
    prefix of more, and other sizes show the same houses.
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
        pair = draw(_Dice(generator(name, seed, first)), size)
        for whole, part in zip(pictures, pair):
            whole[first : first + SCENES] = part[: n - first]
        terminal.progress(f"drawing {name} {min(first + SCENES, n)}/{n}")
    return tuple(pictures)


class _Dice:
    """Random numbers for SCENES pictures, shaped to go with [SCENES, size, size]."""

    def __init__(self, draw):
        self.draw = draw

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(SCENES, *(shape or (1, 1)), generator=self.draw)

    def whole(self, low, high):
        """low to high, both included, as floats."""
        return torch.randint(low, high + 1, (SCENES, 1, 1), generator=self.draw).float()

    def happens(self, share):
        return self.uniform(0, 1) < share

    def one_of(self, colours, jitter):
        """[SCENES, 3, 1, 1] in [0, 1]: a colour for each picture, moved by up to jitter."""
        which = torch.randint(len(colours), (SCENES,), generator=self.draw)
        colour = torch.tensor(colours)[which].view(-1, 3, 1, 1) / 255
        return (colour + self.uniform(-jitter, jitter, 3, 1, 1)).clamp(0, 1)

    def smooth(self, points, size):
        """Smooth noise [SCENES, 1, size, size] of unit spread at its points x points knots."""
        knots = torch.randn(SCENES, 1, points, points, generator=self.draw)
        return F.interpolate(knots, size, mode="bicubic", align_corners=True)


def _axes(size):
    axis = (torch.arange(size) + 0.5) / size
    return axis.view(1, 1, -1), axis.view(1, -1, 1)


def _bytes(picture, size):
    """[0, 1] at any multiple of size -> uint8 at size, so edges are antialiased."""
    return (F.adaptive_avg_pool2d(picture, size).clamp(0, 1) * 255).round().to(torch.uint8)


def _house(dice, size):
    plan = _plan(dice)
    classes = _parts(plan, size).classes.long()
    labels = torch.tensor(LABELS, dtype=torch.uint8)[classes].movedim(-1, 1)
    return labels, _bytes(_photograph(plan, dice, 2 * size), size)


def _plan(dice):
    """What decides the layout, each [SCENES, 1, 1]; of every cell, [SCENES, 8, 8]."""
    p = SimpleNamespace()
    p.left, p.right = dice.uniform(-0.02, 0.1), 1 - dice.uniform(-0.02, 0.1)
    p.ridge = dice.uniform(0.05, 0.14)  # from the top: ridge, eaves, ground floor, street
    p.eaves = p.ridge + dice.uniform(0.03, 0.13)
    p.street = dice.uniform(0.91, 0.96)
    p.floors, p.columns = dice.whole(2, 4), dice.whole(3, 5)
    p.ground = p.street - (p.street - p.eaves) / (p.floors + 1) * dice.uniform(0.9, 1.2)
    p.slope = dice.uniform(0, 1.2)  # of the roof's ends
    p.cornice = dice.uniform(0.018, 0.034)
    p.half = dice.uniform(0.17, 0.27)  # of a window's width, in cells
    p.head, p.foot = dice.uniform(0.16, 0.28), dice.uniform(0.76, 0.84)  # of a window, in floors
    p.arch = dice.uniform(0.06, 0.16) * dice.happens(0.35)
    p.shutters, p.shop, p.belts = dice.happens(0.35), dice.happens(0.4), dice.happens(0.5)
    p.dormers = dice.happens(0.5)
    p.balconies = dice.uniform(0, 0.6) * dice.happens(0.65)  # their share of the cells
    p.door = (dice.uniform(0, 1) * p.columns).floor()
    p.chimneys = [(dice.uniform(0.12, 0.88), dice.happens(0.5)) for _ in range(2)]
    p.chance = dice.uniform(0, 1, 8, 8)
    return p


def _parts(p, size):
    """Classes of all pixels, [SCENES, size, size], and where a pixel lies in its cell."""
    x, y = _axes(size)
    top = p.eaves + p.cornice
    across = (x - p.left) / (p.right - p.left) * p.columns
    down = (y - top) / (p.ground - top) * p.floors
    column, on_ground = across.floor().clamp(0, 7), y >= p.ground
    floor = torch.where(on_ground, p.floors, down.floor().clamp(0, 7))
    u = across - column - 0.5
    v = torch.where(on_ground, (y - p.ground) / (p.street - p.ground), down - floor)
    cell = (floor * 8 + column).long().flatten(1)
    chance = p.chance.flatten(1).gather(1, cell).view(-1, size, size)
    front = (across >= 0) & (across < p.columns) & (y >= top) & (y < p.street)

    shop, door = on_ground & p.shop, on_ground & (column == p.door)
    half = torch.where(door, 0.24, torch.where(shop, 0.38, p.half))
    head = torch.where(door, 0.2, p.head)
    foot = torch.where(door, 1.0, p.foot)
    beside = u.abs() < half
    tall = (v > head + p.arch * (u / half).square()) & (v < foot)
    present = front & ((chance > 0.07) | on_ground)
    above = y < p.eaves
    loft = p.dormers & above & (u.abs() < 0.15) & ((y - p.ridge) > 0.4 * (p.eaves - p.ridge)) & (column % 2 == 1)
    wide = (x > p.left - 0.015) & (x < p.right + 0.015)
    roof = above & (y > p.ridge) & ((x - p.left).minimum(p.right - x) > p.slope * (p.eaves - y) - 0.01)
    balcony = present & ~on_ground & (chance < 0.07 + p.balconies) & (u.abs() < p.half + 0.13) & (v > foot - 0.26) & (v < foot + 0.07)

    classes = torch.full((SCENES, size, size), SKY, dtype=torch.uint8)

    def paint(kind, where):
        classes.masked_fill_(where, kind)

    for place, there in p.chimneys:
        paint(WALL, there & ((x - place).abs() < 0.03) & above & (y > p.ridge - 0.045))
    paint(ROOF, roof)
    paint(WINDOW, roof & loft)
    paint(WALL, front)
    paint(SHUTTER, present & p.shutters & ~on_ground & (u.abs() < 0.47) & (u.abs() < 1.8 * half) & (v > head + p.arch) & (v < foot))
    paint(CORNICE, p.belts & front & ~on_ground & (floor > 0) & (v < 0.07))
    paint(WINDOW, present & beside & tall & ~door)
    paint(SILL, present & ~door & (u.abs() < half + 0.05) & (v >= foot) & (v < foot + 0.07))
    paint(DOOR, front & door & beside & tall)
    paint(CORNICE, wide & ((y >= p.eaves) & (y < top) | (y >= p.ground - 0.6 * p.cornice) & (y < p.ground)))
    paint(STREET, y >= p.street)
    unbarred = classes.clone()
    paint(BALCONY, balcony)
    return SimpleNamespace(classes=classes, unbarred=unbarred, x=x, y=y, u=u, v=v, across=across, half=half, head=head, foot=foot, chance=chance)


def _photograph(p, dice, size):
    """Pictures [SCENES, 3, size, size] in [0, 1]: paint, detail, shadows, then light and noise."""
    at = _parts(p, size)
    kind = at.unbarred.unsqueeze(1)
    wall, white = dice.one_of(PLASTER, 0.05), dice.one_of(((238, 232, 220), (214, 206, 190), (196, 190, 184)), 0.03)
    sky = dice.one_of(((112, 164, 220), (164, 188, 212), (202, 208, 214), (238, 196, 150)), 0.03)
    paint = dice.one_of(((62, 92, 78), (52, 74, 112), (112, 58, 46), (84, 84, 88), (140, 104, 66)), 0.03)
    frame = torch.where(dice.happens(0.7).unsqueeze(1), white, paint)
    glass = dice.one_of(((44, 56, 74), (62, 72, 80), (34, 40, 52)), 0.02)
    slate = dice.one_of(((96, 62, 52), (82, 88, 100), (142, 82, 60), (64, 62, 66)), 0.03)
    road = dice.one_of(((128, 126, 122), (104, 104, 106), (146, 138, 126)), 0.02)
    bricks, light, warmth = dice.uniform(0, 0.1), dice.uniform(-0.25, 0.25), dice.uniform(-0.04, 0.04)
    exposure = dice.uniform(0.85, 1.12)

    def near(a, b, width):
        return ((a - b).abs() < width).unsqueeze(1)

    def over(picture, where, colour):
        return torch.where(where, colour, picture)

    clouds = 0.08 * dice.smooth(5, size) + 0.05 * dice.smooth(11, size)
    picture = sky + (1 - sky) * (0.55 * at.y.unsqueeze(1) + clouds).clamp(0, 1)
    stains = 1 + 0.035 * dice.smooth(6, size) - 0.16 * (at.y.unsqueeze(1) - 0.75).clamp(min=0)
    each = F.interpolate(torch.randn(SCENES, 1, 32, 16, generator=dice.draw), size, mode="nearest")
    seams = ((at.y * 32) % 1 < 0.3).float().unsqueeze(1)
    masonry = stains + bricks.unsqueeze(1) * (0.6 * each - 1.2 * seams)
    for k, colour, rough in (
        (WALL, wall, masonry), (ROOF, slate * (0.9 + 0.25 * each.abs() * (1 - seams)), stains), (SHUTTER, paint, 1 - 0.25 * ((at.v * 12) % 1 < 0.4).unsqueeze(1)),
        (DOOR, 0.8 * paint, 1.0), (CORNICE, white, stains), (SILL, white, 0.95), (STREET, road, stains + 0.04 * each),
    ):  # fmt: skip
        picture = over(picture, kind == k, colour * rough)

    # panes mirror the sky along a diagonal, some are lit, some have curtains
    mirrored = (0.5 + 1.5 * (at.u - at.v + 0.4) + 4 * (at.chance - 0.5)).clamp(0, 1).unsqueeze(1)
    pane = glass + 0.45 * (sky - glass) * mirrored
    lamp = ((at.chance * 37) % 1 > 0.88).unsqueeze(1)
    pane = over(pane, lamp, torch.tensor([0.96, 0.78, 0.45]).view(3, 1, 1) * (1.05 - 0.35 * at.v.unsqueeze(1)))
    drawn = ((at.chance * 17) % 1 > 0.5) & (at.u.abs() > 0.55 * at.half)
    pane = over(pane, drawn.unsqueeze(1), 0.5 * pane + 0.5 * white)
    bar = 0.006 * p.columns / (p.right - p.left)  # half of a glazing bar, in cells
    rim = (at.half - at.u.abs() < 2.2 * bar).unsqueeze(1)
    bars = near(at.u, 0, bar) | rim | near(at.v, 0.62 * at.head + 0.38 * at.foot, 0.03)
    picture = over(picture, kind == WINDOW, over(pane, bars, frame))
    panels = near(at.u.abs(), 0.12, 0.07) & (near(at.v, 0.5, 0.12) | near(at.v, 0.8, 0.1))
    picture = over(picture, kind == DOOR, over(over(0.75 * paint, panels, 1.05 * paint), rim, frame))

    barred = (at.classes == BALCONY).unsqueeze(1)
    rails = ((at.across * 9) % 1 < 0.4).unsqueeze(1) | (at.v < at.foot - 0.21).unsqueeze(1)
    slab = (at.v > at.foot + 0.01).unsqueeze(1)
    picture = over(picture, barred & rails, 0.35 * paint)
    picture = over(picture, barred & slab, 0.92 * white)

    # how far each class stands out of the wall; what stands out throws a shadow to the lower right
    height = torch.tensor([-9.0, 0, 0.4, -0.8, 0.3, -0.8, 0.9, 1, 0.6, 0])[at.classes.long()].unsqueeze(1)
    reach = size // 32
    thrown = F.pad(height, (reach // 2, 0, reach, 0), mode="replicate")[..., :size, :size]
    lit = F.pad(height, (0, 0, 1, 0), mode="replicate")[..., :size, :]
    solid = height > -5
    shade = F.avg_pool2d((thrown - height).clamp(0, 1) * solid, 3, 1, 1)
    edge = (height - lit).clamp(0, 1) * solid
    picture = picture * (1 - 0.55 * shade) + 0.12 * edge
    picture = picture * (exposure + light * (at.x - 0.5)).unsqueeze(1)
    picture = picture * (1 + warmth.unsqueeze(1) * torch.tensor([1.0, 0, -1]).view(3, 1, 1))
    return picture + 0.025 * torch.randn(SCENES, 1, size, size, generator=dice.draw)


def _solids(dice, size):
    fine = 2 * size
    x, y = _axes(fine)
    floor, back = dice.one_of(PLASTER, 0.06), dice.one_of(((92, 132, 128), (120, 116, 150), (150, 142, 126), (88, 110, 142)), 0.06)
    horizon = dice.uniform(0.5, 0.7)
    ground = (y > horizon).unsqueeze(1)
    room = torch.where(ground, floor * (0.65 + 0.5 * (y - horizon).unsqueeze(1)), back * (0.8 + 0.4 * y.unsqueeze(1)))
    room = room * (1 + 0.03 * dice.smooth(6, fine))
    plain = striped = room
    shift = dice.whole(0, 2)
    for i in range(3):
        wide = dice.uniform(0.11, 0.16)
        tall = wide * dice.uniform(1.25, 1.6)  # never round, so that the outline tells the stripes
        angle, power = dice.uniform(-0.5, 0.5), 2 * torch.exp2(dice.uniform(0, 1.2))
        here = dice.happens((1.0, 0.7, 0.4)[i])
        third = (shift + i) % 3 - 1  # side by side, so that few hide another
        right = x - (0.5 + 0.29 * third + dice.uniform(-0.06, 0.06))
        below = y - (0.3 + 0.18 * i + dice.uniform(-0.04, 0.1))
        colour = dice.one_of(((222, 92, 70), (238, 176, 72), (104, 178, 112), (84, 148, 214), (206, 120, 178), (232, 226, 212)), 0.06)
        u = (angle.cos() * right + angle.sin() * below) / wide
        v = (angle.cos() * below - angle.sin() * right) / tall
        inside = (here & (u.abs() ** power + v.abs() ** power < 1)).unsqueeze(1)
        shadow = (here * torch.exp(-4 * ((right / wide).square() + ((below - 0.9 * tall) / (0.3 * tall)).square() - 0.4).clamp(min=0))).unsqueeze(1)
        ball = (1.1 - 0.35 * (u + 0.45).square() - 0.3 * (v + 0.45).square()).clamp(min=0.35).unsqueeze(1)
        dark = (torch.cos(9 * v + 0.5 * u.square()) < -0.1).unsqueeze(1)
        plain, striped = plain * (1 - 0.45 * shadow), striped * (1 - 0.45 * shadow)
        plain = torch.where(inside, colour * ball, plain)
        striped = torch.where(inside, torch.where(dark, 0.16 * (1 + colour) / 2, colour) * ball, striped)
    grain = 0.02 * torch.randn(SCENES, 1, fine, fine, generator=dice.draw)
    return _bytes(plain + grain, size), _bytes(striped + grain, size)
