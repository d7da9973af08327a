"""common/run.py on the real scripts: the run folder, resume to the bit, signals, failures."""
import csv
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from common import cli, data, files, processes, run, scores
from tests import helpers
from tests.helpers import CACHE, ROOT, SCRIPTS, TINY, assert_same, flags, resume, script, tiny

SHORT = {"steps": 12, "log_every": 2, "sample_every": 4, "eval_every": 6, "cache_dir": CACHE}


def train(name, out, **changes):
    return helpers.train(name, out, **(SHORT | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of icr_gan."""
    return train("icr_gan", tmp_path_factory.mktemp("whole"))


def rows(path):
    """A csv file without its seconds."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in csv.DictReader(io.StringIO(path.read_text()))]


def assert_same_run(a, b):
    """Two run folders agree in everything but time."""
    x, y = (files.load_tensors(f / "checkpoint.pt") for f in (a, b))
    assert x["step"] == y["step"]
    for part in ("nets", "state", "ranks"):
        flat_x, flat_y = {}, {}
        flatten(x[part], "", flat_x), flatten(y[part], "", flat_y)
        assert_same(flat_x, flat_y)
    assert rows(a / "log.csv") == rows(b / "log.csv")
    assert rows(a / "metrics.csv") == rows(b / "metrics.csv")
    grids = [sorted(p.name for p in (f / "samples").iterdir()) for f in (a, b)]
    assert grids[0] == grids[1]
    for name in grids[0]:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes()
    assert_same(*(torch.load(f / "generator.pt", weights_only=True) for f in (a, b)))


def flatten(value, name, into):
    if isinstance(value, dict):
        for k, v in value.items():
            flatten(v, f"{name}.{k}", into)
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            flatten(v, f"{name}.{i}", into)
    elif torch.is_tensor(value):
        into[name] = torch.nan_to_num(value.double(), nan=-1.0)
    else:
        into[name] = torch.tensor(list(repr(value).encode()))


# ---- the folder


def test_a_run_leaves_everything_the_contract_names(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "args.json", "log.csv", "metrics.csv", "metrics.json", "samples", "samples.png", "progress.png",
        "samples.gif", "curves.png", "checkpoint.pt", "generator.pt",
    }  # fmt: skip
    assert finished.name.startswith("icr_gan-digits-") and finished.name.endswith("-s0")
    saved = json.loads((finished / "args.json").read_text())
    assert saved["script"] == "icr_gan" and saved["args"]["device"] == "cpu" and "resume" not in saved["args"]
    assert saved["versions"]["torch"] == torch.__version__ and saved["versions"]["device"] == "cpu"
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [f"{s:06d}.png" for s in (0, 4, 8, 12)]


def test_tables_have_their_columns_and_cadence(finished):
    log, metrics = rows(finished / "log.csv"), rows(finished / "metrics.csv")
    assert [r["step"] for r in log] == ["2", "4", "6", "8", "10", "12"]
    assert list(log[0])[:2] == ["step", "images"] and log[0]["images"] == "16"
    assert {"loss_d", "loss_g", "lsgan", "real", "fake", "dis", "gen_ratio"} < set(log[0])
    assert [r["step"] for r in metrics] == ["6", "12"]
    assert list(metrics[0]) == ["step", "n", "features", "fid", "precision", "recall", "density", "coverage"]
    assert (metrics[0]["n"], metrics[0]["features"]) == ("64", "lenet")
    final = json.loads((finished / "metrics.json").read_text())
    assert final["step"] == 12 and final["fid"] == float(metrics[-1]["fid"])
    assert final["measured_on"]["split"] == "train" and final["measured_on"]["dataset"] == "digits"


def test_pictures_open_and_have_a_sensible_size(finished):
    assert Image.open(finished / "samples.png").size == (8 * 66 + 2, 8 * 66 + 2)
    gif = Image.open(finished / "samples.gif")
    assert gif.n_frames == 4
    strip = Image.open(finished / "progress.png")
    assert strip.height == 4 * 68
    for name in ("curves.png", "progress.png"):
        assert len(Image.open(finished / name).convert("L").getcolors(256)) > 2  # not blank


def test_generator_pt_holds_the_averaged_generator_alone(finished):
    nets = script("icr_gan").build(tiny("icr_gan"))
    nets["generator_ema"].load_state_dict(torch.load(finished / "generator.pt", weights_only=True), strict=True)
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert_same(nets["generator_ema"].state_dict(), checkpoint["nets"]["generator_ema"])


def test_load_gives_a_trained_run_to_other_code(finished):
    nets, args, m = run.load(finished)
    assert m is script("icr_gan") and args.width == TINY["width"]
    images = m.sample(nets, args, m.latents(5, args, torch.Generator().manual_seed(0)))
    assert images.shape == (5, 1, 32, 32)
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    for name in nets:
        assert_same(nets[name].state_dict(), checkpoint["nets"][name])


def test_load_says_which_weights_do_not_fit_a_changed_script(finished, monkeypatch):
    m = script("icr_gan")
    build = m.build
    monkeypatch.setattr(m, "build", lambda args: build(dataclasses.replace(args, z_dim=args.z_dim + 1)))
    with pytest.raises(ValueError, match="do not fit icr_gan.py: .* size mismatch for stem.weight"):
        run.load(finished)


def start(name, **changes):
    """A Run of a script whose pictures and scores are stand-ins."""
    m, args = script(name), tiny(name, **changes)
    nets = m.build(args)
    state = m.updates(nets, args)[-1]
    return run.start(f"{name}.py", args, nets, state, lambda: {}, lambda: {"n": 1})


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    assert len({start("lsgan", out_dir=str(tmp_path)).folder for _ in range(3)}) == 3


def test_all_coefficients_zero_is_the_run_of_lsgan(tmp_path):
    off = dict.fromkeys(("lambda_real", "lambda_fake", "lambda_dis", "lambda_gen"), 0.0)
    a, b = train("lsgan", tmp_path), train("icr_gan", tmp_path, **off)
    x, y = (files.load_tensors(f / "checkpoint.pt") for f in (a, b))
    for name in x["nets"]:
        assert_same(x["nets"][name], y["nets"][name])
    assert rows(a / "metrics.csv") == rows(b / "metrics.csv")
    assert [(r["loss_d"], r["loss_g"]) for r in rows(a / "log.csv")] == [(r["loss_d"], r["loss_g"]) for r in rows(b / "log.csv")]


def test_a_clock_ends_a_run(tmp_path):
    folder = train("lsgan", tmp_path, steps=None, max_minutes=0.01, eval_every=0, sample_every=0)
    final = json.loads((folder / "metrics.json").read_text())
    assert final["step"] > 0 and final["seconds"] >= 0.6


def test_n_critic_draws_that_many_batches_per_step(tmp_path):
    folder = train("lsgan", tmp_path, steps=2, n_critic=3, log_every=1)
    assert [r["images"] for r in rows(folder / "log.csv")] == ["24", "48"]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["state"]["batches"]["drawn"] == 6
    steps = [checkpoint["state"][o]["state"][0]["step"].item() for o in ("opt_d", "opt_g")]
    assert steps == [6, 2]


def test_the_rate_reaches_every_optimiser(tmp_path):
    r = start("lsgan", out_dir=str(tmp_path))
    r.set_lr(0.25)
    r.set_lr(torch.tensor(0.5))
    rates = [r.state[key].param_groups[0]["lr"].item() for key in ("opt_g", "opt_d")]
    assert rates == [0.5, 0.5]


def test_scores_are_against_all_training_images_whatever_the_subset(tmp_path):
    folder = train("lsgan", tmp_path, steps=2, subset=64)
    nets, args, m = run.load(folder)

    def generate(n, rng):
        return m.sample(nets, args, m.latents(n, args, rng))

    row = scores.of_generator(generate, data.load_images("digits", cache_dir=CACHE), args)()
    assert float(rows(folder / "metrics.csv")[-1]["fid"]) == pytest.approx(row["fid"], rel=1e-6)


@pytest.mark.parametrize("name", SCRIPTS)
def test_updates_are_given_one_process_s_share_of_the_batch(name, tmp_path, monkeypatch):
    """As on two ranks: G draws half of the latents."""
    m, drawn = script(name), []
    share, build = processes.share, m.build
    monkeypatch.setattr(
        processes, "share", lambda args: dataclasses.replace(share(args), batch_size=4)
    )

    def watched(args):
        nets = build(args)
        nets["generator"].register_forward_pre_hook(lambda net, z: drawn.append(len(z[0])))
        return nets

    monkeypatch.setattr(m, "build", watched)
    # off: cn_lsgan's constraint compares with real images, of which this test gives as many as
    # before; icr_gan draws near latents too, in one batch with the others
    off = {"cn_lsgan": {"lambda_rec": 0.0}, "icr_gan": {"sigma": 0.0}}.get(name, {})
    train(name, tmp_path, steps=1, subset=64, eval_every=0, **off)
    assert drawn[-1] == 4 and drawn[0] == 8  # D's are as many as its real images


# ---- a script that is no image GAN


THROW_AWAY = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Args:
    dataset: str = "pairs"  # made here
    image_size: int = 8  # pixels
    batch_size: int = 4  # pairs per update
    steps: int | None = 60  # updates
    max_minutes: float | None = None  # none
    lr: float = 1e-2  # step size
    precision: str = "fp32"  # of all
    threads: int = 1  # of the CPU
    seed: int = 0  # of all
    device: str = "cpu"  # where
    out_dir: str = "runs"  # parent
    log_every: int = 1  # updates
    sample_every: int = 2  # updates
    eval_every: int = 3  # updates
    eval_samples: int = 6  # none
    resume: str | None = None  # run folder
    quiet: bool = True  # no progress


def build(args):
    nets = nn.ModuleDict({"AtoB": nn.Conv2d(3, 3, 1), "BtoA": nn.Conv2d(3, 3, 1)})
    average = nn.ModuleDict({"AtoB": nn.Conv2d(3, 3, 1), "BtoA": nn.Conv2d(3, 3, 1)})
    average.load_state_dict(nets.state_dict())
    return {"translators": nets, "generator_ema": average}


def main(args):
    from common import data, run

    device = run.setup(args)
    draw = torch.Generator().manual_seed(1)
    pairs = torch.randint(0, 256, (12, 6, 8, 8), generator=draw, dtype=torch.uint8)
    nets = build(args)
    net = nets["translators"]
    opt = torch.optim.Adam(net.parameters(), torch.tensor(args.lr), fused=True)
    batches = data.Batches(pairs, args.batch_size, args.seed, device)
    state = dict(opt=opt, seen=torch.zeros(()), batches=batches)

    def update(pair):
        a, b = pair.split(3, 1)
        loss = (net["AtoB"](a + 0.1 * torch.randn_like(a)) - b).abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        state["seen"] += 1
        nets["generator_ema"].load_state_dict(net.state_dict())
        return {"loss_ab": loss.detach(), "seen": state["seen"]}

    shown = data.to_float(pairs[:4])

    def both():
        a, b = shown.split(3, 1)
        with torch.no_grad():
            return torch.stack([a, net["AtoB"](a).tanh(), b], 1), net["BtoA"](b).tanh()

    def show():
        rows, back = both()
        return {"translations": rows, "backwards": back}

    def score():
        rows, _ = both()
        error = (rows[:, 1] - rows[:, 2]).abs().mean().item()
        return {"n": 4, "l1": error, "sharpness": 2 * error, "measured_on": {"split": "test"}}

    with run.start(__file__, args, nets, state, show, score) as r:
        while r.going():
            r.set_lr(args.lr)
            r.after_step(update(next(batches)))
        return r.finish()
"""


def test_pairs_with_pictures_and_measures_of_their_own_need_no_line_in_common(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "throw_away.py").write_text(THROW_AWAY)
    m = importlib.import_module("throw_away")
    whole = m.main(m.Args(out_dir=str(tmp_path / "whole"), steps=6))
    part = m.main(m.Args(out_dir=str(tmp_path / "part"), steps=3))
    assert m.main(m.Args(resume=str(part), steps=6)) == part
    for name in ("translations", "backwards"):
        assert {p.stem for p in (whole / name).iterdir()} == {"000000", "000002", "000004", "000006"}
        for picture in (f"{name}.png", f"{name}-progress.png", f"{name}.gif"):
            assert (whole / picture).stat().st_size > 100
        last = [(folder / name / "000006.png").read_bytes() for folder in (whole, part)]
        assert last[0] == last[1]
    assert not (whole / "samples.png").exists()
    assert list(rows(whole / "metrics.csv")[0]) == ["step", "n", "l1", "sharpness"]
    assert rows(whole / "log.csv") == rows(part / "log.csv")
    assert rows(whole / "log.csv")[-1]["images"] == "24"
    assert json.loads((whole / "metrics.json").read_text())["measured_on"]["split"] == "test"
    charts = [Image.open(f / "curves.png").size for f in (whole, finished_curves(tmp_path, m))]
    assert charts[0][1] > charts[1][1]  # two measures more need more room than none
    x, y = (files.load_tensors(f / "checkpoint.pt") for f in (whole, part))
    flat_x, flat_y = {}, {}
    flatten({k: x[k] for k in ("nets", "state", "ranks")}, "", flat_x)
    flatten({k: y[k] for k in ("nets", "state", "ranks")}, "", flat_y)
    assert_same(flat_x, flat_y)
    both = torch.load(whole / "generator.pt", weights_only=True)
    assert set(both) == {f"{d}.{k}" for d in ("AtoB", "BtoA") for k in ("weight", "bias")}


def finished_curves(tmp_path, m):
    """The same run without measures."""
    source = THROW_AWAY.replace('"l1": error, "sharpness": 2 * error, ', "")
    (tmp_path / "fewer.py").write_text(source)
    fewer = importlib.import_module("fewer")
    return fewer.main(fewer.Args(out_dir=str(tmp_path / "fewer"), steps=6))


# ---- resume


def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one(finished, tmp_path, monkeypatch):
    """Stopped by a signal between two checkpoints; grids, rows and weights agree to the bit."""
    after = run.Run.after_step

    def stop_at_7(self, losses):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        after(self, losses)

    monkeypatch.setattr(run.Run, "after_step", stop_at_7)
    with pytest.raises(run.Stopped) as e:
        train("icr_gan", tmp_path)
    monkeypatch.undo()
    assert e.value.signum == signal.SIGTERM and "--resume" in str(e.value)
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 7
    assert resume("icr_gan", folder, quiet=True) == folder
    assert_same_run(finished, folder)


def test_rows_and_grids_past_the_checkpoint_are_cut_back(finished, tmp_path, monkeypatch):
    """As after SIGKILL: the last save is of step 8, the log already goes further."""
    save = run.Run.save

    def only_to_8(self):
        if self.step <= 8:
            save(self)

    monkeypatch.setattr(run.Run, "save", only_to_8)
    folder = train("icr_gan", tmp_path)
    monkeypatch.undo()
    with open(folder / "log.csv", "a") as f:
        f.write("14,1")  # a row that was being written
    resume("icr_gan", folder)
    assert_same_run(finished, folder)


def test_more_steps_continue_a_finished_run(tmp_path):
    folder = train("lsgan", tmp_path, steps=4)
    resume("lsgan", folder, steps=6)
    assert [r["step"] for r in rows(folder / "log.csv")] == ["2", "4", "6"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 6
    assert cli.resume(folder, script("lsgan").Args, max_minutes=1.0).steps is None


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Run, "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train("icr_gan", tmp_path)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    resume("icr_gan", folder)
    assert_same_run(finished, folder)


def test_a_finished_run_without_its_checkpoint_is_not_begun_again(finished, tmp_path):
    folder = copied(finished, tmp_path)
    (folder / "checkpoint.pt").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*.*")}
    with pytest.raises(ValueError, match="checkpoint.pt is not there"):
        resume("icr_gan", folder, steps=9)
    assert {p: p.read_bytes() for p in folder.rglob("*.*")} == before


def test_a_resumed_script_may_log_more_than_before(tmp_path):
    table = files.Table(tmp_path / "log.csv")
    table.add({"step": 1, "loss": 0.5})
    table = files.Table(tmp_path / "log.csv", last_step=1)
    table.add({"step": 2, "loss": 0.25, "new": 3.0})
    table.add({"step": 3, "new": 4.0})
    assert (tmp_path / "log.csv").read_text().split() == ["step,loss,new", "1,0.5,", "2,0.25,3.0", "3,,4.0"]
    assert files.Table(tmp_path / "log.csv", last_step=3).rows == files.read_csv(tmp_path / "log.csv")


@pytest.mark.parametrize(
    "changes, said", [({"lr": 1.0}, "lr"), ({"sigma": 0.1}, "sigma"), ({"steps": 0}, "steps"), ({"dataset": "mnist"}, "dataset")]
)
def test_only_end_and_cadence_may_change_on_resume(finished, changes, said):
    m = script("icr_gan")
    with pytest.raises(ValueError, match=said):
        m.main(m.Args(resume=str(finished), **changes))
    with pytest.raises(ValueError, match=said):
        cli.parse(m.Args, ["--resume", str(finished), *flags(changes)])


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in SCRIPTS), ("wgan_gp", {"clip": 0.01})])
def test_every_scripts_resumed_run_equals_an_uninterrupted_one(name, changes, tmp_path):
    """Whatever a method keeps beside the networks: optimisers, counters, what one update leaves for the other."""
    short = changes | {"lr_decay": 0.0, "subset": 64, "out_dir": str(tmp_path), "cache_dir": CACHE}
    m = script(name)
    whole, part = (m.main(tiny(name, steps=steps, **short)) for steps in (4, 2))
    resume(name, part, steps=4, quiet=True)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, part))
    for net in a["nets"]:
        assert_same(a["nets"][net], b["nets"][net])
    for key in ("opt_g", "opt_d"):
        for x, y in zip(a["state"][key]["state"].values(), b["state"][key]["state"].values()):
            assert_same(x, y)
    assert torch.equal(a["state"]["t"], b["state"]["t"])


@pytest.mark.parametrize("name, changes", [("lsgan", {}), ("wgan_gp", {"clip": 0.01})])
def test_a_run_of_a_gpu_goes_on_on_the_cpu(name, changes, tmp_path):
    """What its optimisers saved of the device, capturable, must not be taken over."""
    places = {"out_dir": str(tmp_path), "cache_dir": CACHE}
    folder = script(name).main(tiny(name, **changes, **places))
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    for key in ("opt_g", "opt_d"):
        saved["state"][key]["param_groups"][0]["capturable"] = True
    torch.save(saved, folder / "checkpoint.pt")
    resume(name, folder, steps=4)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4 and not saved["state"]["opt_g"]["param_groups"][0]["capturable"]


def test_resume_of_another_scripts_run_or_of_none_is_bad_input(finished, tmp_path):
    with pytest.raises(ValueError, match="icr_gan.py, not by lsgan.py"):
        cli.parse(script("lsgan").Args, ["--resume", str(finished)])
    with pytest.raises(ValueError, match="no run folder"):
        cli.parse(script("lsgan").Args, ["--resume", str(tmp_path)])
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        cli.resume(tmp_path, script("lsgan").Args)


def copied(folder, to):
    import shutil

    return shutil.copytree(folder, to / "copy")


@pytest.mark.parametrize("cut", [0, 1000, -200])
def test_a_truncated_checkpoint_is_named_and_left_alone(finished, tmp_path, cut):
    folder = copied(finished, tmp_path)
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="checkpoint.pt cannot be loaded"):
        resume("icr_gan", folder, steps=14)
    assert (folder / "checkpoint.pt").read_bytes() == whole[:cut]
    assert rows(folder / "log.csv") == rows(finished / "log.csv")


def test_checkpoints_hold_tensors_and_plain_containers_only(finished, tmp_path):
    import pickle

    folder = copied(finished, tmp_path)
    with open(folder / "checkpoint.pt", "wb") as f:
        pickle.dump(print, f)
    with pytest.raises(ValueError, match="cannot be loaded"):
        run.load(folder)


# ---- failures


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_nan_ends_the_run_and_spares_the_checkpoint(tmp_path, monkeypatch, where):
    m = script("lsgan")
    updates = m.updates

    def spoilt(nets, args):
        update_d, update_g, state = updates(nets, args)

        def update(real):
            logs = update_d(real)
            if state["t"] >= 6 and where == "loss":
                logs["loss_d"] = logs["loss_d"] * float("nan")
            if state["t"] >= 7 and where == "weights":
                nets["discriminator"].head.bias.data.fill_(float("inf"))
            return logs

        return update, update_g, state

    monkeypatch.setattr(m, "updates", spoilt)
    with pytest.raises(run.Diverged, match="loss_d|head.bias|loss_g") as e:
        train("lsgan", tmp_path, log_every=4 if where == "weights" else 1)
    assert "between steps" in str(e.value) and "--lr" in str(e.value)
    (folder,) = tmp_path.iterdir()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(torch.isfinite(v).all() for v in states_of(saved).values())


def states_of(saved):
    return {f"{n}.{k}": v for n, net in saved["nets"].items() for k, v in net.items()}


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    data.load_images("digits", cache_dir=CACHE)  # which may have to be drawn first
    fsync = os.fsync
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.NotSaved, match="No space left on device"):
        train("lsgan", tmp_path, sample_every=2)
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4  # args.json, log.csv, 0, 2, 4
    assert not list(folder.glob("*.tmp"))


def test_a_disk_that_was_full_before_leaves_no_folder(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    data.load_images("digits", cache_dir=CACHE)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="out_dir .* cannot be written to: No space left"):
        train("lsgan", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_went_away_is_a_failure_not_bad_input(tmp_path, monkeypatch):
    import shutil

    after = run.Run.after_step

    def remove(self, losses):
        if self.step == 2:
            shutil.rmtree(self.folder)
        after(self, losses)

    monkeypatch.setattr(run.Run, "after_step", remove)
    with pytest.raises(files.NotSaved, match="could not write"):
        train("lsgan", tmp_path)


def test_a_warning_is_said_once(tmp_path, capsys):
    train("icr_gan", tmp_path, lambda_gen=1e5, lr=1e-6, quiet=False, steps=4, log_every=1)
    err = capsys.readouterr().err
    assert err.count("warning: gen_ratio") == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_loop_gives_the_handlers_back_and_leaves_d_trainable(error, tmp_path, monkeypatch):
    m = script("lsgan")
    nets, build = {}, m.build
    monkeypatch.setattr(m, "build", lambda args: nets.setdefault("all", build(args)))

    def fails(*a):
        raise error

    monkeypatch.setattr(m, "update_ema", fails)
    wanted = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(error):
        train("lsgan", tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == wanted
    assert all(p.requires_grad for p in nets["all"]["discriminator"].parameters())


def test_a_signal_during_scoring_saves_and_is_scored_on_resume(finished, tmp_path, monkeypatch):
    m = script("icr_gan")
    sample, calls = m.sample, []

    def interrupted(nets, args, z):
        calls.append(len(z))
        if len(calls) == 5:  # three grids, then the scores of step 6
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(nets, args, z)

    monkeypatch.setattr(m, "sample", interrupted)
    with pytest.raises(run.Stopped):
        train("icr_gan", tmp_path, eval_samples=64)
    monkeypatch.undo()
    (folder,) = tmp_path.iterdir()
    assert resume("icr_gan", folder, quiet=True) == folder
    assert_same_run(finished, folder)


# ---- from outside: the real process


def start_process(tmp_path, *words, **changes):
    line = flags(TINY | SHORT | {"steps": 100000, "eval_every": 0, "sample_every": 20, "out_dir": tmp_path} | changes)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / "icr_gan.py", *line, *words], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=60):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("waited too long")


def step_of(tmp_path):
    try:
        (log,) = tmp_path.glob("*/log.csv")
        return int(log.read_text().splitlines()[-1].split(",")[0])
    except (ValueError, IndexError):
        return 0


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_save_and_say_how_to_go_on(tmp_path, signum, code):
    process = start_process(tmp_path)
    wait_for(lambda: step_of(tmp_path) >= 30, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (folder,) = tmp_path.iterdir()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert saved >= 30
    assert f"--resume {folder}" in err and "Traceback" not in err
    assert rows(folder / "log.csv")[-1]["step"] == str(saved - saved % 2)


def test_a_run_killed_at_any_moment_goes_on_to_the_bit(tmp_path):
    """SIGKILL three times at moments of the clock's choosing, against a run left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = {"steps": 120, "eval_every": 60, "sample_every": 10}
    process = start_process(killed, **steps)
    for i, target in enumerate((10, 34, 78)):
        wait_for(lambda: step_of(killed) >= target, process)
        time.sleep(0.013 * i)
        process.kill()
        process.communicate()
        (folder,) = killed.iterdir()
        line = ["--resume", str(folder)]
        process = subprocess.Popen(
            [sys.executable, ROOT / "icr_gan.py", *line], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert str(folder) in out and "precision" in out
    assert_same_run(train("icr_gan", whole, **steps), folder)
