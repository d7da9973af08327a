"""common/report.py: runs side by side, and the page to look at."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from common import cli, pictures, report

SCORES = "step,seconds,n,features,fid,precision,recall,density,coverage,psnr"


def made(folder, script="lsgan", features="lenet", fid=2.5, steps=(0, 100), **args):
    """A run folder as a training leaves it."""
    args = {"dataset": "digits", "lr": 0.002, "seed": 0, "out_dir": "runs", "threads": 1} | args
    (folder / "samples").mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script, "args": args}))
    (folder / "log.csv").write_text("step,seconds,images,loss_d\n1,1,64,.5\n2,2,128,.25\n")
    (folder / "metrics.csv").write_text(f"{SCORES}\n2,61.7,64,{features},{fid},.5,.25,1.125,1,20\n")
    for step in steps:
        sheet = pictures.to_sheet(torch.full((9, 1, 32, 32), step / 500 - 1))
        sheet.save(folder / "samples" / f"{step:06d}.png")
    return folder


class Page(HTMLParser):
    """What index.html in a folder names: pictures, steps of sliders, text in cells."""

    def __init__(self, folder):
        super().__init__()
        self.pictures, self.grids, self.steps, self.cells, self.tags = [], [], [], [], [""]
        self.text = (Path(folder) / "index.html").read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(unquote(attrs["src"]))
            grids = json.loads(attrs.get("data-grids", "[]"))
            self.grids.append([(t, unquote(path)) for t, path in grids])
        if tag == "input":
            self.steps.append(json.loads(attrs["data-steps"]))

    def handle_data(self, text):
        if self.tags[-1] in ("td", "th") and text.strip():
            self.cells.append(text.strip())


def test_the_page_of_a_run_names_pictures_that_are_there(tmp_path, capsys):
    folder = made(tmp_path / "a run & more #1")
    report.main([str(folder)])
    page = Page(folder)
    assert page.pictures == ["samples/000100.png", "progress.png", "curves.png"]
    assert page.grids[0] == [(0, "samples/000000.png"), (100, "samples/000100.png")]
    for name in page.pictures + [p for _, p in page.grids[0]]:
        Image.open(folder / name).verify()
    assert page.steps == [[0, 100]]
    assert not re.search(r"https?:|//|@import|src=\"/", page.text)  # nothing from outside
    assert {"FID (lenet)", "2.5", "1.125", "lr", "0.002"} <= set(page.cells)
    told = capsys.readouterr().out
    assert "FID (lenet) 2.5" in told and str(folder / "index.html") in told


def test_names_cannot_break_the_page_or_the_table(tmp_path):
    a = made(tmp_path / "a", dataset='<b>"x"|y')
    b = made(tmp_path / "b")
    text = report.compare([a, b], tmp_path / "out")
    assert 'lsgan dataset <b>"x"\\|y |' in text
    page = Page(tmp_path / "out")
    assert "b" not in page.tags and 'lsgan dataset <b>"x"|y' in page.cells


def test_several_runs_lie_side_by_side(tmp_path, capsys):
    a = made(tmp_path / "a")
    b = made(tmp_path / "b #1 50%25", "icr_gan", fid=12.345, steps=(0, 50, 100))
    out = tmp_path / "out"
    report.main([str(a), str(b), "--out", str(out)])
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].split(" | ")[4:7] == ["features", "FID (lenet)", "precision"]
    assert lines[2:] == [
        "| lsgan | 2 | 62 | 64 | lenet | 2.5 | 0.5 | 0.25 | 1.125 | 1 | 20 |",
        "| icr_gan | 2 | 62 | 64 | lenet | 12.35 | 0.5 | 0.25 | 1.125 | 1 | 20 |",
    ]
    assert lines[3] in capsys.readouterr().out
    assert Image.open(out / "samples.png").width == 2 * 530 + 8
    page = Page(out)
    assert page.steps == [[0, 50, 100]]
    assert [[t for t, _ in some] for some in page.grids[:2]] == [[0, 100], [0, 50, 100]]
    for name in page.pictures + [p for some in page.grids for _, p in some]:
        Image.open(out / name).verify()
        assert not Path(name).is_absolute() and ".." not in name  # the folder can be moved
    assert list(page.cells[-3:]) == ["script", "lsgan", "icr_gan"]


def test_curves_of_several_runs_share_axes(tmp_path, monkeypatch):
    drawn, chart = {}, pictures.chart
    monkeypatch.setattr(
        pictures, "chart", lambda title, *rest: drawn.update({title: rest}) or chart(title, *rest)
    )
    report.compare([made(tmp_path / "a"), made(tmp_path / "b", fid=3, seed=1)], tmp_path / "out")
    assert [(label, ys) for label, _, ys in drawn["FID (lenet)"][0]] == [
        ("lsgan seed 0", [2.5]),
        ("lsgan seed 1", [3.0]),
    ]
    assert set(drawn) == {"loss_d", "FID (lenet)", *pictures.SHARES, "psnr"}
    assert [title for title, (_, share) in drawn.items() if share] == list(pictures.SHARES)


def test_scores_of_different_features_never_share_a_column_or_a_chart(tmp_path, monkeypatch):
    titles, chart = [], pictures.chart
    monkeypatch.setattr(
        pictures, "chart", lambda title, *rest: titles.append(title) or chart(title, *rest)
    )
    a, b = made(tmp_path / "a"), made(tmp_path / "b", features="inception", seed=1)
    first, second = report.compare([a, b], tmp_path / "out").split("\n\n")
    assert "| FID (lenet) |" in first and "seed 0" in first and "seed 1" not in first
    assert "| FID |" in second and "seed 1" in second and "seed 0" not in second
    assert "precision (lenet)" in titles and "precision (inception)" in titles and "FID" in titles


def test_a_run_without_scores_is_still_shown(tmp_path):
    a, b = made(tmp_path / "a"), made(tmp_path / "b", seed=1)
    for name in ("metrics.csv", "log.csv"):
        (a / name).unlink()
    assert "| lsgan seed 0 | not scored yet |" in report.compare([a, b], tmp_path / "out")
    report.main([str(a)])
    assert Page(a).pictures == ["samples/000100.png", "progress.png"]


@pytest.mark.parametrize(
    "runs, wanted",
    [
        ([("lsgan", {}), ("wgan_gp", {"lr": 1e-4})], ["lsgan", "wgan_gp"]),
        (
            [("lsgan", {}), ("wgan_gp", {}), ("wgan_gp", {"lr": 1e-4})],
            ["lsgan", "wgan_gp lr 0.002", "wgan_gp lr 0.0001"],
        ),
        (
            [("lsgan", {}), ("my_gan", {"dataset": "mnist"})],
            ["lsgan dataset digits", "my_gan dataset mnist"],
        ),
        ([("lsgan", {}), ("lsgan", {"threads": 2})], ["lsgan (0)", "lsgan (1)"]),
        ([("a", {}), ("b", {"max_minutes": 2.5})], ["a", "b max_minutes 2.5"]),
    ],
)
def test_a_run_is_named_by_what_it_does_not_share(tmp_path, runs, wanted):
    made_runs = [made(tmp_path / str(i), name, **args) for i, (name, args) in enumerate(runs)]
    assert report.labels(made_runs, [cli.read_args(r) for r in made_runs]) == wanted


def test_equal_folder_names_do_not_hide_a_run(tmp_path):
    a, b = made(tmp_path / "A" / "x"), made(tmp_path / "B" / "x", fid=7)
    text = report.compare([a, b], tmp_path / "out")
    assert f"lsgan ({a})" in text and f"lsgan ({b})" in text and "| 7 |" in text
    assert len({p for some in Page(tmp_path / "out").grids for _, p in some}) == 4


def test_reports_among_runs_are_passed_over(tmp_path, capsys):
    for name in "ab":
        made(tmp_path / name, seed=ord(name))

    def every():
        return map(str, sorted(tmp_path.iterdir()))

    report.main([*every(), "--out", str(tmp_path / "report")])
    first = (tmp_path / "report" / "index.html").read_bytes()
    again = str(tmp_path / "b" / ".." / "a")  # shown once
    report.main([*every(), again, "--out", str(tmp_path / "report")])
    assert (tmp_path / "report" / "index.html").read_bytes() == first
    assert f"{tmp_path / 'report'} is a report" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no run folder among"):
        report.main([str(tmp_path / "report")])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other is no run folder"):
        report.main([*every()])
    with pytest.raises(ValueError, match="is a run folder"):
        report.main([str(tmp_path / "a"), "--out", str(tmp_path / "b")])
