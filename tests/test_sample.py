"""common/sample.py: images of a run, paths between latents, translations of any picture."""
import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import run, sample, terminal
from tests.helpers import script, tiny


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(terminal, "quiet", True)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# ---- image GANs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of lsgan with only its arguments and its generator."""
    folder = tmp_path_factory.mktemp("run")
    args = dataclasses.replace(tiny("lsgan"), channels=1)
    saved = {"script": "lsgan", "args": dataclasses.asdict(args)}
    (folder / "args.json").write_text(json.dumps(saved))
    torch.manual_seed(0)
    torch.save(script("lsgan").build(args)["generator_ema"].state_dict(), folder / "generator.pt")
    return folder


def test_a_grid_or_single_images_of_a_run(trained, tmp_path, capsys):
    sample.main([str(trained), "--n", "10"])
    path = capsys.readouterr().out.strip()
    assert path == str(trained / "grid.png") and Image.open(path).size == (8 * 66 + 2, 2 * 66 + 2)
    many = tmp_path / "many"
    sample.main([str(trained), "--n", "5", "--seed", "3", "--out", str(many)])
    assert [f.name for f in sorted(many.iterdir())] == [f"{i:06d}.png" for i in range(5)]
    nets, args, m = run.load(trained)
    want = m.sample(nets, args, m.latents(5, args, torch.Generator().manual_seed(3)))
    got = np.stack([pixels(many / f"{i:06d}.png") for i in range(5)])
    assert np.abs(got - (want[:, 0].numpy() + 1) * 127.5).max() <= 0.5 + 1e-4
    with pytest.raises(ValueError, match="not empty"):  # two samplings do not mix
        sample.main([str(trained), "--n", "3", "--out", str(many)])
    assert len(list(many.iterdir())) == 5


@pytest.fixture
def toy(monkeypatch):
    """An image GAN whose image is its latent, so that paths can be read off the pixels."""
    m = types.SimpleNamespace(__name__="toy")
    m.latents = lambda n, args, rng=None: torch.rand(n, 32 * 32, generator=rng) * 2 - 1
    m.sample = lambda nets, args, z: z.view(-1, 1, 32, 32)
    m.between = lambda a, b, t: a + t * (b - a)
    args = types.SimpleNamespace(channels=1, image_size=32)
    monkeypatch.setattr(run, "load", lambda folder, device: ({}, args, m))
    return m


def test_rows_of_an_interpolation_follow_the_path_between_two_latents(toy, tmp_path):
    out = tmp_path / "out"
    sample.main([str(tmp_path), "--interpolate", "5", "--n", "3", "--out", str(out)])
    rows = np.stack([pixels(p) for p in sorted(out.iterdir())]).reshape(3, 5, 32, 32)
    ends = toy.latents(6, None, torch.Generator().manual_seed(0)).view(2, 3, 32, 32)
    assert np.abs(rows[:, [0, 4]] - ((ends + 1) * 127.5).numpy().swapaxes(0, 1)).max() <= 0.51
    assert np.abs(4 * rows[:, 1] - 3 * rows[:, 0] - rows[:, 4]).max() <= 4
    sample.main([str(tmp_path), "--interpolate", "5"])
    assert Image.open(tmp_path / "interpolate.png").size == (5 * 66 + 2, 8 * 66 + 2)


def test_between_two_pictures_stand_their_reconstructions_and_the_path(toy, tmp_path):
    """An encoder that darkens by 10: ends are the pictures, their neighbours 10 darker."""
    for name, shade in (("a", 50), ("b", 210)):
        Image.new("RGB", (90, 64), (shade,) * 3).save(tmp_path / f"{name}.png")
    ends = [str(tmp_path / f"{name}.png") for name in "ab"]
    with pytest.raises(ValueError, match="--between needs an encoder, which toy.py has not"):
        sample.main([str(tmp_path), "--between", *ends])
    toy.encode = lambda nets, args, x: x.flatten(1) - 10 / 127.5
    sample.main([str(tmp_path), "--between", *ends, "--interpolate", "3"])
    row = pixels(tmp_path / "between.png")
    assert row.shape == (68, 5 * 66 + 2)
    assert [row[34, 34 + 66 * i] for i in range(5)] == [50, 40, 120, 200, 210]
    with pytest.raises(ValueError, match="nothing.png cannot be read as a picture"):
        sample.main([str(tmp_path), "--between", ends[0], str(tmp_path / "nothing.png")])


def test_what_cannot_be_is_said_before_anything_is_written(toy, tmp_path):
    for words, message in (
        (["--n", "0"], "--n must be at least 1"),
        (["--interpolate", "1"], "--interpolate must be at least 2"),
        (["--seed", "12345678901234567890123"], "--seed must"),
        (["--input", "x"], "toy.py takes no pictures in"),
        (["--draws", "2"], "toy.py takes no pictures in"),
        (["--device", "tpu"], "device must be"),
        (["--sede", "1"], "did you mean --seed"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert list(tmp_path.iterdir()) == []


# ---- image to image


@pytest.fixture
def negative(monkeypatch):
    """An image-to-image script that inverts; it takes multiples of 16 from 32 on."""
    m = types.SimpleNamespace(__name__="negative")

    def translated(nets, args, x, dropout=True):
        if any(length % 16 or length < 32 for length in x.shape[2:]):
            raise RuntimeError("a size that the network cannot take")
        m.seen = x
        return -x + (torch.randn(x.shape) * args.sigma if dropout else 0)

    m.sample, m.multiple = translated, lambda args: 16
    m.args = types.SimpleNamespace(image_size=32, sigma=0.0)
    m.channels = 3

    def load(folder, device):
        net = nn.ModuleDict({"AtoB": nn.Sequential(nn.ReLU(), nn.Conv2d(m.channels, 4, 1))})
        return {"generator_ema": net}, m.args, m

    monkeypatch.setattr(run, "load", load)
    return m


def test_pictures_of_any_size_and_mode_keep_name_and_size(negative, tmp_path, capsys):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (91, 37), dtype=np.uint8)
    colour = rng.integers(0, 256, (91, 37, 3), dtype=np.uint8)
    clear = np.dstack([colour, np.where(np.arange(37) < 9, 0, 255).astype(np.uint8) + 0 * grey])
    deep = rng.integers(0, 65536, (91, 37), dtype=np.uint16)
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / ".thumbs").mkdir()
    for name, array in {
        "grey.png": grey,
        "clear.png": clear,
        "deep.png": deep,
        "sub/small.bmp": colour[:3, :5],
        "sub/line.png": colour[:1, :20],
        "twin.png": colour,
        "twin.bmp": grey,
        ".thumbs/x.png": grey,
    }.items():
        Image.fromarray(array).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    sample.main(["RUN", "--input", str(folder), "--out", str(out)])

    grey, clear[:, :9, :3] = np.dstack([grey] * 3), 255  # alpha lies on white
    deep = np.dstack([(deep / 257).round().astype(int)] * 3)
    want = {
        "grey.png": grey,
        "clear.png": clear[:, :, :3],
        "deep.png": deep,
        "sub/small.png": colour[:3, :5],
        "sub/line.png": colour[:1, :20],
        "twin.png.png": colour,
        "twin.bmp.png": grey,
    }
    found = {str(p.relative_to(out)): p for p in out.rglob("*.png")}
    assert found.keys() == want.keys()
    for name, array in want.items():
        assert np.array_equal(pixels(found[name]), 255 - array.astype(int)), name
    told = capsys.readouterr()
    assert "broken.png cannot be read" in told.err and "7 translated" in told.out


def test_the_network_sees_a_picture_reflected_at_its_rims(negative, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 31), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    negative.channels = 1
    sample.main(["RUN", "--input", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")])
    seen = ((negative.seen + 1) * 127.5).round().numpy()
    rows = [abs(y) if y < 20 else 38 - y for y in range(-6, 26)]  # of 32: six above, six below
    columns = [abs(x) if x < 31 else 60 - x for x in range(0, 32)]  # one at the right
    assert seen.shape == (1, 1, 32, 32)
    assert np.array_equal(seen[0, 0], array[np.ix_(rows, columns)])
    assert np.array_equal(pixels(tmp_path / "out" / "a.png"), 255 - array)


def test_draws_of_the_noise_come_with_their_spread(negative, tmp_path, capsys):
    Image.new("RGB", (20, 20), (127, 128, 127)).save(tmp_path / "a.png")
    negative.args.sigma = 0.1
    words = ["RUN", "--input", str(tmp_path / "a.png"), "--draws", "40", "--out"]
    sample.main([*words, str(tmp_path / "x")])
    draws = np.stack([pixels(tmp_path / "x" / f"a-{i + 1}.png") for i in range(40)])
    spread = pixels(tmp_path / "x" / "a-spread.png") / sample.SPREAD
    assert spread.shape == (20, 20)
    assert spread == pytest.approx(draws.std(0).mean(-1), abs=0.25)
    assert spread.mean() == pytest.approx(12.75, rel=0.05)  # .1 of 127.5, less 1 in 80
    mean = float(capsys.readouterr().out.split("spread ")[1].split()[0])
    assert mean == pytest.approx(spread.mean(), abs=0.1)
    Image.new("RGB", (50, 9)).save(tmp_path / "b.png")  # draws are those of the picture alone
    sample.main(["RUN", "--input", str(tmp_path), "--draws", "2", "--out", str(tmp_path / "y")])
    assert np.array_equal(pixels(tmp_path / "y" / "a-2.png"), draws[1])
    sample.main([*words[:3], "--dropout", "off", "--out", str(tmp_path / "z")])
    assert np.unique(pixels(tmp_path / "z" / "a.png")).tolist() == [127, 128]


def test_a_direction_reaches_a_script_that_has_one(negative, tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    words = ["RUN", "--input", str(tmp_path / "a.png"), "--direction", "BtoA", "--out"]
    with pytest.raises(ValueError, match="--direction is nothing that negative.py can choose"):
        sample.main([*words, str(tmp_path / "x")])
    negative.sample = lambda nets, args, x, direction="AtoB": x if direction == "BtoA" else -x
    sample.main([*words, str(tmp_path / "x")])
    assert pixels(tmp_path / "x" / "a.png")[0, 0].tolist() == [100] * 3


def test_what_cannot_be_translated_is_said(negative, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").write_bytes(b"")
    source, out = ["--input", str(tmp_path / "a.png")], ["--out", str(tmp_path / "out")]
    for words, message in (
        ([], "give --input and --out"),
        (source, "give --input and --out"),
        ([*source, *out, "--n", "3"], "no latents"),
        ([*source, "--out", str(tmp_path / "full")], "not empty"),
        (["--input", str(tmp_path / "none"), *out], "none is not there"),
        ([*source, *out, "--draws", "3", "--dropout", "off"], "all draws are the same"),
        (["--input", str(tmp_path / "full"), *out], "no picture that can be read"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main(["RUN", *words])
