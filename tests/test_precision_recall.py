"""Precision, recall, density and coverage against values worked out by hand and a double loop."""
import numpy as np
import pytest
import torch

from common.precision_recall import _blocks, _direct, _Points, precision_recall

KEYS = ("precision", "recall", "density", "coverage")


def gaussian(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def scores(real, gen, **kwargs):
    got = precision_recall(real, gen, **kwargs)
    assert tuple(got) == KEYS
    return tuple(got.values())


def reference(real, gen, k=3, k_density=5):
    """The definitions, on full matrices of the direct form."""
    real, gen = real.double(), gen.double()

    def distances(a, b):
        return (a[:, None] - b).square().sum(2)

    def radius(x, k):
        return distances(x, x).sort(1).values[:, k]

    d2 = distances(real, gen)
    dense = d2 < radius(real, k_density)[:, None]
    return (
        (d2 <= radius(real, k)[:, None]).any(0).double().mean().item(),
        (d2 <= radius(gen, k)).any(1).double().mean().item(),
        dense.sum().item() / (k_density * len(gen)),
        dense.any(1).double().mean().item(),
    )


# ---- closed forms ----------------------------------------------------------------------------

REAL, GEN = column(0, 1, 3, 6), column(0.5, 2, 7, 20)


@pytest.mark.parametrize(
    "k, want", [(1, (0.75, 1, 1, 1)), (2, (0.75, 1, 1, 1)), (3, (0.75, 1, 0.75, 1))]
)
def test_one_dimension_by_hand(k, want):
    """At k = 1 the point 2 lies on the ball of 1, and 7 on none: <= would give density 1.25."""
    assert scores(REAL, GEN, k=k, k_density=k) == want


def test_one_dimension_by_hand_with_roles_swapped():
    assert scores(GEN, REAL, k=1, k_density=1) == (1, 0.75, 1.5, 0.75)


def test_each_k_goes_to_its_own_pair():
    assert scores(REAL, GEN, k=1, k_density=3) == (0.75, 1, 0.75, 1)
    assert scores(column(0, 1, 2, 3), column(5, 6), k=1, k_density=3) == (0, 0, 1 / 6, 1 / 4)


def test_a_point_on_a_ball_is_inside_for_precision_and_recall_and_outside_for_the_others():
    """All radii are 1, and the middle pair is 1 apart."""
    assert scores(column(0, 1), column(2, 3), k=1, k_density=1) == (0.5, 0.5, 0, 0)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("offset", [0, 50])
def test_identical_sets_score_one_in_all_four(k, offset):
    """Density is exactly 1 only if the distances of both passes are equal to the last bit."""
    x = gaussian(200, 16) + offset
    assert scores(x, x.clone(), k=k, k_density=k) == (1, 1, 1, 1)
    assert scores(x, x.flip(0), k=k, k_density=k) == (1, 1, 1, 1)


@pytest.mark.parametrize("d", [1, 7, 33])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_one_repeated_point_lies_on_its_balls_of_radius_zero(d, value):
    x = torch.full((20, d), value)
    assert scores(x, x) == (1, 1, 0, 0)
    assert scores(x, x[:9], k=1, k_density=1) == (1, 1, 0, 0)
    assert scores(x, x + 1) == (0, 0, 0, 0)


def test_equal_distributions_reach_the_expected_coverage_and_density():
    n, k, got = 500, 5, []
    for seed in range(12):
        got.append(scores(gaussian(n, 8, 2 * seed), gaussian(n, 8, 2 * seed + 1)))
    want = 1 - np.prod([(n - 1 - j) / (2 * n - 1 - j) for j in range(k)])
    assert want == pytest.approx(0.96922, abs=5e-6)
    precision, recall, density, coverage = np.mean(got, 0)
    assert coverage == pytest.approx(want, abs=0.005)
    assert density == pytest.approx(1, abs=0.02)
    assert 0.8 < precision < 0.99 and 0.8 < recall < 0.99


def test_coverage_and_density_depend_on_both_counts_as_expected():
    n, m, k, got = 200, 600, 3, []
    for seed in range(20):
        got.append(scores(gaussian(n, 4, 2 * seed), gaussian(m, 4, 2 * seed + 1), k_density=k))
    want = 1 - np.prod([(n - 1 - j) / (n + m - 1 - j) for j in range(k)])
    _, _, density, coverage = np.mean(got, 0)
    assert coverage == pytest.approx(want, abs=0.005)
    assert density == pytest.approx(1, abs=0.03)


# ---- what the numbers are for ----------------------------------------------------------------


def test_a_collapsed_model_has_high_precision_and_recall_near_zero():
    real = gaussian(300, 8)
    gen = real[0] + 1e-4 * gaussian(300, 8, 1)
    precision, recall, _, coverage = scores(real, gen)
    assert precision == 1 and recall <= 1 / 300 and coverage < 0.05


def test_a_model_collapsed_to_one_point_is_precise_only_if_that_point_is_real():
    real = gaussian(100, 8)
    assert scores(real, real[:1].expand(50, -1))[:2] == (1, 0.01)
    assert scores(real, real[:1].expand(50, -1) + 100) == (0, 0, 0, 0)


def test_noise_around_the_data_has_low_precision_and_high_recall():
    real = gaussian(300, 4)
    precision, recall, *_ = scores(real, 6 * gaussian(300, 4, 1))
    assert precision < 0.3 and recall > 0.9


def test_swapping_the_sets_swaps_precision_and_recall():
    a, b = gaussian(120, 3), 0.5 * gaussian(90, 3, 1)
    precision, recall, *_ = scores(a, b)
    assert scores(b, a)[:2] == (recall, precision) and precision > recall


def test_far_sets_score_zero():
    assert scores(gaussian(50, 3), gaussian(60, 3, 1) + 100) == (0, 0, 0, 0)


# ---- exactness -------------------------------------------------------------------------------


def test_a_point_on_a_ball_is_inside_also_where_a_matrix_product_would_move_it():
    """Far pairs {c, c + u}, and c - u exactly as far from c; nothing but that tie decides."""
    c = 64.0 * torch.arange(40)[:, None].double() ** 2 + torch.arange(5)
    c = c[torch.arange(40) != 7]  # 39 points, whose mean is no binary fraction
    u = torch.tensor([0.5, 0.25, 1, 0.75, 0.125]).double()
    pairs, others = torch.cat([c, c + u]), c - u
    assert scores(pairs, others, k=1, k_density=5)[0] == 1
    assert scores(others, pairs, k=1, k_density=5)[1] == 1
    assert scores(pairs, others, k=1, k_density=1)[2:] == (0, 0)


def grid(n, d, levels, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (n, d), generator=rng).double()


CASES = {
    "random": (gaussian(60, 5), 1.1 * gaussian(45, 5, 1)),
    "ties everywhere": (grid(60, 3, 3, 0), grid(50, 3, 3, 1)),
    "ties, wide": (grid(40, 30, 2, 0), grid(70, 30, 2, 1)),
    "ties, far from 0": (grid(60, 3, 3, 0) + 2**20, grid(50, 3, 3, 1) + 2**20),
    "shared points": (gaussian(60, 5), gaussian(60, 5)[20:]),
    "repeated points": (gaussian(10, 5).repeat(6, 1), gaussian(13, 5).repeat(4, 1)),
    "float32 far from 0": (gaussian(80, 64).float() + 50, gaussian(80, 64, 1).float() + 50),
    "float32 tiny spread": (
        gaussian(80, 9).float() * 1e-5 + 50,
        gaussian(70, 9, 1).float() * 1e-5 + 50,
    ),
    "one outlier": (torch.cat([gaussian(60, 5), 1e8 + gaussian(1, 5)]), gaussian(45, 5, 1)),
    "two scales": (
        torch.cat([gaussian(40, 5) * 1e-6, gaussian(40, 5) * 1e4]),
        gaussian(50, 5, 1) * 1e-6,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k, k_density", [(1, 1), (3, 5), (6, 2)])
def test_result_equals_the_definitions(case, k, k_density):
    real, gen = CASES[case]
    for pair in ((real, gen), (gen, real)):
        assert scores(*pair, k=k, k_density=k_density) == reference(*pair, k, k_density)


@pytest.mark.parametrize("case", CASES)
def test_block_size_changes_nothing(case):
    want = scores(*CASES[case])
    assert all(scores(*CASES[case], block=block) == want for block in (1, 100, 333, 10**9))


@pytest.mark.parametrize("case", CASES)
def test_blocks_hold_each_distance_once_within_bounds_of_size_and_error(case):
    a, b = CASES[case]
    scale = 2.0 ** -int(max(a.abs().max(), b.abs().max()).double().log2() + 8)
    pa, pb = (_Points(x.double(), a[0].double(), scale) for x in (a, b))
    want = _direct(a, b) * scale**2
    for block in (1, 100, 10**9):
        rows, d2, errors = zip(*_blocks(pa, pb, block, "distances"))
        assert max(x.numel() for x in d2) <= max(block, len(b))
        assert torch.equal(torch.cat([a[r] for r in rows]), a)
        assert ((torch.cat(d2).double() - want).abs() <= torch.cat(errors)).all()


def test_the_bound_holds_where_all_rounding_goes_one_way():
    """1 + 2^-8 lies in the middle between two numbers of bf16, so every factor is off by 2^-8."""
    x = torch.full((40, 512), 1 + 2.0**-8)
    x[::2] *= -1
    points = _Points(x, torch.zeros(512), 2.0**-5)
    for rows, d2, error in _blocks(points, points, 10**9, "distances"):
        assert ((d2.double() - _direct(x, x) * 2.0**-10).abs() <= error).all()
        assert error.max() < 0.05  # of distances up to 4


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15, 1e30])
def test_extreme_scales_change_nothing(scale):
    a, b = gaussian(150, 6), 0.8 * gaussian(130, 6, 1)
    assert scores(a * scale, b * scale) == scores(a, b)


def test_products_leave_the_setting_of_the_process_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    scores(gaussian(20, 3), gaussian(20, 3, 1))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_order_scale_shift_and_rotation_change_nothing():
    a, b = gaussian(150, 6), 0.8 * gaussian(130, 6, 1)
    want = scores(a, b)
    turn = torch.linalg.qr(gaussian(6, 6, 2)).Q
    assert scores(a.flip(0), b.roll(7, 0)) == want
    assert scores(1e3 * a @ turn + 5, 1e3 * b @ turn + 5) == want


def test_more_than_k_copies_of_a_point_have_a_ball_of_radius_zero():
    """Four copies of 0 at k = 3: only a gen point at exactly 0 is inside, and not for density."""
    real = column(0, 0, 0, 0, 100, 101, 102, 103)
    assert scores(real, column(0, 0, 0, 0), k=3, k_density=3) == (1, 0.5, 0, 0)
    assert scores(real, column(0.1, 0.2, 0.3, 0.4), k=3, k_density=3) == (0, 0.5, 0, 0)
    three = column(0, 0, 0, 50, 100, 101, 102, 103)  # one copy fewer: radius 50
    assert scores(three, column(0.1, 0.2, 0.3, 0.4), k=3, k_density=3)[::2] == (1, 4 / 3)


# ---- input -----------------------------------------------------------------------------------


def test_too_few_points_name_both_numbers():
    x = gaussian(20, 3)
    with pytest.raises(ValueError, match=r"real needs k\+1 points, 6 for k = 5, got 5"):
        precision_recall(x[:5], x)
    with pytest.raises(ValueError, match=r"real needs k\+1 points, 8 for k = 7, got 6"):
        precision_recall(x[:6], x, k=7)
    with pytest.raises(ValueError, match=r"gen needs k\+1 points, 4 for k = 3, got 3"):
        precision_recall(x, x[:3])
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"real needs .* got {n}"):
            precision_recall(x[:n], x, k=1, k_density=1)
        with pytest.raises(ValueError, match=f"gen needs .* got {n}"):
            precision_recall(x, x[:n], k=1, k_density=1)


def test_one_point_more_than_k_is_enough():
    real, gen = gaussian(6, 3), gaussian(4, 3, 1)
    assert scores(real, gen) == reference(real, gen)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_raise(bad):
    x = gaussian(20, 3)
    broken = x.clone()
    broken[7, 1] = bad
    with pytest.raises(ValueError, match="real must be finite.*1 of 20"):
        precision_recall(broken, x)
    with pytest.raises(ValueError, match="gen must be finite.*1 of 20"):
        precision_recall(x, broken)


def test_other_shapes_and_numbers_raise():
    x = gaussian(20, 3)
    with pytest.raises(ValueError, match=r"same dimension.*real \[20, 3\] and gen \[20, 2\]"):
        precision_recall(x, x[:, :2])
    with pytest.raises(ValueError, match=r"gen must have shape \[N, d\]"):
        precision_recall(x, x[:, 0])
    for kwargs in (dict(k=0), dict(k_density=0), dict(k=-1)):
        with pytest.raises(ValueError, match="at least 1"):
            precision_recall(x, x, **kwargs)


def test_arrays_half_precision_and_gradients_are_taken():
    x, y = gaussian(30, 4).half(), gaussian(30, 4, 1).half()
    want = reference(x, y)
    assert scores(x.numpy(), y.float().requires_grad_()) == want
    assert scores(x, y) == want
    assert all(type(v) is float for v in precision_recall(x, y).values())
