"""common/report.py, common/sample.py and common/evaluate.py on small run folders."""
import dataclasses
import json

import pytest
import torch
from PIL import Image

from common import data, evaluate, report, run, sample
from tests.helpers import ROOT, script, tiny

CACHE = str(ROOT / "data" / "cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of lsgan and icr_gan on digits."""
    out = tmp_path_factory.mktemp("runs")
    changes = {"steps": 4, "log_every": 1, "sample_every": 2, "eval_every": 2, "cache_dir": CACHE, "out_dir": str(out)}
    return [script(name).main(tiny(name, **changes)) for name in ("lsgan", "icr_gan")]


# ---- sample


def test_a_grid_places_images_in_rows_and_enlarges_small_ones():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 32, 32) * 40
    sheet = sample.grid(images, 3)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    assert [sheet.getpixel((2 + 66 * c, 2 + 66 * r)) for r in (0, 1) for c in (0, 1, 2)] == [0, 40, 80, 120, 160, 200]
    assert sheet.getpixel((0, 0)) == 0 and sample.grid(images.expand(6, 3, 32, 32)).mode == "RGB"
    assert sample.grid(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), 1).size == (132, 132)


def test_pictures_keep_their_pixels():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    picture = sample.picture(image)
    assert picture.size == (7, 5)
    assert picture.getpixel((6, 4)) == tuple(image[:, 4, 6].tolist())


def test_sample_writes_a_grid_or_single_images(runs, tmp_path, capsys):
    sample._command([str(runs[0]), "--n", "10"])
    assert Image.open(capsys.readouterr().out.strip()).size == (8 * 66 + 2, 2 * 66 + 2)
    sample._command([str(runs[0]), "--n", "5", "--out", str(tmp_path / "many")])
    files = sorted((tmp_path / "many").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    nets, args, m = run.load(runs[0])
    want = sample.draw(m.sample, nets, args, m.latents(5, args, torch.Generator().manual_seed(0)))
    assert Image.open(files[3]).tobytes() == want[3].numpy().tobytes()
    with pytest.raises(ValueError, match="no run folder"):
        sample._command([str(tmp_path)])


# ---- report


def test_several_runs_lie_side_by_side(runs, tmp_path, capsys):
    report._command([*map(str, runs), "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    lines = table.splitlines()
    assert len(lines) == 4 and "FID (lenet)" in lines[0]
    for line, folder in zip(lines[2:], runs):
        final = json.loads((folder / "metrics.json").read_text())
        assert f"| {final['fid']:.2f} |" in line and f"| {final['step']} |" in line
    assert "lsgan" in lines[2] and "icr_gan" in lines[3]
    assert Image.open(tmp_path / "samples.png").width == 2 * 530 + 8
    assert Image.open(tmp_path / "curves.png").width == 3 * 480 + 16
    assert table.strip() in capsys.readouterr().out


def test_a_run_is_named_by_what_was_typed_and_the_others_do_not_share(tmp_path):
    def saved(folder, name, **changes):
        (tmp_path / folder).mkdir()
        args = dataclasses.asdict(script(name).Args(**changes))
        (tmp_path / folder / "args.json").write_text(json.dumps({"script": name, "args": args}))
        return tmp_path / folder

    a = saved("a", "lsgan", dataset="mnist", log_every=7)
    b = saved("b", "wgan_gp", dataset="mnist", lr=1e-4, steps=9)
    c = saved("c", "wgan_gp", dataset="mnist")
    d = saved("d", "wgan_gp", dataset="mnist")
    assert report._labels([a, b, c]) == ["lsgan", "wgan_gp steps 9 lr 0.0001", "wgan_gp"]
    assert report._labels([a, c, d]) == ["a", "c", "d"]  # alike but for the folder
    assert report._labels([saved("f", "wgan_gp", dataset="mnist", max_minutes=2.0), c]) == ["wgan_gp max_minutes 2", "wgan_gp"]
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "args.json").write_text(json.dumps({"script": "my_gan", "args": {"lr": 1.0}}))
    assert report._labels([tmp_path / "g", a]) == ["my_gan", "lsgan dataset mnist"]  # of a script that is not here
    assert report._labels([saved("e", "lsgan"), c]) == ["lsgan", "wgan_gp dataset mnist"]


def test_long_names_get_the_room_they_need():
    short, long = "a", "a name that is as long as two or three arguments and their values"
    assert report.chart("t", [(short, [0, 1], [0.0, 1.0])] * 3).size == (480, 300)
    chart = report.chart("t", [(long, [0, 1], [0.0, 1.0])] * 3)
    assert chart.size == (480, 332)
    assert all(chart.getpixel((470, y)) == (255, 255, 255) for y in range(28, 80))  # no name is cut at the edge
    picture = Image.new("RGB", (200, 50))
    assert report._captioned(picture, short).size == (200, 74)
    assert report._captioned(picture, long).size == (200, 50 + 8 + 16 * 3)


def test_scores_of_different_features_never_share_a_column(runs, tmp_path):
    import shutil

    other = shutil.copytree(runs[1], tmp_path / "other")
    (other / "metrics.csv").write_text((other / "metrics.csv").read_text().replace("lenet", "cifarnet"))
    with pytest.raises(ValueError, match="cifarnet, lenet"):
        report.compare([runs[0], other], tmp_path / "out")


def test_a_chart_puts_its_line_where_the_numbers_are():
    """A constant, then a rise: the ink moves up; nothing is drawn for nothing."""
    chart = report.chart("title", [("a", [0, 50, 100], [0.0, 0.0, 1.0])])
    ink = [(x, y) for x in range(60, 460) for y in range(56, 270) if chart.getpixel((x, y))[2] > chart.getpixel((x, y))[0] + 60]
    left = [y for x, y in ink if x < 200]
    right = [y for x, y in ink if x > 440]
    assert min(left) > 240 and min(right) < 90
    assert report.chart("empty", []).size == (480, 300)


@pytest.mark.parametrize("low, high, log", [(0, 1, False), (-3.2, 17, False), (1e-4, 2e-4, False), (0.02, 900, True), (3, 170, True)])
def test_ticks_are_round_and_inside(low, high, log):
    ticks = report._ticks(low, high, log)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks) and ticks == sorted(ticks)
    assert all(len(f"{t:.3g}".lstrip("-").replace("0", "").replace(".", "").split("e")[0]) <= 2 for t in ticks)


def test_frames_are_spread_from_the_first_to_the_last():
    assert report._spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert report._spread([1, 2], 4) == [1, 2]


def test_a_run_without_scores_is_still_drawn(runs, tmp_path):
    import shutil

    folder = shutil.copytree(runs[0], tmp_path / "fresh")
    for name in ("metrics.csv", "log.csv"):
        (folder / name).unlink()
    report.pictures(folder)
    assert "not scored yet" in report.compare([folder, runs[1]], tmp_path / "out")


# ---- evaluate


def test_real_images_score_as_real_and_noise_does_not():
    images = data.load_images("digits", cache_dir=CACHE)
    n = 600
    reference = evaluate.reference(images, "auto", n, CACHE)

    def held_out(count, at=[0]):
        at[0] += count
        return data.to_float(images.test.images[at[0] - count : at[0]])

    good = evaluate.score(evaluate.features_of(held_out, n, "lenet"), reference)
    noise = evaluate.score(evaluate.features_of(lambda c: torch.rand(c, 1, 32, 32) * 2 - 1, n, "lenet"), reference)
    assert good["n"] == n and good["features"] == "lenet"
    assert good["precision"] > 0.8 and good["recall"] > 0.8 and good["coverage"] > 0.9
    assert noise["fid"] > 50 * good["fid"] and noise["recall"] == 0


def test_evaluate_scores_a_run_and_a_folder_alike(runs, tmp_path, capsys):
    sample._command([str(runs[1]), "--n", "80", "--out", str(tmp_path / "fake")])
    common = ["--real", "digits", "--cache-dir", CACHE, "--n", "80"]
    evaluate._command([*common, "--fake", str(runs[1]), "--json", str(tmp_path / "run.json")])
    evaluate._command([*common, "--fake", str(tmp_path / "fake"), "--json", str(tmp_path / "folder.json")])
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("run", "folder"))
    assert a["n"] == b["n"] == 80 and "FID (lenet)" in capsys.readouterr().out
    for key in ("fid", "precision", "recall", "density", "coverage", "pixel_variance", "pixel_variance_real"):
        assert a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-9)  # saving as PNG changes nothing


def test_variance_per_pixel_equals_that_of_float64_and_needs_no_whole_set():
    """Against torch.var on the pixels; 0 for equal images; 1 where half are black and half white."""
    images = torch.randint(0, 256, (1234, 3, 4, 5), dtype=torch.uint8)
    whole = evaluate.PixelVariance().update(images)
    want = (images.double() / 127.5 - 1).var(0, correction=0).mean().item()
    assert whole.n == 1234 and whole.value == pytest.approx(want, rel=1e-6)
    parts = evaluate.PixelVariance().update(images[:700]).update(images[700:])
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert evaluate.PixelVariance().update(images[:1].expand(9, -1, -1, -1)).value == pytest.approx(0, abs=1e-12)
    two = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8).repeat(9, 1, 1, 1)
    assert evaluate.PixelVariance().update(two).value > 0.1  # two images are a collapse that it does not see
    halves = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(5, 1, 2, 2)
    assert evaluate.PixelVariance().update(halves).value == pytest.approx(1)


def test_fewer_than_a_folder_holds_are_drawn_from_all_of_its_classes(tmp_path, capsys):
    real = data.load_images("digits", cache_dir=CACHE)
    for label in range(10):
        (tmp_path / "fake" / str(label)).mkdir(parents=True)
        for i, pixels in enumerate(real.images[real.labels == label][:30]):
            sample.picture(pixels).save(tmp_path / "fake" / str(label) / f"{i}.png")
    words = ["--real", "digits", "--cache-dir", CACHE, "--fake", str(tmp_path / "fake"), "--n", "60"]
    evaluate._command([*words, "--json", str(tmp_path / "some.json")])
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["n"] == 60 and found["recall"] > 0.8 and found["fid"] < 30  # two classes: .08 and 155
    capsys.readouterr()


def test_the_floor_is_that_of_the_held_out_split(runs, tmp_path, capsys):
    common = ["--real", "digits", "--cache-dir", CACHE, "--n", "300"]
    evaluate._command([*common, "--floor", "--json", str(tmp_path / "floor.json")])
    floor = json.loads((tmp_path / "floor.json").read_text())
    assert floor["pixel_variance"] == pytest.approx(floor["pixel_variance_real"], rel=0.1) and floor["pixel_variance"] > 0.1
    assert floor["n"] == 300 and floor["precision"] > 0.7 and floor["recall"] > 0.7 and floor["fid"] < 2
    for words in ([], ["--floor", "--fake", str(runs[0])]):
        with pytest.raises(ValueError, match="either --fake"):
            evaluate._command([*common, *words])
    capsys.readouterr()


def test_only_inception_gives_a_plain_fid():
    assert evaluate.fid_label("inception") == "FID" and evaluate.fid_label("lenet") == "FID (lenet)"
