"""Frechet distance and kernel distance between two sets of features, in float64.

Heusel et al. 2017, arXiv:1706.08500: |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), with
covariances over n - 1. It is FID only on Inception features. Binkowski et al. 2018,
arXiv:1801.01401: the kernel distance KID. Two samples of n from one normal distribution in d
dimensions are about d (d + 5) / (2 n) apart, so distances compare at equal n only.
"""
import torch

from common.terminal import track


def as_features(x, name="features"):
    """x [N, d], tensor or array, as a detached float64 tensor; ValueError unless 2-D and finite.

    float32 stays float32, as all that it can hold is exact in float64.
    """
    x = torch.as_tensor(x).detach()
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, d], got {list(x.shape)}")
    x = x if x.dtype == torch.float32 else x.double()
    if not x.isfinite().all():
        rows = (~x.isfinite()).any(1).sum().item()
        raise ValueError(f"{name} must be finite, got NaN or infinity in {rows} of {len(x)} rows")
    return x


def as_pair(a, b, names=("a", "b")):
    """Two sets of features of one dimension, on the device of the first."""
    a, b = as_features(a, names[0]), as_features(b, names[1])
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"both sets need the same dimension, got {names[0]} {list(a.shape)} "
            f"and {names[1]} {list(b.shape)}"
        )
    return a, b.to(a.device)


def _at_least_two(*sets):
    for name, x in zip("ab", sets):
        if len(x) < 2:
            raise ValueError(f"{name} needs at least 2 points, got {len(x)}")


# ---- Frechet distance ------------------------------------------------------------------------


class Statistics:
    """Mean and covariance of features that come in batches, without keeping the features.

    Sums are taken of x - pilot, where pilot is the mean of the first batch: sums of x itself would
    lose the covariance of features far from 0 in their squares.
    """

    def __init__(self):
        self.n = 0
        self.pilot = self.total = torch.zeros(0, dtype=torch.float64)
        self.outer = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features):
        """Add features [N, d], N >= 0; sums stay on the device of the first batch."""
        x = as_features(features).double()
        if self.n == 0:
            self.pilot = x.mean(0)
            self.total = torch.zeros_like(self.pilot)
            self.outer = x.new_zeros(x.shape[1], x.shape[1])
        self._check_dimension(x.shape[1])
        x = x.to(self.pilot.device) - self.pilot
        self.total = self.total + x.sum(0)
        self.outer = self.outer + x.T @ x
        self.n += len(x)
        return self

    def _check_dimension(self, d):
        if d != len(self.pilot):
            raise ValueError(f"features must have dimension {len(self.pilot)} as before, got {d}")

    @property
    def mean(self):
        """[d]; needs one point."""
        if self.n < 1:
            raise ValueError("a mean needs at least 1 point, got 0")
        return self.pilot + self.total / self.n

    @property
    def cov(self):
        """[d, d], over n - 1; needs two points."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 points, got {self.n}")
        centred = self.outer - torch.outer(self.total, self.total) / self.n
        return (centred + centred.T) / (2 * (self.n - 1))


def _as_moments(mu, sigma, name):
    # On the CPU whatever the features' device: the factorisations are its strength, and one number
    # per evaluation should not depend on where the features were computed.
    mu = torch.as_tensor(mu).detach().to("cpu", torch.float64)
    sigma = torch.as_tensor(sigma).detach().to("cpu", torch.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"mu_{name} and sigma_{name} must have shapes [d] and [d, d], "
            f"got {list(mu.shape)} and {list(sigma.shape)}"
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"mu_{name} and sigma_{name} must be finite, got NaN or infinity")
    return mu, sigma


def _trace_sqrt(sigma_a, sigma_b):
    """tr (S_a S_b)^(1/2): S_a S_b has the eigenvalues of L^T S_b L wherever S_a = L L^T."""
    left, failed = torch.linalg.cholesky_ex(sigma_a)
    if failed:  # singular: some features are constant, or n <= d
        e, v = torch.linalg.eigh(sigma_a)
        left = v * e.clamp(min=0).sqrt() @ v.T
    product = left.T @ sigma_b @ left
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()


def _not_negative(distance, traces):
    # Rounding leaves a little below 0 where the sets are equal, a wrong input leaves more.
    if distance < -1e-6 * traces or distance != distance:
        raise ValueError(
            f"the squared Frechet distance came out as {distance:.3g}; are both covariances "
            "symmetric without negative eigenvalues?"
        )
    return max(distance, 0.0)


def frechet_distance(mu_a, sigma_a, mu_b, sigma_b) -> float:
    """|mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2) >= 0; mu [d], sigma [d, d].

    Tensors or arrays. Where a covariance is singular its last digits are noise of about
    1e-8 tr S per direction; frechet_from_features has none. Raises ValueError on shapes that do not
    fit, on NaN or infinity, and on covariances with negative eigenvalues where these show.
    """
    mu_a, sigma_a = _as_moments(mu_a, sigma_a, "a")
    mu_b, sigma_b = _as_moments(mu_b, sigma_b, "b")
    if mu_a.shape != mu_b.shape:
        raise ValueError(f"both sides need the same dimension, got {len(mu_a)} and {len(mu_b)}")
    traces = (sigma_a.trace() + sigma_b.trace()).item()
    distance = (mu_a - mu_b).square().sum() + traces - 2 * _trace_sqrt(sigma_a, sigma_b)
    return _not_negative(distance.item(), traces)


def _spread(x):
    """Mean [d] of x [n, d], and A [n - 1, d] with A^T A the covariance over n - 1.

    A reflection that takes (1, ..., 1) to the first axis leaves no row for the mean. Centring
    would: n rows of rank n - 1, whose missing one comes out of an eigenvalue as the root of noise.
    """
    n, x = len(x), x.double()
    v = torch.full((n,), n**-0.5, dtype=x.dtype)
    v[0] += 1
    mean = x.mean(0)
    x = x - mean
    x = x - torch.outer(v, v @ x) * (2 / v.square().sum())
    return mean, x[1:] / (n - 1) ** 0.5


def frechet_to_moments(a, mu, sigma) -> float:
    """Frechet distance of features a [n, d], n >= 2, and the moments mu [d], sigma [d, d].

    With n at most d it is computed from the points, without their singular covariance.
    """
    a = as_features(a, "a")
    _at_least_two(a)
    if len(a) > a.shape[1]:
        moments = Statistics().update(a)
        return frechet_distance(moments.mean, moments.cov, mu, sigma)
    mu, sigma = _as_moments(mu, sigma, "b")
    if a.shape[1] != len(mu):
        raise ValueError(f"both sides need the same dimension, got {a.shape[1]} and {len(mu)}")
    mean, a = _spread(a.cpu().double())
    traces = (a.square().sum() + sigma.trace()).item()
    # tr (A^T A S)^(1/2) = tr (A S A^T)^(1/2), n - 1 instead of d rows and columns
    root = torch.linalg.eigvalsh(a @ sigma @ a.T).clamp(min=0).sqrt().sum()
    return _not_negative(((mean - mu).square().sum() + traces - 2 * root).item(), traces)


def frechet_from_features(a, b) -> float:
    """Frechet distance of features a [n, d] and b [m, d], n and m at least 2 and free to differ.

    Exact also where a covariance is singular: a side of at most d points is never made into one.
    """
    a, b = as_pair(a, b)
    _at_least_two(a, b)
    d = a.shape[1]
    if len(a) > d:
        a, b = b, a
    if len(b) > d:
        moments = Statistics().update(b)
        return frechet_to_moments(a, moments.mean, moments.cov)
    (mean_a, a), (mean_b, b) = _spread(a.cpu().double()), _spread(b.cpu().double())
    traces = (a.square().sum() + b.square().sum()).item()
    # S_a = A^T A and S_b = B^T B, so tr (S_a S_b)^(1/2) is the sum of the singular values of A B^T
    root = torch.linalg.svdvals(a @ b.T).sum()
    return _not_negative(((mean_a - mean_b).square().sum() + traces - 2 * root).item(), traces)


# ---- kernel distance -------------------------------------------------------------------------


def _kernel_sum(a, b):
    """Sum over all i, j of (a_i.b_j / d + 1)^3, in slices of rows, so that memory is linear."""
    d = a.shape[1]
    return sum((rows @ b.T / d + 1).pow(3).sum() for rows in a.split(1024))


def mmd2(a, b):
    """Unbiased squared MMD of a [n, d] and b [m, d] with the kernel (x.y / d + 1)^3; 0-d tensor.

    Means over i != j within a and within b, and over all pairs between them; 0 on average where the
    distributions are equal, so often negative there. Needs n and m of at least 2.
    """
    a, b = (x.double() for x in as_pair(a, b))
    _at_least_two(a, b)

    def within(x):
        itself = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (_kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def kid(a, b, subsets=100, subset_size=1000, seed=0):
    """KID: (mean, std) of mmd2 over random subsets of a [n, d] and b [m, d], not times 1000.

    Subsets have min(n, m, subset_size) points, none twice in one; std is that of the population of
    subsets. Numbers of different subset_size have equal means and different std.
    """
    a, b = (x.double() for x in as_pair(a, b))
    _at_least_two(a, b)
    if subsets < 1 or subset_size < 2:
        raise ValueError(
            f"subsets must be at least 1 and subset_size at least 2, "
            f"got {subsets} and {subset_size}"
        )
    size = min(len(a), len(b), subset_size)
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in track(range(subsets), "kernel distance"):
        rows_a = torch.randperm(len(a), generator=rng)[:size].to(a.device)
        rows_b = torch.randperm(len(b), generator=rng)[:size].to(b.device)
        values.append(mmd2(a[rows_a], b[rows_b]))
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()
