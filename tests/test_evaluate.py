"""python -m common.evaluate: every kind of input, what it prints, what it refuses."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import data, evaluate, features, fid, scores, synthetic
from tests.helpers import script, tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders real and fake of 140 and 150 grey pictures of 32 px, and a cache."""
    folder = tmp_path_factory.mktemp("evaluate")
    images = synthetic.digits(290, seed=5)[0]
    for i, image in enumerate(torch.nn.functional.pad(images, (2, 2, 2, 2)).squeeze(1).numpy()):
        path = folder / ("real" if i < 140 else "fake") / "deep" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture
def run(place, tmp_path, capsys):
    """run(words) -> (row from --json, what was printed)."""

    def call(*words, real=None):
        a = ["--real", str(real or place / "real"), "--cache-dir", str(place / "cache")]
        evaluate.main([*a, *map(str, words), "--json", str(tmp_path / "row.json")])
        return json.loads((tmp_path / "row.json").read_text()), capsys.readouterr().out

    return call


def pixels(place, name):
    return data.load_images(place / name, cache_dir=place / "cache").images


def drawn(place, n):
    """The real and the generated images that --n n takes."""
    real, fake = pixels(place, "real"), pixels(place, "fake")
    return real[scores.drawn_rows(140, n)], fake[scores.drawn_rows(150, n)]


def test_a_folder_is_scored_as_by_hand_and_every_line_names_both_sides(place, run):
    row, out = run("--fake", place / "fake", "--metrics", ",".join(evaluate.METRICS))
    images = {"": drawn(place, 150)[1], "_real": pixels(place, "real")}  # in the order of drawing
    real, fake = features.extract(drawn(place, 150)[0]), features.extract(images[""])
    assert row["fid"] == pytest.approx(fid.frechet_from_features(fake, real), abs=1e-5)
    assert row["kid"] == pytest.approx(fid.kid(fake, real)[0], abs=1e-5)
    near = evaluate.precision_recall(real, fake)
    assert {m: row[m] for m in near} == pytest.approx(near, abs=1e-6)
    score = scores.inception_score(features.logits(fake, "lenet"))
    assert (row["is"], row["is_std"]) == pytest.approx(score, abs=1e-5)
    for name, x in images.items():
        assert row["diversity" + name] == pytest.approx(scores.diversity(x), abs=1e-6)
        assert row["variance" + name] == pytest.approx(scores.pixel_variance(x), abs=1e-6)
    assert row["diversity_noised"] > row["diversity_real"]
    head, *lines = out.splitlines()
    sides = f"{place / 'fake'} against {place / 'real'} (all images)"
    assert head == f"{sides}, features lenet, 1 x 32 px"
    assert [line.split("  ")[1] for line in lines] == [
        "FID (lenet)", "KID (lenet)", "precision", "recall", "density", "coverage", "IS (lenet)",
        "diversity", "variance",
    ]  # fmt: skip
    assert all("150 generated" in line for line in lines)
    assert all("140 real" in line for line in lines[:6])
    assert row["n"] == 150 and row["real_images"] == 140 and row["split"] == "all images"


def test_only_what_is_asked_for_is_measured(place, run):
    row, out = run("--fake", place / "fake", "--metrics", "recall", "--n", "100")
    assert {"fid", "precision", "kid"}.isdisjoint(row) and len(out.splitlines()) == 2
    want = evaluate.precision_recall(*(features.extract(x) for x in drawn(place, 100)))["recall"]
    assert row["recall"] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_give_the_numbers_of_their_folder(layout, place, run, tmp_path):
    x = pixels(place, "fake")
    x = {"NHWC": x.permute(0, 2, 3, 1), "NCHW": x, "NHW": x[:, 0]}[layout]
    np.save(tmp_path / "fake.npy", x.numpy())
    folder, array = (run("--fake", f)[0] for f in (place / "fake", tmp_path / "fake.npy"))
    assert {**folder, "fake": 0} == {**array, "fake": 0}


def test_statistics_go_to_pytorch_fid_and_come_from_it(place, run, tmp_path, capsys):
    real = ["--real", str(place / "real"), "--cache-dir", str(place / "cache")]
    evaluate.main([*real, "--stats", str(tmp_path / "s.npz")])
    with np.load(tmp_path / "s.npz") as f:
        found = features.extract(pixels(place, "real")).numpy().astype(np.float64)
        assert np.allclose(f["mu"], found.mean(0))
        assert np.allclose(f["sigma"], np.cov(found, rowvar=False))
    row, out = run("--fake", place / "fake", real=tmp_path / "s.npz")
    assert row["fid"] == pytest.approx(run("--fake", place / "fake")[0]["fid"], abs=1e-5)
    assert "the file's real" in out and row["split"] == "statistics"
    with pytest.raises(ValueError, match="mean and covariance alone"):
        run("--fake", place / "fake", "--metrics", "fid,recall", real=tmp_path / "s.npz")


def test_a_run_its_checkpoint_and_its_samples_as_a_folder_score_alike(place, run, tmp_path):
    where = {"out_dir": tmp_path, "cache_dir": place / "cache", "dataset": place / "real"}
    folder = script("lsgan").main(tiny("lsgan", **{k: str(v) for k, v in where.items()}))
    whole, out = run("--fake", folder, "--n", "70", "--seed", "3")
    assert "70 generated, 140 real" in out
    loaded = run("--fake", folder / "checkpoint.pt", "--n", "70", "--seed", "3")[0]
    assert {**loaded, "fake": 0} == {**whole, "fake": 0}
    from common.run import load

    nets, args, m = load(folder)
    z = m.latents(70, args, torch.Generator().manual_seed(3))
    np.save(tmp_path / "x.npy", data.to_uint8(m.sample(nets, args, z)).numpy())
    assert run("--fake", tmp_path / "x.npy")[0]["fid"] == pytest.approx(whole["fid"], rel=1e-4)
    with pytest.raises(ValueError, match="run makes 1 x 32 px images, the real side is 1 x 64"):
        run("--fake", folder, "--image-size", "64")


def test_the_floor_is_the_held_out_split(place, run, tmp_path):
    (tmp_path / "set").mkdir()
    for split, name in (("train", "real"), ("test", "fake")):
        (tmp_path / "set" / split).symlink_to(place / name)
    row, out = run("--floor", real=tmp_path / "set")
    assert row["fid"] == pytest.approx(run("--fake", place / "fake")[0]["fid"], rel=1e-9)
    assert row["fake"] == "held-out split" and row["split"] == "training split"
    with pytest.raises(ValueError, match="no held-out split"):
        run("--floor")


def test_inception_sees_pictures_at_their_own_size(place, run, monkeypatch):
    """A folder of 32 px stays at 32; what was found by other names is no FID."""
    seen = []

    def extract(images, name, device="cpu"):
        seen.append((tuple(images.shape[1:]), name))
        return torch.randn(len(images), 4, generator=torch.Generator().manual_seed(len(seen)))

    monkeypatch.setattr(features, "extract", extract)
    monkeypatch.setattr(features, "version", lambda name: "none")
    labels = {"inception": "FID ", "inception-bf16": "FID (inception-bf16)", "vgg16": "FID (vgg16)"}
    for name, label in labels.items():
        out = run("--fake", place / "fake", "--features", name, "--metrics", "fid", "--n", "99")[1]
        assert out.splitlines()[1].strip().startswith(label)
    assert {shape for shape, _ in seen} == {(1, 32, 32)}


def test_twenty_images_against_many_are_warned_of(place, run, capsys):
    scores.warn_few.cache_clear()
    a = ["--real", str(place / "real"), "--cache-dir", str(place / "cache"), "--n", "20"]
    evaluate.main([*a, "--fake", str(place / "fake")])
    said = "20 generated and 140 real images in 128 dimensions is mostly bias"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--fake", "FAKE", "--n", "5"], "--n must be from 6"),
    (["--fake", "FAKE", "--image-size", "-5"], "--image-size must be from 8"),
    (["--fake", "FAKE", "--seed", "9" * 23], "--seed must be from 0"),
    ([], "give one of --fake"),
    (["--fake", "FAKE", "--floor"], "give one of --fake"),
    (["--fake", "FAKE", "--metrics", "fdi"], "fdi is none of fid, .*did you mean fid"),
    (["--fake", "FAKE", "--features", "lenet5"], "'lenet5'.*auto, lenet"),
    (["--fake", "FAKE", "--weights", "w.pth"], "--weights is for inception and vgg16"),
    (["--fake", "NOWHERE"], "nowhere"),
    (["--fake", "FLOATS.npy"], r"float64 \[3, 4, 4, 1\]; wanted uint8"),
    (["--fake", "NOWHERE.npy"], "cannot be read as an array"),
    (["--fake", "SMALL.npy"], r"holds \[1, 4, 4\] images, wanted 1 x 32 x 32"),
])  # fmt: skip
def test_what_is_refused(words, said, place, run, tmp_path):
    np.save(tmp_path / "FLOATS.npy", np.zeros((3, 4, 4)))
    np.save(tmp_path / "SMALL.npy", np.zeros((9, 4, 4), np.uint8))
    places = {"FAKE": place / "fake", "NOWHERE": tmp_path / "nowhere"}
    words = [str(places.get(w, tmp_path / w if w.endswith(".npy") else w)) for w in words]
    with pytest.raises((ValueError, OSError), match=said):
        run(*words)


def test_a_broken_npz_is_named(place, run, tmp_path):
    (tmp_path / "s.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="s.npz does not hold mu and sigma"):
        run("--fake", place / "fake", real=tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="s.npz does not hold mu and sigma"):
        run("--fake", place / "fake", real=tmp_path / "s.npz")
