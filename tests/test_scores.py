"""common/scores.py: rows against the definitions, closed forms of PSNR, SSIM, IS and diversity."""
import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from common import data, features, fid, scores
from common.precision_recall import precision_recall


def noise(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """300 built-in digits with a held-out split, as data.Images."""
    from common import synthetic

    images = F.pad(synthetic.digits(500, seed=3)[0], (2, 2, 2, 2))
    return data.Images(images[:300], name="few", test=data.Images(images[300:], name="few"))


@pytest.fixture(autouse=True)
def forget():
    scores.warn_few.cache_clear()


def arguments(tmp_path, **changes):
    given = dict(features="auto", eval_samples=150, seed=0, cache_dir=tmp_path, dataset="few")
    return Namespace(**(given | changes))


# ---- rows ------------------------------------------------------------------------------------


def test_a_row_is_the_metrics_of_quantised_images_against_the_training_split(digits, tmp_path):
    """Frechet distance to all 300, the others to 150 drawn of them and not the first 150."""

    def generate(n, rng):
        rows = torch.randperm(len(digits.test), generator=rng)[:n]
        return data.to_float(digits.test.images[rows]) + 0.003  # less than half a grey level

    row = scores.of_generator(generate, digits, arguments(tmp_path))()
    rng = torch.Generator().manual_seed(1)
    fake = features.extract(data.to_uint8(generate(150, rng)))
    real = features.extract(digits.images)
    drawn = real[scores.drawn_rows(300, 150)]
    assert row["fid"] == pytest.approx(fid.frechet_from_features(fake, real), abs=1e-6)
    want = precision_recall(drawn, fake)
    assert {m: row[m] for m in want} == {m: round(v, 6) for m, v in want.items()}
    assert want != precision_recall(real[:150], fake)
    names = ["n", "features", "fid", "precision", "recall", "density", "coverage", "measured_on"]
    assert list(row) == names and row["n"] == 150 and row["features"] == "lenet"
    assert row["measured_on"]["real_images"] == 300 and row["measured_on"]["split"] == "train"


def test_scores_are_made_in_pieces_and_the_same_every_time(digits, tmp_path, monkeypatch):
    sizes = []

    def generate(n, rng):
        sizes.append(n)
        return torch.rand(n, 1, 32, 32, generator=rng) * 2 - 1

    monkeypatch.setattr(scores, "CHUNK", 64)
    score = scores.of_generator(generate, digits, arguments(tmp_path))
    first = score()
    assert sizes == [64, 64, 22] and score() == first
    again = scores.of_generator(generate, digits, arguments(tmp_path, seed=5))()
    assert again["fid"] != first["fid"]


def test_what_cannot_be_scored_is_refused_before_anything_is_generated(digits, tmp_path):
    def never(n, rng):
        raise AssertionError

    few = data.Images(digits.images[:5])
    with pytest.raises(ValueError, match="few has 5 images; scores need at least 6"):
        scores.of_generator(never, few, arguments(tmp_path))
    with pytest.raises(ValueError, match="eval_samples is 5"):
        scores.of_generator(never, digits, arguments(tmp_path, eval_samples=5))
    with pytest.raises(ValueError, match="cifarnet takes 3-channel"):
        scores.of_generator(never, digits, arguments(tmp_path, features="cifarnet"))


@pytest.mark.parametrize("part", [32, 10**6])
def test_the_reference_of_a_stream_equals_that_of_all_at_once(digits, part, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "READ", 256 if part == 32 else part)
    found = features.extract(digits.images)
    got = scores.reference(digits, "auto", 40, tmp_path)
    assert torch.equal(got["real"], found[scores.drawn_rows(300, 40)])
    want = fid.Statistics().update(found)
    assert torch.allclose(got["mu"], want.mean, rtol=1e-12, atol=1e-14)
    assert torch.allclose(got["sigma"], want.cov, rtol=1e-9, atol=1e-12)
    assert got["m"] == 300 and got["features"] == "lenet" and "all" not in got


def test_the_cache_of_the_reference_knows_content_features_and_n(digits, tmp_path, monkeypatch):
    first = scores.reference(digits, "auto", 40, tmp_path)
    assert len(scores.reference(digits, "auto", 50, tmp_path)["real"]) == 50
    other = data.Images(255 - digits.images)
    assert not torch.equal(scores.reference(other, "auto", 40, tmp_path)["mu"], first["mu"])
    assert len(list(tmp_path.iterdir())) == 3

    def never(*a):
        raise AssertionError("made again")

    monkeypatch.setattr(features, "extract", never)
    again = scores.reference(digits, "auto", 40, tmp_path)
    assert torch.equal(again["sigma"], first["sigma"])
    monkeypatch.setattr(features, "version", lambda name: "other weights")
    with pytest.raises(AssertionError, match="made again"):
        scores.reference(digits, "auto", 40, tmp_path)


def test_few_real_images_are_compared_from_their_points(digits, tmp_path):
    """100 are fewer than the 128 dimensions: their covariance is singular."""
    few = data.Images(digits.images[:100])
    fake = features.extract(digits.test.images)
    got = scores.frechet(fake, scores.reference(few, "auto", 200, tmp_path))
    want = fid.frechet_from_features(fake, features.extract(few.images))
    assert got == pytest.approx(want, rel=1e-9)
    same = features.extract(few.images)
    assert scores.frechet(same, scores.reference(few, "auto", 100, tmp_path)) < 1e-9


def test_few_images_are_warned_of_once(capsys):
    for n, m in ((100, 300), (300, 100), (100, 300), (200, 300), (200, 60_000)):
        scores.warn_few(n, m, 128)
    err = capsys.readouterr().err
    assert err.count("mostly bias") == 2
    assert "100 generated and 300 real images in 128 dimensions" in err
    assert "200 generated and 60000 real" in err and "200 generated and 300" not in err


def test_distances_of_two_sets_are_exact_for_few_images(digits):
    a, b = digits.images[:60], digits.images[60:160]
    got = scores.distances(a, b)
    fa, fb = features.extract(a), features.extract(b)
    assert got["fid"] == pytest.approx(fid.frechet_from_features(fa, fb), rel=1e-12)
    assert got["kid"] == fid.kid(fa, fb)[0]
    assert scores.distances(a, a.clone())["fid"] < 1e-9


# ---- inception score -------------------------------------------------------------------------


def test_inception_score_of_certain_even_and_equal_predictions():
    """C classes told apart with certainty: C; the same prediction for all, or one class: 1."""
    certain = torch.full((1000, 5), -1e4)
    certain[torch.arange(1000), torch.arange(1000) % 5] = 1e4
    mean, std = scores.inception_score(certain)
    assert mean == pytest.approx(5, rel=0.02) and 0 < std < 0.1  # shuffled splits are not even
    assert scores.inception_score(certain, splits=1) == pytest.approx((5, 0), abs=1e-9)
    one = certain[:1].expand(100, -1)
    assert scores.inception_score(one) == pytest.approx((1, 0), abs=1e-9)
    vague = torch.tensor([[0.0, 1, 2]]).expand(50, -1)
    assert scores.inception_score(vague) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_by_the_double_sum():
    x = 3 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    p = x.double().softmax(1)
    want = math.exp((p * (p / p.mean(0)).log()).sum(1).mean())
    assert scores.inception_score(x, splits=1)[0] == pytest.approx(want, rel=1e-12)


# ---- pixels ----------------------------------------------------------------------------------


def grey(value, size=32):
    """One image of a constant value in [0, 1], as float in [-1, 1]."""
    return torch.full((1, 1, size, size), 2.0 * value - 1)


def test_psnr_by_hand():
    """MSE .01 on a range of 2: 10 log10(4 / .01)."""
    x = torch.zeros(2, 3, 16, 16)
    assert scores.psnr(x, x + 0.1) == pytest.approx(26.0206, abs=1e-4)
    assert scores.psnr(x, x) == math.inf
    both = torch.cat([x[:1] + 0.1, x[:1] + 0.01])
    assert scores.psnr(x, both) == pytest.approx((26.0206 + 46.0206) / 2, abs=1e-4)


@pytest.mark.parametrize("a, b, want", [(0, 1, 9.999e-5), (0.25, 0.75, 0.600064), (0.5, 0.5, 1)])
def test_ssim_of_constant_images(a, b, want):
    """(2 a b + C1) / (a^2 + b^2 + C1)"""
    assert scores.ssim(grey(a), grey(b)) == pytest.approx(want, rel=1e-4)


def test_ssim_by_its_definition_at_one_window():
    """11 x 11 pixels leave one place, whose weighted moments can be written out."""
    a, b = (torch.rand(1, 1, 11, 11, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    g = torch.exp(-torch.arange(-5.0, 6).double() ** 2 / 4.5)
    w = torch.outer(g, g) / g.sum() ** 2
    x, y = a[0, 0].double(), b[0, 0].double()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
    c = (w * (x - mx) * (y - my)).sum()
    want = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert scores.ssim(2 * a - 1, 2 * b - 1) == pytest.approx(want.item(), rel=1e-6)
    assert scores.ssim(2 * a - 1, 2 * a - 1) == pytest.approx(1, abs=1e-9)


def test_ssim_is_a_mean_over_channels_and_images():
    a = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b = a.roll(1, 0)
    planes = (x.reshape(6, 1, 1, 16, 16) for x in (a, b))
    single = [scores.ssim(*pair) for pair in zip(*planes)]
    assert scores.ssim(a, b) == pytest.approx(sum(single) / 6, rel=1e-9)


@pytest.mark.parametrize(
    "size, scales", [(11, 1), (21, 1), (22, 2), (32, 2), (64, 3), (256, 5), (1024, 5)]
)
def test_scales_are_those_that_the_window_fits(size, scales):
    assert scores.scales_of(size) == scales
    x = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0)).double()
    if size <= 256:
        assert scores.ms_ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-9)


def test_ms_ssim_of_one_scale_is_ssim_and_of_two_their_weighted_product():
    a, b = torch.rand(2, 1, 1, 24, 24, generator=torch.Generator().manual_seed(0)).double()
    a, b = (F.avg_pool2d(x, 3, 1, 1) for x in (a, 0.5 * a + 0.5 * b))
    small = [x[..., :21, :21] for x in (a, b)]
    one = scores.ms_ssim(*small).item()
    assert one == pytest.approx(scores.ssim(*(2 * x - 1 for x in small)), rel=1e-9)
    contrast = scores._similarity(a, b)[1].mean().item()
    halves = (2 * F.avg_pool2d(x, 2) - 1 for x in (a, b))
    total = 0.0448 + 0.2856
    want = contrast ** (0.0448 / total) * scores.ssim(*halves) ** (0.2856 / total)
    assert scores.ms_ssim(a, b).item() == pytest.approx(want, rel=1e-9)


def test_scales_refuse_images_smaller_than_the_window():
    with pytest.raises(ValueError, match="11 pixels, got 8"):
        scores.diversity(noise(4, 1, 8, 8))


def test_diversity_is_zero_for_one_image_and_grows_with_noise(digits):
    one = digits.images[:1].expand(50, -1, -1, -1)
    assert scores.diversity(one) == pytest.approx(0, abs=1e-9)
    two = digits.images[:2].repeat(25, 1, 1, 1)  # half of the pairs are two of one image
    some, all_ = scores.diversity(two), scores.diversity(digits.images)
    assert 0.2 * all_ < some < 0.7 * all_ < all_ < scores.diversity(noise(50, 1, 32, 32))
    pair = 1 - scores.ms_ssim(*(x.double() / 255 for x in digits.images[:2].split(1))).item()
    assert scores.diversity(digits.images[:2]) == pytest.approx(pair, rel=1e-9)  # never itself


def test_pixel_variance_by_hand():
    half = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    half[:2] = 255
    assert scores.pixel_variance(half) == pytest.approx(1)
    assert scores.pixel_variance(half[:2]) == pytest.approx(0, abs=1e-12)
    x = noise(700, 3, 8, 8)
    want = data.to_float(x).double().var(0, correction=0).mean().item()
    assert scores.pixel_variance(x) == pytest.approx(want, rel=1e-9)


def test_features_and_sets_are_checked_before_the_training():
    assert scores.checked_features("auto", 3, {"test": 2, "train": 9}) == "cifarnet"
    with pytest.raises(ValueError, match="testB: 1 of at least 2"):
        scores.checked_features("auto", 1, {"testA": 2, "testB": 1})
    with pytest.raises(ValueError, match="lenet"):
        scores.checked_features("lenet", 3, {"test": 2})
