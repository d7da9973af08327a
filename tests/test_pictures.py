"""common/pictures.py: pixels of grids are where they belong; what is drawn of a run."""
import numpy as np
import pytest
import torch
from PIL import Image

from common import pictures


@pytest.fixture
def drawn(monkeypatch):
    """{title: (series, share)} of the charts that are drawn."""
    found, chart = {}, pictures.chart

    def record(title, series, share=False):
        found[title] = (series, share)
        return chart(title, series, share)

    monkeypatch.setattr(pictures, "chart", record)
    return found


def write_table(path, rows):
    head = list(rows[0])
    lines = [",".join(head)] + [",".join(str(r[k]) for k in head) for r in rows]
    path.write_text("\n".join(lines) + "\n")


# ---- grids


def test_a_grid_places_images_in_rows_and_enlarges_small_ones():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 32, 32) * 50
    sheet = pictures.grid(images, 3)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    corners = [(2 + 66 * c, 2 + 66 * r) for r in (0, 1) for c in (0, 1, 2)]
    assert [sheet.getpixel(at) for at in corners] == [0, 50, 100, 150, 200, pictures.FRAME]
    assert [sheet.getpixel((x + 63, y + 63)) for x, y in corners[:5]] == [0, 50, 100, 150, 200]
    assert pictures.grid(images.expand(5, 3, 32, 32)).size == (5 * 66 + 2, 66 + 2)
    assert pictures.grid(torch.zeros(1, 3, 128, 96, dtype=torch.uint8)).size == (100, 132)


def test_a_grid_keeps_every_pixel_and_channel():
    images = torch.randint(0, 256, (12, 3, 70, 71), dtype=torch.uint8)
    sheet = np.asarray(pictures.grid(images))
    for i, image in enumerate(images):
        y, x = 2 + i // 8 * 72, 2 + i % 8 * 73
        assert np.array_equal(sheet[y : y + 70, x : x + 71], image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pictures.to_picture(images[3, :1])), images[3, 0].numpy())


def test_rows_of_what_a_script_draws():
    images = torch.linspace(-1, 1, 6).view(2, 3, 1, 1, 1).expand(2, 3, 1, 64, 64)
    sheet = pictures.to_sheet(images)
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    got = [sheet.getpixel((9 + 66 * c, 9 + 66 * r)) for r in (0, 1) for c in (0, 1, 2)]
    assert got == [0, 51, 102, 153, 204, 255]
    assert pictures.to_sheet(torch.zeros(9, 3, 64, 64)).size == (8 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize("shape, height", [((16, 1, 32, 32), 68), ((3, 2, 3, 80, 64), 84)])
@pytest.mark.parametrize("shade", (-1.0, 0.0, 1.0))
def test_the_first_row_of_a_grid_is_found_also_among_plain_images(shape, height, shade):
    sheet = pictures.to_sheet(torch.full(shape, shade))
    row = pictures.first_row(sheet)
    assert row.size == (sheet.width, height)
    assert row.tobytes() == sheet.crop((0, 0, *row.size)).tobytes()


# ---- charts


def test_a_chart_puts_its_line_where_the_numbers_are():
    """A constant, then a rise: the ink moves up."""
    chart = pictures.chart("title", [("a", [0, 50, 100], [0.0, 0.0, 1.0])])
    pixels = np.asarray(chart)[56:270, 60:464].astype(int)
    ys, xs = np.nonzero(pixels[:, :, 2] > pixels[:, :, 0] + 60)
    assert chart.size == (480, 300)
    assert ys[xs < 140].min() > 185 and ys[xs > 395].min() < 20


def test_lines_keep_their_colour_where_another_has_no_numbers():
    chart = pictures.chart("t", [("a", [], []), ("b", [0, 1], [1.0, 1.0])])
    colours = {pixel for _, pixel in chart.getcolors(1 << 20)}
    red, blue = (tuple(bytes.fromhex(c[1:])) for c in ("#d62728", "#1f77b4"))
    assert red in colours and blue not in colours


def test_an_axis_is_logarithmic_where_values_span_fifty_fold():
    """A geometric series is a straight line there: at half the steps, half the height."""
    xs = list(range(0, 101, 2))
    chart = pictures.chart("t", [("", xs, [10 ** (3 * x / 100) for x in xs])])
    pixels = np.asarray(chart)[:, 60:464].astype(int)
    ys, at = np.nonzero(pixels[:, :, 2] > pixels[:, :, 0] + 60)
    heights = [ys[at == x].mean() for x in (20, 202, 384)]
    assert heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=1.5)


def test_long_lines_are_thinned_to_means():
    xs, ys = pictures.thinned(list(range(1000)), [0.0, 1.0, 2.0, 3.0, 4.0] * 200, 200)
    assert xs == list(range(4, 1000, 5)) and ys == [2.0] * 200
    assert pictures.thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
    assert pictures.spread(list(range(100)), 4) == [0, 33, 66, 99]


def test_only_inception_gives_a_plain_fid():
    assert pictures.fid_label("inception") == "FID"
    assert pictures.fid_label("lenet") == "FID (lenet)"
    assert pictures.fid_label("cifarnet", "kid_AtoB") == "KID (cifarnet) AtoB"
    assert pictures.fid_label("lenet", "psnr") == "psnr"


def test_a_caption_takes_the_lines_it_needs():
    picture = Image.new("RGB", (200, 50))
    assert pictures.captioned(picture, "a").size == (200, 74)
    long = pictures.captioned(picture, "a name as long as three arguments and their values")
    assert long.size == (200, 50 + 8 + 16 * 3)
    assert long.crop((196, 0, 200, 56)).getcolors() == [(4 * 56, (255, 255, 255))]  # nothing cut


# ---- one run


@pytest.fixture
def folder(tmp_path):
    """A run folder with two sets of pictures and columns that nobody has heard of."""
    for name, shape in (("samples", (16, 1, 32, 32)), ("triples", (2, 3, 3, 64, 64))):
        (tmp_path / name).mkdir()
        for step in range(0, 70):
            sheet = pictures.to_sheet(torch.full(shape, step / 35 - 1))
            sheet.save(tmp_path / name / f"{step:06d}.png")
    (tmp_path / "samples" / "notes.png").write_bytes(b"")
    values = [{"step": t, "seconds": t, "images": t} for t in (1, 2)]
    logs = {"loss_d": 1, "loss_x": 2, "wug_a": 3, "fep": 5}
    write_table(tmp_path / "log.csv", [v | logs | {"wug_b": v["step"]} for v in values])
    four = dict.fromkeys(pictures.SHARES, 0.5)
    scores = {"n": 64, "features": "lenet", "fid": 2.5} | four
    scores |= {"wug": 7, "kid_a": 1, "on": "test"}
    write_table(tmp_path / "metrics.csv", [v | scores for v in values])
    return tmp_path


def test_every_set_has_its_last_grid_strip_and_animation(folder):
    pictures.of_run(folder)
    for name, strip, size in (
        ("samples", "progress.png", (8 * 66 + 2, 68)),
        ("triples", "triples-progress.png", (3 * 66 + 2, 68)),
    ):
        last = Image.open(folder / name / "000069.png")
        assert Image.open(folder / f"{name}.png").tobytes() == last.tobytes()
        image = Image.open(folder / strip)
        assert image.size == (size[0] + 64, pictures.STEPS * size[1])
        shades = [image.getpixel((64 + 9, 68 * i + 9))[0] for i in range(pictures.STEPS)]
        steps = pictures.spread(list(range(70)), pictures.STEPS)
        assert shades == [round(255 * s / 70) for s in steps]
        animation = Image.open(folder / f"{name}.gif")
        assert animation.n_frames == pictures.FRAMES and animation.size == last.size
    assert not list(folder.glob("*.tmp"))


def test_every_column_of_numbers_gets_a_line_whatever_its_name(folder, drawn):
    pictures.of_run(folder)
    lines = {title: [label for label, *_ in series] for title, (series, _) in drawn.items()}
    assert lines == {
        "losses": ["loss_d", "loss_x"],
        "wug_a, wug_b": ["wug_a", "wug_b"],
        "fep": [""],
        ", ".join(pictures.SHARES): list(pictures.SHARES),
        "FID (lenet)": [""],
        "wug": [""],
        "KID (lenet) a": [""],
    }
    assert [title for title, (_, share) in drawn.items() if share] == [", ".join(pictures.SHARES)]
    assert drawn["wug_a, wug_b"][0][1] == ("wug_b", [1, 2], [1.0, 2.0])
    assert Image.open(folder / "curves.png").width == 3 * 480 + 16


def test_steps_are_in_order_beyond_a_million(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (5, 1000000, 999500):
        Image.new("L", (9, 9)).save(tmp_path / "samples" / f"{step:06d}.png")
    assert [t for t, _ in pictures.grids(tmp_path)["samples"]] == [5, 999500, 1000000]


def test_a_run_that_has_nothing_yet_is_no_error(tmp_path):
    pictures.of_run(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert pictures.summary(tmp_path) == f"{tmp_path}/  "


def test_the_summary_tells_scores_with_their_n_and_features(folder):
    pictures.of_run(folder)
    told, paths = pictures.summary(folder).splitlines()
    assert told.startswith("FID (lenet) 2.5, precision 0.5, ") and "wug 7" in told
    assert told.endswith("(n 64, features lenet)") and "test" not in told
    for name in ("samples.png", "progress.png", "triples.gif", "curves.png"):
        assert name in paths.split()
    assert "generator.pt" not in paths


def test_what_is_no_finite_number_is_left_out():
    rows = [{"step": "1", "a": "nan"}, {"step": "2", "a": "3"}, {"step": "3", "a": ""}]
    rows.append({"step": "4"})
    assert pictures.numbers(rows, "a") == ([2], [3.0])
    assert pictures.columns([rows, [{"step": "1", "b": "x", "c": "1"}]]) == ["a", "c"]
