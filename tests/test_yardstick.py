"""tests/benchmarks/yardstick.py: its baseline is what it claims, its scores tell good from bad."""
import json
import os
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsgan
from common import data, run, synthetic
from common.fid import frechet_from_features
from common.precision_recall import precision_recall
from tests.benchmarks import yardstick
from tests.helpers import shell, tiny


@pytest.fixture(scope="module")
def images():
    """2,500 of the built-in digits and a held-out split, in 32 x 32."""
    x, y = synthetic.digits(3000, seed=3)
    x = F.pad(x, (2, 2, 2, 2))
    return data.Images(x[:2500], y[:2500], data.Images(x[2500:], y[2500:]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ref(images, cache):
    return yardstick.reference(images, cache)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A run folder of lsgan as training leaves it, as far as scoring reads it."""
    args = tiny("lsgan", n_critic=3, channels=1)
    folder = tmp_path_factory.mktemp("runs") / "lsgan-digits"
    folder.mkdir()
    torch.manual_seed(5)
    nets = lsgan.build(args)
    torch.save(nets["generator_ema"].state_dict(), folder / "generator.pt")
    values = asdict(args)
    del values["resume"]
    (folder / "args.json").write_text(json.dumps({"script": "lsgan", "args": values}))
    (folder / "metrics.json").write_text(json.dumps({"step": 40, "seconds": 2.0}))
    return folder


def parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---- the baseline ----------------------------------------------------------------------------


def g_parameters(z_dim, width):
    dims = [z_dim, 4 * width, 2 * width, width]
    blocks = sum(i * o * 16 + 2 * o for i, o in zip(dims, dims[1:]))  # no bias before BatchNorm
    return blocks + width * 16 + 1


def d_parameters(width):
    blocks = sum(i * o * 16 + 2 * o for i, o in ((width, 2 * width), (2 * width, 4 * width)))
    return 16 * width + width + blocks + 4 * width * 16 + 1


def test_baseline_has_the_networks_of_dcgan_at_32_pixels():
    # the formulas against published counts at other widths, then the networks against the formulas
    assert g_parameters(100, 128) == 3_444_481 and g_parameters(100, 64) == 1_066_881
    assert d_parameters(64) == 661_313 and d_parameters(32) == 166_817
    g, d = yardstick.Generator(), yardstick.Discriminator()
    assert parameters(g) == g_parameters(100, 32)
    assert parameters(d) == d_parameters(32)
    assert [m.num_features for m in g.modules() if isinstance(m, nn.BatchNorm2d)] == [128, 64, 32]
    assert [m.num_features for m in d.modules() if isinstance(m, nn.BatchNorm2d)] == [64, 128]
    assert {m.eps for m in [*g.modules(), *d.modules()] if isinstance(m, nn.BatchNorm2d)} == {1e-5}


def test_baseline_starts_from_the_normal_distributions_of_dcgan():
    torch.manual_seed(0)
    for m in yardstick.init(yardstick.Generator()).modules():
        if isinstance(m, nn.ConvTranspose2d):
            assert abs(m.weight.mean()) < 0.004 and 0.018 < m.weight.std() < 0.022
        if isinstance(m, nn.BatchNorm2d):
            assert abs(m.weight.mean() - 1) < 0.02 and 0.01 < m.weight.std() < 0.03
            assert not m.bias.any()


def test_images_are_in_range_and_scores_are_one_unbounded_number_each():
    torch.manual_seed(0)
    g, d = yardstick.init(yardstick.Generator()), yardstick.init(yardstick.Discriminator())
    x = g(100 * torch.randn(5, 100))
    assert x.shape == (5, 1, 32, 32) and x.abs().max() <= 1
    d.body[-1].bias.data.fill_(3.0)  # a sigmoid would stop at 1
    assert d(x).shape == (5,) and d(x).mean() > 2


def test_losses_at_constant_scores():
    for score, d_loss, g_loss in ((0.0, 0.5, 0.5), (0.5, 0.25, 0.125), (1.0, 0.5, 0.0)):
        d = torch.full((3,), score)
        assert yardstick.discriminator_loss(d, d).item() == d_loss
        assert yardstick.generator_loss(d).item() == g_loss


def test_losses_want_real_to_score_one():
    one, zero = torch.ones(3), torch.zeros(3)
    assert yardstick.discriminator_loss(one, zero).item() == 0
    assert yardstick.discriminator_loss(zero, one).item() == 1


def test_each_update_moves_its_own_network_and_shows_d_one_set_at_a_time():
    torch.manual_seed(0)
    g, d = yardstick.init(yardstick.Generator()), yardstick.init(yardstick.Discriminator())
    update_d, update_g = yardstick.updates(g, d)
    seen = []
    d.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    real = torch.rand(8, 1, 32, 32) * 2 - 1

    def values(net):
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    old_g, old_d = values(g), values(d)
    update_d(real)
    assert len(seen) == 2 and seen[0] is real and seen[1].shape == real.shape
    assert not seen[1].requires_grad and all(p.grad is None for p in g.parameters())
    assert torch.equal(values(g), old_g) and not torch.equal(values(d), old_d)

    old_d, grads = values(d), [p.grad.clone() for p in d.parameters()]
    update_g(8)
    assert len(seen) == 3 and not torch.equal(seen[2], seen[1])
    assert all(p.grad.any() for p in g.parameters()) and not torch.equal(values(g), old_g)
    assert torch.equal(values(d), old_d)
    assert all(torch.equal(p.grad, old) for p, old in zip(d.parameters(), grads))
    assert all(p.requires_grad for p in d.parameters())


def test_baseline_follows_its_seed_and_ends_at_its_limits(images):
    a, b, c = (yardstick.train_baseline(images, steps=2, seed=s) for s in (0, 0, 1))
    assert a[1] == b[1] == 2 and not a[0].training
    x, y, z = (yardstick.sample_baseline(g, 6) for g, _, _ in (a, b, c))
    assert torch.equal(x, y) and not torch.equal(x, z)
    assert x.dtype == torch.uint8 and x.shape == (6, 1, 32, 32)
    assert yardstick.train_baseline(images, seconds=1e-9)[1] == 1


# ---- the classifier and its scores -----------------------------------------------------------


def test_classifier_learns_and_is_kept(images, ref, cache):
    assert ref["accuracy"] > 0.8
    assert ref["train"].shape == (2500, 96) and ref["test"].shape == (500, 96)
    again = yardstick.reference(images, cache)
    assert again["seconds"] == ref["seconds"]  # of the same training, to the last digit
    other = replace(images, images=images.images[:256], labels=images.labels[:256])
    assert yardstick.reference(other, cache)["seconds"] != ref["seconds"]


def test_classifier_of_a_reference_gives_the_features_it_was_kept_with(images, ref):
    found = yardstick.extract(yardstick.classifier_of(ref), images.test.images[:64])
    torch.testing.assert_close(found, ref["test"][:64], rtol=1e-4, atol=1e-4)


def test_scores_tell_digits_from_noise_and_from_one_digit_repeated(images, ref):
    real = yardstick.score(images.images, ref)
    held_out = yardstick.score(images.test.images, ref)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (500, 1, 32, 32), dtype=torch.uint8, generator=rng)
    noise = yardstick.score(noise, ref)
    collapsed = yardstick.score(images.images[:1].expand(500, -1, -1, -1), ref)
    assert real["distance"] < 1e-3 and real["precision"] == real["recall"] == 1
    assert held_out["distance"] < 0.1 * min(noise["distance"], collapsed["distance"])
    assert held_out["precision"] > 0.7 and held_out["recall"] > 0.5
    assert noise["precision"] < 0.1
    assert collapsed["recall"] < 0.1


def test_distance_is_to_all_real_images_and_neighbours_are_of_as_many(ref):
    train, some = ref["train"], ref["test"][:200]
    found = yardstick.compare(some, train)
    assert found["distance"] == frechet_from_features(train, some)
    near = precision_recall(yardstick.drawn(train, 200), some)
    assert (found["precision"], found["recall"]) == (near["precision"], near["recall"])
    assert len(yardstick.drawn(train, 200).unique(dim=0)) == 200


# ---- runs and commands -----------------------------------------------------------------------


def test_a_run_is_sampled_by_its_script_from_fixed_latents(a_run):
    nets, args, script = yardstick.load_run(a_run)
    found = yardstick.sample_run(nets, args, script, 300)
    z = script.latents(300, args, torch.Generator().manual_seed(yardstick.SAMPLE_SEED))
    assert torch.equal(found[256:], data.to_uint8(script.sample(nets, args, z[256:])))
    torch.manual_seed(99)
    assert torch.equal(found, yardstick.sample_run(*yardstick.load_run(a_run), 300))


def test_cost_counts_the_real_images_of_every_update_of_d(a_run, tmp_path):
    args = yardstick.load_run(a_run)[1]
    assert (args.n_critic, args.batch_size) == (3, 8)
    assert yardstick.cost(a_run, args) == dict(steps=40, seconds=2.0, images_per_second=480.0)
    assert yardstick.cost(tmp_path, args) == {}
    (tmp_path / "metrics.json").write_text('{"step": 4')
    with pytest.raises(ValueError, match="metrics.json cannot be read"):
        yardstick.cost(tmp_path, args)


@pytest.mark.parametrize(
    "changes, named", [({"image_size": 64}, "64 x 64"), ({"channels": 3}, "channels 3")]
)
def test_runs_of_other_images_are_named(a_run, tmp_path, changes, named):
    args = tiny("lsgan", **changes)
    saved = json.loads((a_run / "args.json").read_text())
    saved["args"] |= changes
    (tmp_path / "args.json").write_text(json.dumps(saved))
    torch.save(lsgan.build(args)["generator_ema"].state_dict(), tmp_path / "generator.pt")
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{named}"):
        yardstick.main([str(tmp_path), "--quiet"])


def test_scripts_without_latents_are_named():
    with pytest.raises(ValueError, match="pix2pix.py turns images into images"):
        yardstick.check_grey32(tiny("lsgan"), SimpleNamespace(__name__="pix2pix"), "RUN")


ADDED = {"max-minutes": 3, "threads": 2, "seed": 7, "device": "cpu", "quiet": None}
ADDED |= yardstick.CHEAP


def test_commands_get_what_is_not_typed():
    path, argv, args = yardstick.plan("lsgan.py", ADDED)
    assert path == run.ROOT / "lsgan.py"
    assert (args.dataset, args.max_minutes, args.steps) == ("mnist", 3, None)
    assert (args.threads, args.seed, args.quiet) == (2, 7, True)
    assert args.eval_every == args.sample_every == 0
    assert run.parse(lsgan.Args, argv) == args  # what is checked is what is run


def test_what_is_typed_in_a_command_wins():
    text = "./lsgan.py --seed=4 --max_minutes 0.5 --eval-every 10 --lr 1e-3"
    _, argv, args = yardstick.plan(text, ADDED)
    assert (args.seed, args.max_minutes, args.eval_every, args.lr) == (4, 0.5, 10, 1e-3)
    assert sum("minutes" in word for word in argv) == 1
    _, _, args = yardstick.plan("lsgan.py --steps 6000 --subset 500", ADDED)
    assert (args.steps, args.subset, args.max_minutes) == (6000, 500, None)
    assert yardstick.plan("lsgan.py --steps 5", ADDED | {"max-minutes": None})[2].steps == 5


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "no command"),
        ("lsgan.py 'x", "No closing quotation"),
        ("nothing.py", "must be one of lsgan.py"),
        ("/elsewhere/lsgan.py", "must be one of lsgan.py"),
        ("lsgan.py --stps 4", "unknown argument --stps"),
        ("lsgan.py --lr x", "--lr must be a number"),
        ("lsgan.py --image-size 64", "64 x 64"),
        ("lsgan.py --out_dir x", "leave out --out-dir"),
        ("lsgan.py --dataset digits", "leave out --dataset"),
        ("lsgan.py --resume x", "leave out --resume"),
    ],
)
def test_commands_that_would_fail_are_named_before_anything_runs(text, named):
    with pytest.raises(ValueError, match=named) as e:
        yardstick.plan(text, ADDED)
    assert f'--train "{text}"' in str(e.value)


def test_a_command_without_an_end_needs_minutes():
    with pytest.raises(ValueError, match="needs --minutes"):
        yardstick.plan("lsgan.py", ADDED | {"max-minutes": None})


def test_commands_run_as_processes_and_their_failures_are_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "if sys.argv[1] == 'fail':\n"
        "    sys.exit('first\\nlast words')\n"
        "(pathlib.Path(sys.argv[3]) / sys.argv[1]).mkdir()\n"
    )
    folder = yardstick.train(script, ["a-run"], tmp_path / "runs" / "1", "what")
    assert folder == tmp_path / "runs" / "1" / "a-run" and folder.is_dir()
    with pytest.raises(run.Failed, match="exit code 1: last words"):
        yardstick.train(script, ["fail"], tmp_path / "2", "what")


def test_an_interrupted_yardstick_takes_its_command_along(tmp_path):
    pid = tmp_path / "pid"
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )

    class Interrupt(Exception):
        pass

    def interrupt(*_):
        if pid.exists() and pid.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(Interrupt):
            yardstick.train(script, [], tmp_path / "runs", "what")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# ---- the whole -------------------------------------------------------------------------------


def test_ratios_are_to_the_mean_of_the_baselines():
    rows = [dict(kind="baseline", distance=3.0), dict(kind="train", distance=1.0)]
    rows += [dict(kind="train", failed="exit code 1"), dict(kind="baseline", distance=5.0)]
    assert [r.get("ratio") for r in yardstick.with_ratios(rows)] == [0.75, 0.25, None, 1.25]
    assert yardstick.with_ratios(rows[1:2]) == rows[1:2]


def test_baselines_of_different_speed_are_pointed_out():
    rows = [dict(kind=kind, steps=100) for kind in ("baseline", "train", "baseline")]
    rows[1]["steps"] = 7
    rows[2]["steps"] = 95
    assert yardstick.drift(rows) is None and yardstick.drift(rows[:2]) is None
    rows[2]["steps"] = 60
    assert "100 and 60 steps" in yardstick.drift(rows)
    assert yardstick.drift(rows[1:2]) is None


def test_table_shows_every_row_and_what_failed():
    rows = [dict(name="a run", steps=7, seconds=1.25, distance=0.5, ratio=0.25, recall=1.0)]
    rows += [dict(name="b", failed="exit code 1: no")]
    head, first, second = yardstick.table(rows).splitlines()
    assert first.split() == ["a", "run", "7", "1.2", "-", "0.500", "-", "1.000", "0.250"]
    assert len(head) == len(first) and second.split(maxsplit=1) == ["b", "exit code 1: no"]


def test_runs_baseline_and_floor_are_measured_side_by_side(images, ref, cache, a_run):
    a = SimpleNamespace(minutes=1e-9, no_baseline=False, seed=0, n=120, cache_dir=cache, keep=None)
    found = yardstick.measure(a, images, [(str(a_run), yardstick.load_run(a_run))], [], "cpu")
    assert found["accuracy"] == ref["accuracy"]
    one, baseline, floor = found["rows"]
    names = [one["name"], baseline["name"], floor["name"]]
    assert names == ["lsgan-digits", "baseline", "test images"]
    assert one["steps"] == 40 and baseline["steps"] == 1 and baseline["ratio"] == 1
    assert one["ratio"] == pytest.approx(one["distance"] / baseline["distance"])
    assert floor["ratio"] < 0.3 * min(one["ratio"], baseline["ratio"])
    assert floor == floor | yardstick.compare(yardstick.drawn(ref["test"], 120), ref["train"])
    a.no_baseline = True
    assert [r["kind"] for r in yardstick.measure(a, images, [], [], "cpu")["rows"]] == ["floor"]


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "nothing to measure"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--minutes", "nan"], "--minutes must be positive"),
        (["--minutes", "x"], "--minutes"),
        (["--minutes", "1", "--threads", "0"], "--threads must be at least 1"),
        (["--minutes", "1", "--n", "5"], "--n must be at least 6"),
        (["--minutes", "1", "--seed", "-1"], "--seed must be at least 0"),
        (["--minutes", "1", "--no-baseline"], "trains nothing"),
        (["--minutes", "1", "--device", "tpu"], "device must be"),
        (["--train", "lsgan.py"], "--train needs --minutes"),
        (["--train", "lsgan.py", "--no-baseline"], "needs --minutes, or --steps"),
        (["--minutes", "1", "--json", "/no/such/folder/x.json"], "--json"),
        (["--minuts", "1"], "--minuts"),
        (["/no/such/run"], "no run folder"),
    ],
)
def test_bad_arguments_are_named(words, named):
    with pytest.raises(ValueError, match=named):
        yardstick.main(words)


def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in data.IDX:  # there, but not the published files: nothing is downloaded
        (raw / f"{stem}-ubyte").write_bytes(b"\0")
    words = ["--minutes", "1", "--data-dir", tmp_path / "data", "--cache-dir", tmp_path / "cache"]
    words += ["--keep", tmp_path / "keep", "--json", tmp_path / "x.json"]
    done = shell("-m", "tests.benchmarks.yardstick", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "is not the published file" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow
def test_command_line_on_mnist(data_dir, tmp_path):
    good, bad = "lsgan.py --width 4", "lsgan.py --steps 2 --batch-size 70000"  # MNIST has 60,000
    words = ["--minutes", "0.02", "--n", "1000", "--quiet", "--train", good, "--train", bad]
    words += ["--data-dir", data_dir, "--cache-dir", tmp_path / "cache"]
    words += ["--keep", tmp_path / "keep", "--json", tmp_path / "x.json"]
    done = shell("-m", "tests.benchmarks.yardstick", *words, timeout=600)
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    rows = found["rows"]
    assert [r["name"] for r in rows] == ["baseline", good, bad, "baseline", "test images"]
    assert found["accuracy"] > 0.99 and rows[-1]["distance"] < 2
    assert "exit code 2" in rows[2]["failed"]
    assert "generator.pt" in os.listdir(rows[1]["folder"])
    assert all(r["name"] in done.stdout for r in rows)
