"""A folder of colour pictures all the way: training, resume, sample, report, evaluate, at 32 and 64 px."""
import json

import pytest
import torch
from PIL import Image

from common import data, evaluate, pictures as drawing, report, run, sample
from tests.helpers import CACHE, SCRIPTS, script, tiny


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """80 colour pictures of 48 x 40 pixels in two class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = torch.Generator().manual_seed(0)
    for i in range(80):
        coarse = torch.rand(3, 3, 4, generator=draw)[None] * 255
        pixels = torch.nn.functional.interpolate(coarse, (40, 48), mode="bilinear")[0]
        place = folder / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        drawing.to_picture(pixels.round().to(torch.uint8)).save(place / f"{i}.png")
    return folder


@pytest.mark.parametrize("name, image_size", [*((name, 32) for name in SCRIPTS), ("lsgan", 64)])
def test_colour_folders_train_and_are_scored_by_cifarnet(name, image_size, pictures, tmp_path):
    m = script(name)
    places = {"dataset": str(pictures), "cache_dir": str(tmp_path / "cache"), "out_dir": str(tmp_path / "runs")}
    folder = m.main(tiny(name, image_size=image_size, **places))
    assert json.loads((folder / "args.json").read_text())["args"]["channels"] == 3
    final = json.loads((folder / "metrics.json").read_text())
    assert final["features"] == "cifarnet" and final["n"] == 64 and final["measured_on"]["channels"] == 3
    assert Image.open(folder / "samples.png").mode == "RGB"
    assert Image.open(folder / "samples.gif").n_frames == 2
    assert m.main(m.Args(resume=str(folder), steps=3)) == folder
    nets, args, _ = run.load(folder)
    assert m.sample(nets, args, m.latents(2, args)).shape == (2, 3, image_size, image_size)


def test_sample_report_and_evaluate_work_for_colour(pictures, tmp_path, capsys):
    places = {"dataset": str(pictures), "cache_dir": str(tmp_path / "cache"), "out_dir": str(tmp_path / "runs")}
    runs = [script(name).main(tiny(name, image_size=16, **places)) for name in SCRIPTS[:2]]
    sample.main([str(runs[0]), "--n", "70", "--out", str(tmp_path / "fake")])
    assert Image.open(tmp_path / "fake" / "000069.png").mode == "RGB"
    report.main([*map(str, runs), "--out", str(tmp_path / "report")])
    assert "FID (cifarnet)" in (tmp_path / "report" / "table.md").read_text()
    common = ["--real", str(pictures), "--cache-dir", str(tmp_path / "cache"), "--image-size", "16", "--n", "70"]
    evaluate.main([*common, "--fake", str(tmp_path / "fake"), "--json", str(tmp_path / "a.json")])
    evaluate.main([*common, "--fake", str(runs[0]), "--json", str(tmp_path / "b.json")])
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    assert a["fid"] == pytest.approx(b["fid"], rel=1e-5)
    capsys.readouterr()


def test_channels_convert_both_ways(pictures, tmp_path):
    cache = str(tmp_path / "cache")
    grey = script("lsgan").main(tiny("lsgan", dataset=str(pictures), channels=1, cache_dir=cache, out_dir=str(tmp_path)))
    assert json.loads((grey / "metrics.json").read_text())["features"] == "lenet"
    images = data.load_images("digits", channels=3, cache_dir=CACHE)
    assert images.channels == 3 and torch.equal(images.images[:9, 0], images.images[:9, 2])
