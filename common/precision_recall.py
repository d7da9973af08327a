"""Precision, recall, density and coverage: which points fall into whose nearest-neighbour balls.

Precision and recall: Kynkaanniemi et al. 2019, arXiv:1904.06991; a point counts as inside a ball
when its distance is <= the radius. Density and coverage: Naeem et al. 2020, arXiv:2002.09797;
inside is <. Each as in its authors' code. A radius is the distance to the k-th neighbour in the
same set, the point itself not counted.

Those signs decide wherever points repeat, so distances must be exact there: equal ones equal, that
of a point to itself 0. A matrix product gives neither, but is many times faster than the direct
form sum (a - b)^2 in float64. So all distances are first taken from a product in float32, which
may round its factors to bf16, with a bound on its error; the few pairs within that bound of a
decision are taken again by the direct form, and the results are those of the direct form alone.
"""
import contextlib
import math

import torch
import torch.nn.functional as F

from common.fid import as_pair
from common.terminal import progress

BLOCK = 2**23  # distances held at once, 32 MB


def _direct(a, b):
    """Squared distances [..., n, m] in float64; a pair gives the same in either order and batch."""
    a, b = a.double(), b.double()
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _pairs(a, b, i, j):
    """Squared distances of the points a[i] to b[j] by the direct form; i ascending."""
    if len(i) > len(a) * len(b) // 16:  # repeated points; a pair costs several times its share
        return _direct(a, b)[i, j]
    of_each = j.split(i.bincount(minlength=len(a)).tolist())
    found = [_direct(x[None], b[own]).flatten() for x, own in zip(a, of_each) if len(own)]
    return torch.cat(found) if found else a.new_empty(0, dtype=torch.float64)


@contextlib.contextmanager
def _bf16_products():
    """Let float32 products on a CPU with units for bf16 round to it; on others this is nothing."""
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Points:
    """Points x [n, d] moved and scaled for products in float32, and what bounds their error."""

    def __init__(self, x, centre, scale):
        self.x, self.y = x, ((x - centre) * scale).float()
        self.square = self.y.new_empty(len(x))
        self.norm, self.rounding = torch.empty_like(self.square), torch.empty_like(self.square)
        for rows in torch.arange(len(x), device=x.device).split(1024):
            y = self.y[rows].double()
            self.square[rows] = y.square().sum(1).float()
            self.norm[rows] = y.norm(dim=1).float()
            self.rounding[rows] = (y - y.bfloat16()).norm(dim=1).float()


def _blocks(a, b, block, what):
    """Yield rows (a slice of a), their squared distances [rows, m] to b, scaled, a bound [rows, 1]

    on the error of these. Factors a' and b', rounded to bf16 or finer, are off by ra = |a - a'| and
    rb at most, so a'.b' by ra |b| + |a'| rb, where |a'| <= |a| + ra. Summing d products in float32,
    in any order, adds at most d u |a| |b|, u = 2^-24, all other roundings less than
    20 u (|a| + |b|)^2.
    """
    norm, rounding = b.norm.max(), b.rounding.max()
    error = 2 * (a.rounding * (norm + rounding) + a.norm * rounding)
    error += (a.y.shape[1] + 20) * 2**-23 * (a.norm + norm) ** 2
    step = max(1, block // len(b.y))
    for start in range(0, len(a.y), step):
        rows = slice(start, start + step)
        with _bf16_products():
            d2 = F.linear(a.y[rows] * -2, b.y)
        yield rows, d2.add_(b.square).add_(a.square[rows, None]), error[rows, None]
        progress(f"{what} {100 * min(start + step, len(a.y)) // len(a.y)} %")


def _squared_radii(points, ks, block, what):
    """Squared distance of each point to its k-th neighbour, k in ks; float64 [len(ks), n]."""
    ks, x = list(ks), points.x
    radii = torch.empty(len(ks), len(x), dtype=torch.float64, device=x.device)
    for rows, d2, error in _blocks(points, points, block, what):
        # the point itself comes first; all that could be among the smallest is made exact
        last = d2.topk(max(ks) + 1, largest=False).values[:, -1:]
        i, j = (d2 <= last + 2 * error).nonzero(as_tuple=True)
        count = i.bincount(minlength=len(d2))
        place = torch.arange(len(i), device=x.device) - (count.cumsum(0) - count)[i]
        table = radii.new_full((len(d2), int(count.max())), float("inf"))
        table[i, place] = _pairs(x[rows], x, i, j)
        radii[:, rows] = table.topk(max(ks) + 1, largest=False).values[:, ks].T
    return radii


def precision_recall(real, gen, k=3, k_density=5, block=BLOCK) -> dict:
    """Precision, recall (k), density, coverage (k_density) of gen [m, d] against real [n, d].

    precision  share of gen inside (<=) the ball of any real point
    recall     share of real inside (<=) the ball of any gen point
    density    mean over gen of the real balls it is inside (<), over k_density; may exceed 1
    coverage   share of real points whose ball has a gen point inside (<)

    n and m may differ, but the values depend on both. For equal distributions density is 1 on
    average, coverage about 1 - 2^-k_density, precision and recall below 1. Memory is linear in
    n + m; block is how many distances are held at once and changes nothing else. Raises ValueError
    on NaN or infinity, different dimensions, and too few points.
    """
    real, gen = as_pair(real, gen, ("real", "gen"))
    if k < 1 or k_density < 1:
        raise ValueError(f"k and k_density must be at least 1, got {k} and {k_density}")
    for name, x, most in (("real", real, max(k, k_density)), ("gen", gen, k)):
        if len(x) <= most:
            raise ValueError(f"{name} needs k+1 points, {most + 1} for k = {most}, got {len(x)}")

    centre = real.mean(0)
    widest = max((x - centre).norm(dim=1).max().item() for x in (real, gen))
    scale = 2.0 ** -math.frexp(widest)[1]  # norms of at most 1: no square overflows
    real, gen = _Points(real, centre, scale), _Points(gen, centre, scale)
    near_real, dense_real = _squared_radii(real, (k, k_density), block, "distances real to real")
    (near_gen,) = _squared_radii(gen, (k,), block, "distances gen to gen")

    limit_real = (torch.maximum(near_real, dense_real) * scale**2).float()[:, None]
    limit_gen = (near_gen * scale**2).float()
    in_real = torch.zeros(len(gen.x), dtype=torch.bool, device=gen.x.device)
    recalled, covered = torch.zeros(2, len(real.x), dtype=torch.bool, device=gen.x.device)
    inside = 0
    for rows, d2, error in _blocks(real, gen, block, "distances real to gen"):
        d2 -= error  # now the least that the distance can be
        i, j = ((d2 <= limit_real[rows]) | (d2 <= limit_gen)).nonzero(as_tuple=True)
        least, error = d2[i, j].double() / scale**2, error.double().flatten()[i] / scale**2
        d2 = least + error
        i += rows.start
        radii = near_real[i], dense_real[i], near_gen[j]
        open_ = torch.stack([(d2 - r).abs() <= error for r in radii]).any(0)
        d2[open_] = _pairs(real.x[rows], gen.x, i[open_] - rows.start, j[open_])
        in_real[j[d2 <= radii[0]]] = True
        recalled[i[d2 <= radii[2]]] = True
        within = d2 < radii[1]
        covered[i[within]] = True
        inside += within.sum().item()

    return dict(
        precision=in_real.sum().item() / len(gen.x),
        recall=recalled.sum().item() / len(real.x),
        density=inside / (k_density * len(gen.x)),
        coverage=covered.sum().item() / len(real.x),
    )
