"""Frechet and kernel distance against values worked out by hand, and every edge case by name."""
import itertools
import math

import numpy as np
import pytest
import torch

from common.fid import (
    Statistics, frechet_distance, frechet_from_features, frechet_to_moments, kid, mmd2,
)  # fmt: skip


def gaussian(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(d, seed=0):
    """A covariance of full rank with correlated features."""
    a = gaussian(2 * d, d, seed)
    return a.T @ a / (2 * d)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def standardised(n, d, seed=0):
    """n points whose mean is exactly 0 and whose covariance over n - 1 exactly the identity."""
    x = gaussian(n, d, seed)
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5


ZERO = torch.zeros(5, dtype=torch.float64)
EYE = torch.eye(5, dtype=torch.float64)


# ---- Frechet distance: closed forms ----------------------------------------------------------


def test_equal_covariances_give_the_squared_mean_distance():
    m = torch.tensor([3.0, 0, -4, 0, 1])
    for sigma in (EYE, covariance(5), torch.diag(torch.tensor([1.0, 2, 0, 0, 5]))):
        assert frechet_distance(m, sigma, ZERO, sigma) == pytest.approx(26, abs=1e-6)


def test_doubling_a_standard_normal_costs_one_per_dimension():
    assert frechet_distance(ZERO, EYE, ZERO, 4 * EYE) == pytest.approx(5, abs=1e-12)


def test_diagonal_covariances_give_squared_differences_of_standard_deviations():
    s, t = torch.tensor([1.0, 2, 3, 0.5, 0]).double(), torch.tensor([4.0, 2, 1, 0, 3]).double()
    got = frechet_distance(ZERO, s.square().diag(), ZERO, t.square().diag())
    assert got == pytest.approx(9 + 0 + 4 + 0.25 + 9, abs=1e-6)


def test_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1], [1, 2]]), np.diag([1.0, 4])
    want = 9 - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert want == pytest.approx(0.7712204477, abs=1e-10)
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("singular", [False, True])
def test_two_dimensions_follow_the_formula_of_the_root(singular):
    """tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB)); a singular A takes the other factorisation."""
    for seed in range(5):
        a, b, zero = covariance(2, seed), covariance(2, seed + 100), torch.zeros(2)
        if singular:
            a = torch.outer(a[0], a[0])
        det = max((torch.linalg.det(a) * torch.linalg.det(b)).item(), 0)
        root = math.sqrt((a @ b).trace().item() + 2 * math.sqrt(det))
        want = (a.trace() + b.trace()).item() - 2 * root
        assert frechet_distance(zero, a, zero, b) == pytest.approx(want, abs=1e-6)


def test_distance_is_symmetric():
    a, b = covariance(5, 1), covariance(5, 2)
    there, back = frechet_distance(ZERO, a, ZERO + 1, b), frechet_distance(ZERO + 1, b, ZERO, a)
    assert there == pytest.approx(back, rel=1e-12)


@pytest.mark.parametrize("n", [6, 300])
def test_distance_ignores_a_common_rotation_and_shift_and_scales_with_the_square(n):
    a, b = gaussian(n, 8), 2 * gaussian(n + 1, 8, 1) + 1
    turn, base = torch.linalg.qr(gaussian(8, 8, 2)).Q, frechet_from_features(a, b)
    assert frechet_from_features(a @ turn + 7, b @ turn + 7) == pytest.approx(base, rel=1e-9)
    assert frechet_from_features(3 * a, 3 * b) == pytest.approx(9 * base, rel=1e-9)
    assert frechet_from_features(b, a) == pytest.approx(base, rel=1e-9)


@pytest.mark.parametrize("n, d", [(20, 4), (4, 20)])
def test_covariance_is_over_n_minus_one(n, d):
    """Doubled deviations cost tr S, which tells n - 1 from n; so do different n on two sides."""
    a = gaussian(n, d)
    spread = (a - a.mean(0)).square().sum().item()
    doubled = 2 * (a - a.mean(0)) + a.mean(0)
    assert frechet_from_features(a, doubled) == pytest.approx(spread / (n - 1), rel=1e-6)
    twice = torch.cat([a, a])  # covariance: spread 2 S (n - 1) over 2 n - 1
    ratio = math.sqrt(2 * (n - 1) / (2 * n - 1))
    want = spread / (n - 1) * (1 - ratio) ** 2
    assert frechet_from_features(a, twice) == pytest.approx(want, abs=1e-6)


def test_samples_with_known_moments_give_the_distance_of_these_moments():
    a, b = standardised(50, 6), 2 * standardised(80, 6, 1) + 1
    assert frechet_from_features(a, b) == pytest.approx(6 + 6, abs=1e-10)


def test_bias_at_equal_distributions():
    """d (d + 5) / (2 n) between two samples, half of it against the exact moments."""
    d, n, pairs, exact = 16, 500, [], []
    for seed in range(40):
        a, b = gaussian(n, d, 2 * seed), gaussian(n, d, 2 * seed + 1)
        pairs.append(frechet_from_features(a, b))
        s = Statistics().update(a)
        exact.append(frechet_distance(s.mean, s.cov, torch.zeros(d), torch.eye(d)))
    want = d * (d + 5) / (2 * n)
    assert np.mean(pairs) == pytest.approx(want, rel=0.04)
    assert np.mean(exact) == pytest.approx(want / 2, rel=0.04)


def test_bias_at_equal_distributions_of_unequal_variances():
    n, v = 500, torch.linspace(0.1, 3, 12, dtype=torch.float64)
    samples = [gaussian(n, 12, seed) * v.sqrt() for seed in range(80)]
    got = [frechet_from_features(a, b) for a, b in zip(samples[::2], samples[1::2])]
    want = (2.5 * v.sum() + (torch.outer(v, v) / (v[:, None] + v)).sum()) / n
    assert np.mean(got) == pytest.approx(want.item(), rel=0.05)


# ---- Frechet distance: edge cases ------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(1000, 64), (20, 200), (100, 600)])
def test_identical_sets_have_distance_zero(n, d):
    assert 0 <= frechet_from_features(gaussian(n, d) + 50, gaussian(n, d) + 50) <= 1e-9


def test_identical_singular_moments_are_clamped_at_zero():
    for n, d in ((20, 200), (100, 600)):
        s = Statistics().update(gaussian(n, d))
        assert 0 <= frechet_distance(s.mean, s.cov, s.mean, s.cov) <= 1e-6 * 2 * d


@pytest.mark.parametrize("n, m", [(20, 30), (30, 500), (500, 30), (200, 201)])
def test_few_points_agree_with_the_covariance_route(n, m):
    a, b = gaussian(n, 200), gaussian(m, 200, 1) * 1.5 + 0.2
    got = frechet_from_features(a, b)
    s, t = Statistics().update(a), Statistics().update(b)
    assert got == pytest.approx(frechet_distance(s.mean, s.cov, t.mean, t.cov), abs=1e-3)
    if m > 200:  # where b's covariance has full rank, the root term is exact against it too
        assert got == pytest.approx(frechet_to_moments(a, t.mean, t.cov), rel=1e-12)


@pytest.mark.parametrize("n, m", [(20, 30), (30, 500), (500, 30), (300, 250)])
def test_agreement_with_the_definition_in_float64(n, m):
    """The root as a sum over the eigenvalues of the smaller product, by numpy."""
    a, b = gaussian(n, 200), gaussian(m, 200, 1) * 1.5 + 0.2
    ca, cb = (((x - x.mean(0)) / math.sqrt(len(x) - 1)).numpy() for x in (a, b))
    root = np.linalg.svd(ca @ cb.T, compute_uv=False).sum()
    want = (a.mean(0) - b.mean(0)).square().sum().item() + (ca**2).sum() + (cb**2).sum() - 2 * root
    assert frechet_from_features(a, b) == pytest.approx(want, rel=1e-9)
    assert frechet_from_features(a.float(), b.float()) == pytest.approx(want, rel=1e-6)


def test_few_points_have_no_rounding_noise_of_a_singular_covariance():
    """b varies in other dimensions than a, so the root term is exactly 0."""
    a = torch.cat([gaussian(20, 100), torch.zeros(20, 100)], 1)
    got = frechet_from_features(a, a.roll(100, 1))
    difference = a.mean(0) - a.roll(100, 1).mean(0)
    want = (difference.square().sum() + 2 * a.var(0).sum()).item()
    assert got == pytest.approx(want, abs=1e-11)


def test_all_points_equal_have_distance_zero_and_a_collapsed_set_a_finite_one():
    same = torch.full((30, 4), 0.1)
    assert frechet_from_features(same, same) == pytest.approx(0, abs=1e-20)
    real = standardised(50, 4)
    assert frechet_from_features(real, same) == pytest.approx(4 + 0.04, abs=1e-6)
    assert frechet_from_features(same, real) == pytest.approx(4 + 0.04, abs=1e-6)


def test_constant_features_are_no_obstacle():
    """A feature that is never active leaves a singular covariance."""
    a, b = gaussian(300, 6), gaussian(300, 6, 1) * 2
    pad = torch.zeros(300, 2)
    wide = frechet_from_features(torch.cat([a, pad], 1), torch.cat([b, pad], 1))
    assert wide == pytest.approx(frechet_from_features(a, b), abs=1e-6)


def test_large_offset_in_float32_costs_no_digits():
    a, b = gaussian(500, 64).float() + 50, gaussian(400, 64, 1).float() + 50
    want = frechet_from_features(a.double() - 50, b.double() - 50)
    assert frechet_from_features(a, b) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("f", [frechet_from_features, mmd2, kid])
def test_features_that_are_not_finite_raise(f, bad):
    x = gaussian(10, 4)
    broken = x.clone()
    broken[3, 2] = bad
    for pair in ((broken, x), (x, broken)):
        with pytest.raises(ValueError, match="finite.*1 of 10 rows"):
            f(*pair)


@pytest.mark.parametrize("f", [frechet_from_features, mmd2, kid])
def test_one_point_another_dimension_or_shape_raises(f):
    x = gaussian(10, 4)
    for pair in ((x[:1], x), (x, x[:1]), (x, x[:0])):
        with pytest.raises(ValueError, match="at least 2 points, got [01]"):
            f(*pair)
    with pytest.raises(ValueError, match=r"same dimension.*\[10, 4\].*\[10, 3\]"):
        f(x, x[:, :3])
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        f(x[0], x)


def test_points_that_do_not_fit_moments_raise():
    for n in (3, 30):
        with pytest.raises(ValueError, match="same dimension.*4.*5"):
            frechet_to_moments(gaussian(n, 4), ZERO, EYE)
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        frechet_to_moments(gaussian(1, 5), ZERO, EYE)


def test_moments_that_do_not_fit_raise():
    for args in (
        (ZERO, EYE, ZERO[:4], EYE[:4, :4]),
        (ZERO, EYE, ZERO, EYE[:4]),
        (ZERO, EYE[:4, :4], ZERO, EYE),
        (ZERO[None], EYE, ZERO, EYE),
    ):
        with pytest.raises(ValueError, match="shapes|dimension"):
            frechet_distance(*args)
    for at, bad in itertools.product(range(4), (float("nan"), float("inf"))):
        args = [ZERO.clone(), EYE.clone(), ZERO.clone(), EYE.clone()]
        args[at].view(-1)[0] = bad
        with pytest.raises(ValueError, match="finite"):
            frechet_distance(*args)


def test_matrices_that_are_no_covariances_raise_instead_of_a_negative_distance():
    with pytest.raises(ValueError, match="negative eigenvalues"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1]), np.zeros(2), np.diag([4.0, -3]))


# ---- streaming statistics --------------------------------------------------------------------

SPLITS = [[100], [1, 99], [50, 50], [33, 33, 33, 1], [2, 0, 98], [0, 100], [1] * 100]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_equal_numpy_in_any_split(sizes, dtype):
    x = (gaussian(100, 7) @ covariance(7) + 50).to(dtype)
    s = Statistics()
    for part in x.split(sizes):
        s.update(part)
    assert s.n == 100
    assert np.allclose(s.mean, x.double().numpy().mean(0), rtol=1e-13, atol=0)
    assert np.allclose(s.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-13)


def test_a_far_offset_leaves_the_covariance_exact():
    """Sums of squares of values around 1e6 would leave four digits."""
    x = gaussian(1000, 3)
    want = np.cov(x.numpy() + 1e6, rowvar=False)
    got = Statistics().update(x[:10] + 1e6).update(x[10:] + 1e6).cov
    assert np.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_statistics_refuse_what_they_cannot_hold():
    s = Statistics()
    with pytest.raises(ValueError, match="at least 1 point"):
        s.mean
    s.update(gaussian(1, 4))
    with pytest.raises(ValueError, match="at least 2 points, got 1"):
        s.cov
    with pytest.raises(ValueError, match="dimension 4 as before, got 3"):
        s.update(gaussian(5, 3))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            s.update(torch.tensor([[0.0, 1, bad, 2]]))
    assert s.n == 1


def test_features_that_need_a_gradient_and_arrays_are_taken():
    x = gaussian(20, 3)
    s = Statistics().update(x.clone().requires_grad_()).update(x.numpy())
    assert s.n == 40 and not s.cov.requires_grad
    assert frechet_from_features(x.numpy(), x.clone().requires_grad_()) < 1e-9


# ---- kernel distance -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "real, fake, want",
    [((0, 0), (1, 1), 7), ((0, 2), (0, 2), -62), ((0, 1), (0, 1), -3.5), ((0, 0), (0, 0), 0)],
)
def test_kernel_distance_by_hand(real, fake, want):
    assert mmd2(column(*real), column(*fake)).item() == want
    mean, std = kid(column(*real), column(*fake), subsets=3)
    assert mean == want and std == 0


def test_kernel_divides_by_the_dimension():
    """In d = 4: k(1, 1) = (4 / 4 + 1)^3 = 8, k(0, .) = 1, so 1 + 8 - 2."""
    assert mmd2(torch.zeros(2, 4), torch.ones(3, 4)).item() == 7


def test_kernel_distance_of_unequal_counts_uses_both():
    """R = {0, 2}, F = {0, 1, 1}: 1 + (2 * 8 + 4 * 1) / 6 - 2 (1 + 1 + 1 + 1 + 27 + 27) / 6."""
    real, fake = column(0, 2), column(0, 1, 1)
    want = 1 + 20 / 6 - 2 * 58 / 6
    assert mmd2(real, fake).item() == pytest.approx(want, rel=1e-14)
    assert mmd2(fake, real).item() == pytest.approx(want, rel=1e-14)


def test_kernel_distance_of_long_sets_equals_the_double_sum():
    """Longer than one slice of rows."""
    a, b = gaussian(1500, 3), gaussian(1100, 3, 1) + 0.1
    k = lambda x, y: (x @ y.T / 3 + 1) ** 3  # noqa: E731
    off = lambda x: (k(x, x).sum() - k(x, x).trace()) / (len(x) * (len(x) - 1))  # noqa: E731
    want = off(a) + off(b) - 2 * k(a, b).mean()
    assert mmd2(a, b).item() == pytest.approx(want.item(), rel=1e-9)


def test_kernel_distance_is_zero_on_average_at_equal_distributions():
    values = [mmd2(gaussian(50, 3, 2 * s), gaussian(80, 3, 2 * s + 1)).item() for s in range(300)]
    error = np.std(values) / len(values) ** 0.5
    assert min(values) < 0 and abs(np.mean(values)) < 3 * error
    assert kid(gaussian(200, 3), gaussian(200, 3, 1) + 0.5)[0] > 10 * error


def test_identical_sets_have_a_negative_kernel_distance_and_repeated_points_none():
    x = gaussian(30, 3)
    assert mmd2(x, x) < 0
    same = torch.full((10, 3), 0.3)
    assert mmd2(same, same).item() == pytest.approx(0, abs=1e-12)
    assert np.isfinite(kid(x, same)).all()


def test_kid_is_mean_and_population_std_over_subsets():
    """Two subsets of two from three points each have few possible values; all must be those."""
    a, b = column(0, 1, 3), column(0, 2, 5)
    single = {kid(a, b, subsets=1, subset_size=2, seed=s)[0] for s in range(200)}
    want = {
        mmd2(a[list(i)], b[list(j)]).item()
        for i in itertools.combinations(range(3), 2)
        for j in itertools.combinations(range(3), 2)
    }
    assert {round(v, 9) for v in single} == {round(v, 9) for v in want}

    mean, std = kid(a, b, subsets=2, subset_size=2, seed=1)
    low, high = mean - std, mean + std  # two values lie one population std from their mean
    assert std > 0 and {round(low, 9), round(high, 9)} <= {round(v, 9) for v in want}


def test_subsets_are_no_larger_than_the_smaller_set_and_repeat_no_point():
    """With size min(n, m) the smaller set is always whole, so identical small sets never vary."""
    a = gaussian(6, 3)
    mean, std = kid(a, a, subsets=5)
    assert mean == pytest.approx(mmd2(a, a).item(), rel=1e-9) and std < 1e-9
    for pair in ((a, gaussian(9, 3)), (gaussian(9, 3), a)):
        assert kid(*pair, subsets=5)[1] > 1e-3


def test_kid_has_random_numbers_of_its_own():
    a, b = gaussian(50, 3), gaussian(60, 3, 1)
    torch.manual_seed(1)
    first, state = kid(a, b, subsets=3, subset_size=10), torch.get_rng_state()
    assert kid(a, b, subsets=3, subset_size=10) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert kid(a, b, subsets=3, subset_size=10, seed=1) != first
    with pytest.raises(ValueError, match="subsets"):
        kid(a, b, subsets=0)
    with pytest.raises(ValueError, match="subset_size"):
        kid(a, b, subset_size=1)
