"""tests/benchmarks: what they measure is what they say, and they run to their ends, small."""
import functools
import itertools
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import icr_gan
from tests.benchmarks import ablations, gpu, lazy, study, study_report, train, yardstick
from tests.helpers import CACHE, LinearCritic, script, shell, tiny

NAMES = train.scripts()


# ---- whole updates ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_script_is_timed_and_the_loop_beside_it_launches_more(name, tmp_path):
    path = tmp_path / "train.json"
    words = f"--scripts {name} --sizes default --width 4 --batch-size 4 --rounds 1 --round-s 0"
    words += f" --no-compile --device cpu --json {path}"
    result = train.main(words.split())
    assert json.loads(path.read_text()) == result
    rows = {r["variant"]: r for r in result["rows"]}
    assert all(rows[v]["ms"] > 0 for v in ("eager", "bf16"))
    if name in train.LOOPS:
        assert rows["eager"]["launches"] < rows["loop"]["launches"]


def test_every_script_that_has_kernels_has_a_loop():
    assert {n for n in NAMES if hasattr(script(n).Args, "impl")} <= set(train.LOOPS) <= set(NAMES)


GREY = 200 / 127.5 - 1


@pytest.mark.parametrize(
    "name, loss_g, loss_d",
    [
        ("lsgan", 0.5, 0.5),
        ("icr_gan", 0.5, 0.5),
        ("cn_lsgan", 1 + 0.5 * GREY**2, 1 + 3 * 2**2),
        ("wgan_gp", 0.0, 10.0),
    ],
)
def test_the_straightforward_loop_has_the_losses_of_the_script(name, loss_g, loss_d):
    """Closed forms for D = 0, G = 0 and images of one grey."""
    method = {"lambda_gp": 3.0, "gp_target": 2.0, "lambda_rec": 0.5} if name == "cn_lsgan" else {}
    pixels = torch.full((64, 1, 32, 32), 200, dtype=torch.uint8)
    args = tiny(name, lr=1e-3, **method)
    nets = script(name).build(args)
    for n in ("discriminator", "generator"):
        nets[n].register_forward_hook(lambda m, x, y: 0 * y)
    said = train.gan_loop(script(name), args, nets, pixels, torch.device("cpu"))()
    losses = re.findall(r"\[(\w) loss: (\S+)\]", said)
    assert [key for key, _ in losses] == ["G"] + ["D"] * args.n_critic
    assert [float(value) for _, value in losses[:2]] == pytest.approx([loss_g, loss_d], abs=1e-5)


def test_the_loops_terms_see_the_same_share_of_the_images():
    args, seen = tiny("icr_gan", batch_size=8, consistency_share=0.25), []
    nets = icr_gan.build(args)
    nets["discriminator"].register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    pixels = torch.full((16, 1, 32, 32), 200, dtype=torch.uint8)
    train.gan_loop(icr_gan, args, nets, pixels, torch.device("cpu"))()
    assert seen == [8, 8, 8, 2, 2, 2]


@pytest.mark.parametrize("name, target", [("wgan_gp", 1.0), ("cn_lsgan", 0.5)])
def test_the_loops_penalty_has_its_gradient(name, target):
    """A linear critic's slope is w: the double backward of lambda (|w| - target)^2 is known."""
    d, fakes = LinearCritic(0.1 * torch.randn(1024)), []
    method = {"gp_target": target, "lambda_rec": 0.0} if name == "cn_lsgan" else {}
    args = tiny(name, n_critic=1, lambda_gp=3.0, **method)
    nets = script(name).build(args) | {"discriminator": d}
    nets["generator"].register_forward_hook(lambda net, z, y: fakes.append(y.detach()))
    pixels, w = torch.full((16, 1, 32, 32), 200, dtype=torch.uint8), d.w.detach().clone()
    train.gan_loop(script(name), args, nets, pixels, torch.device("cpu"))()
    x, f = torch.full((8, 1024), GREY), fakes[0].flatten(1)
    of_scores = (f - x).mean(0)
    if name == "cn_lsgan":
        of_scores = 2 * (((x @ w - 1) @ x) + (f @ w) @ f) / 8
    expected = of_scores + 6 * (w.norm() - target) * w / w.norm()
    torch.testing.assert_close(d.w.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_loops_of_image_to_image_have_the_losses_of_their_scripts():
    """Closed forms for networks that return 0: logits 0 in pix2pix, scores 0 in cyclegan."""
    for name, expected in (
        ("pix2pix", [math.log(2), abs(GREY), math.log(2)]),  # D, L1, adversarial
        ("cyclegan", [2 + (10 + 5) * 2 * GREY, 2 * GREY, 2 * GREY, 0.5, 0.5]),
    ):
        m = script(name)
        how = {"channels_a": 1, "channels_b": 1} if name == "pix2pix" else {"channels": 1}
        args = m.Args(batch_size=2, width=4, image_size=16, device="cpu", patch_layers=1, **how)
        nets = m.build(args)
        for net in (nets["generator"], nets["discriminator"]):
            for part in net.values() if name == "cyclegan" else [net]:
                part.register_forward_hook(lambda m, x, y: 0 * y)
        pixels = torch.full((8, 2 if name == "pix2pix" else 1, 16, 16), 200, dtype=torch.uint8)
        said = train.LOOPS[name](m, args, nets, pixels, torch.device("cpu"))()
        found = [float(v) for v in re.findall(r": (\S+)\]", said)]
        assert found == pytest.approx(expected, abs=1e-5), name


def test_a_variant_that_does_not_train_is_found(monkeypatch):
    m = script("lsgan")
    updates = m.updates

    def idle(nets, args):
        update_d, update_g, state = updates(nets, args)
        return update_d, lambda: {}, state

    monkeypatch.setattr(m, "updates", idle)
    with pytest.raises(AssertionError, match="stand still"):
        train.made("lsgan", "default", "eager", torch.device("cpu"), 1, {"width": 4})


# ---- the study -------------------------------------------------------------------------------


def arguments(*words):
    return study.arguments(["--steps", "3", *words])


def test_every_command_of_the_study_is_taken_by_its_script():
    a = arguments("--methods", ",".join([*study.METHODS, *study.OTHERS]), "--seeds", "1")
    jobs = study.listed(a)
    assert {j["method"] for j in jobs} == {*study.METHODS, *study.OTHERS, "reference"}
    again = [j for j in jobs if j["method"] == "reference"]
    assert jobs[::9] == again  # before every eighth other run
    assert {(j["args"], j["seed"]) for j in again} == {("lsgan.py", "0")}
    few = study.listed(arguments("--methods", "cr", "--seeds", "1"))
    assert few[0]["method"] == "reference"
    assert few[0]["setting"] not in [j["setting"] for j in again]  # of a study of its own
    assert len({study.key_of(j) for j in jobs}) == len(jobs)
    later = study.listed(arguments("--methods", "cr", "--seeds", "2", "--first-seed", "3"))
    assert [j["seed"] for j in later] == ["0", "3", "4"]  # the reference stays what it is
    paired = next(j for j in jobs if j["method"] == "pix2pix")
    assert paired["dataset"] == "blueprints"  # its own


def test_random_settings_are_shared_by_the_methods_vary_and_keep_what_each_is():
    a = arguments("--methods", "lsgan,cr,wgan,wgan_gp", "--settings", "12", "--no-reference")
    jobs, drawn = study.listed(a), {}
    assert jobs == study.listed(a)
    for name in a.methods:
        lines = [j["args"] for j in jobs if j["method"] == name]
        assert len(set(lines)) == 12
        found = [study.arguments_of(line.split()) for line in lines]
        drawn[name] = [(x.lr, x.beta1, x.beta2, x.width, x.n_critic, x.lr_decay) for x in found]
        assert len({x.lr for x in found}) == (1 if name == "wgan" else 12)  # it has its own
        if name == "cr":
            assert all(1 <= x.lambda_real <= 100 and x.lambda_fake == 0 for x in found)
    assert drawn["lsgan"] == drawn["cr"] == drawn["wgan_gp"]
    assert [d[1:] for d in drawn["lsgan"]] == [d[1:] for d in drawn["wgan"]]


def test_what_is_added_reaches_every_run_and_makes_it_another(tmp_path):
    words = "--methods lsgan,icr-half --seeds 1 --no-reference".split()
    plain, wide = (study.listed(arguments(*words, *more)) for more in ([], ["--add=--width  64"]))
    assert {j["added"] for j in wide} == {"--width=64"}  # whichever way it is written
    assert wide == study.listed(arguments(*words, "--add", "--width=64 "))
    assert not {study.key_of(j) for j in plain} & {study.key_of(j) for j in wide}
    made = study.Study(arguments(), tmp_path / "study.csv", tmp_path)
    for job in wide:
        assert study.arguments_of(made.words_of(job, tmp_path)).width == 64
    some = "--methods lsgan --settings 1 --no-reference --add=--lr_decay".split()
    (job,) = study.listed(arguments(*some[:-1], some[-1] + " 0"))
    assert "--lr-decay" not in job["args"] and "--beta1" in job["args"]


@pytest.mark.parametrize(
    "methods, word, why",
    [
        ("lsgan", "--seed 1", "--seed, which the study gives"),
        ("lsgan", "--dataset=digits", "--dataset, which the study gives"),
        ("lsgan", "--eval_samples 9", "--eval-samples, which the study gives"),
        ("icr-half", "--consistency-share 1", "--consistency-share, which icr-half gives"),
        ("icr-half", "--sigma 1", "--add: lsgan does not take --sigma 1"),  # the reference run
        ("lsgan", "--width '8", "--add: No closing quotation"),
        ("lsgan", "--width 8 --width=9", "twice"),
        ("lsgan", "-h", "-h follows no argument"),
        ("lsgan", "--help", "--help, which the study gives"),
    ],
)
def test_what_a_study_cannot_add_is_told_before_it_trains(methods, word, why):
    with pytest.raises(ValueError, match=why):
        arguments("--methods", methods, f"--add={word}")


def test_a_csv_of_before_there_were_those_columns_is_read(tmp_path):
    a = arguments("--methods", "lsgan", "--seeds", "1", "--no-reference")
    (job,) = study.listed(a)
    row = dict.fromkeys(study.COLUMNS, "") | job
    path = tmp_path / "study.csv"
    old = [c for c in study.COLUMNS if c not in ("added", "machine")]
    path.write_text(f"{','.join(old)}\n{','.join(row[c] for c in old)}\n")
    assert study.train(a, path)  # it is done
    assert study.load(path) == [row]


def test_equal_time_is_not_filled_up_on_another_machine(tmp_path):
    words = "--methods lsgan --no-reference --seeds 1 --dry-run --csv".split()
    path = tmp_path / "study.csv"
    study.save(path, [made_up("cr", 0, 1, machine="Some CPU"), made_up("cr", 1, 1)])
    words += [str(path), "--precision", "fp32", "--n", "9"]
    with pytest.raises(ValueError, match="on Some CPU, an unnamed machine, .*--csv"):
        study.main(["--minutes", "1", *words])
    mixed = ["--methods", "pix2pix,lsgan", "--minutes", "1"]  # of which the first is not of it
    with pytest.raises(ValueError, match="Some CPU"):
        study.main([*words, *mixed])
    for more in (["--minutes", "2"], ["--steps", "9"], ["--minutes", "1", "--subset", "100"]):
        study.main([*more, *words])
    study.save(path, [made_up("cr", 0, 1, machine=study.chip("cpu"))])
    study.main(["--minutes", "1", *words])


def test_a_study_ends_goes_on_where_it_was_and_reports_from_its_csv(tmp_path):
    path = tmp_path / "study.csv"
    words = ["-m", "tests.benchmarks.study", "--steps", "3", "--methods", "lsgan", "--n", "64"]
    words += ["--dataset", "digits", "--evals", "2", "--csv", path, "--cache-dir", CACHE]
    words += ["--out-dir", tmp_path / "runs", "--no-reference"]
    first = shell(*words, "--seeds", "1", timeout=300)
    assert first.returncode == 0, first.stderr
    (row,) = study.load(path)
    assert (row["steps"], row["images"], row["seed"], row["failed"]) == ("3", "192", "0", "")
    evaluations = json.loads(row["evaluations"])
    assert [e["step"] for e in evaluations] == ["2", "3"]
    assert evaluations[-1]["fid"] == row["fid"] and row["samples"]
    second = shell(*words, "--seeds", "2", timeout=300)
    assert second.returncode == 0 and "1 of 2 runs are in" in second.stderr
    rows = study.load(path)
    assert rows[0] == row and [r["seed"] for r in rows] == ["0", "1"]
    assert "| lsgan | 2 |" in second.stdout
    for name in ("study.md", "study-digits-3steps-fp32-64-budget.svg"):
        assert (tmp_path / name).stat().st_size > 100
    assert not list((tmp_path / "runs").iterdir())  # it leaves nothing behind
    unknown = shell(*words[:3], "3", "--methods", "lsgam")
    assert unknown.returncode == 2 and "did you mean lsgan" in unknown.stderr


def test_a_run_that_diverges_is_a_row_and_one_that_the_machine_ended_is_not(tmp_path, capsys):
    """So that what was killed, or met a full disk, is made again."""
    words = ["--methods", "lsgan", "--seeds", "1", "--no-reference", "--no-control"]
    a = arguments(*words, "--dataset", "digits", "--n", "64", "--cache-dir", CACHE)
    made = study.Study(a, tmp_path / "study.csv", tmp_path)
    (job,) = study.listed(a)
    made.run({**job, "args": "lsgan.py --lr nan"})
    assert study.load(tmp_path / "study.csv") == [] and "--lr" in capsys.readouterr().err
    made.run({**job, "args": "lsgan.py --lr 1e30"})
    (row,) = study.load(tmp_path / "study.csv")
    assert "turned NaN" in row["failed"] and (row["steps"], row["fid"]) == ("", "")
    assert row["machine"] == study.chip("cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["study.csv"]
    made.run(job)  # by now another study has a row of that key
    assert study.load(tmp_path / "study.csv") == [row]


def test_a_run_that_hangs_is_ended_and_said_to_have(tmp_path):
    made = study.Study(arguments(), tmp_path / "study.csv", tmp_path)
    code, _, said = made.command("-c", "import time; time.sleep(60)", limit=0.5)
    assert code and study.LATE in said and not made.running


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_study_that_is_asked_to_end_ends_its_runs_and_says_so(tmp_path, signum):
    path, runs = tmp_path / "study.csv", tmp_path / "runs"
    words = ["-m", "tests.benchmarks.study", "--steps", "1000000", "--methods", "lsgan"]
    words += ["--dataset", "digits", "--csv", path, "--cache-dir", CACHE, "--out-dir", runs]
    heard = functools.partial(signal.signal, signum, signal.SIG_DFL)  # nohup and & have it ignored
    words = [sys.executable, *words, "--no-reference"]
    study_ = subprocess.Popen(words, cwd=study.ROOT, preexec_fn=heard)
    while study_.poll() is None and not list(runs.glob("*/*/lsgan-digits-*")):
        time.sleep(0.1)
    (trains,) = runs.glob("*/*/lsgan-digits-*")
    study_.send_signal(signum)
    try:
        assert study_.wait(60) == 128 + signum
    finally:
        study_.terminate()  # which ends its training too
    assert not path.exists() and not trains.exists() and not list(runs.iterdir())
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(runs) not in listed


@pytest.mark.parametrize("methods, asked", [("pix2pix", 0), ("pix2pix,lsgan", 1)])
def test_only_runs_on_it_ask_for_the_dataset(tmp_path, monkeypatch, methods, asked):
    a, calls = arguments("--methods", methods, "--no-reference"), []
    made = study.Study(a, tmp_path / "study.csv", tmp_path)
    monkeypatch.setattr(made, "command", lambda *words: calls.append(words) or (0, "", ""))
    made.prepare(study.listed(a))
    assert len(calls) == asked
    assert all(words[words.index("--dataset") + 1] == "mnist" for words in calls)


def test_two_studies_of_one_csv_keep_each_others_rows(tmp_path, monkeypatch):
    """Each writes the file anew: who has read it must not be overtaken before it has written."""
    a, path, save = arguments("--methods", "lsgan"), tmp_path / "study.csv", study.save

    def slow(*words):
        time.sleep(0.2)
        save(*words)

    monkeypatch.setattr(study, "save", slow)
    studies = [study.Study(a, path, tmp_path) for _ in range(3)]  # when there was nothing yet
    rows = [made_up("lsgan", seed, 1.0) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda s, row: s.keep(row), studies, rows))
    assert sorted(r["seed"] for r in study.load(path)) == ["0", "1", "2"]
    studies[0].keep(made_up("lsgan", 1, 9.0))
    assert [r["fid"] for r in study.load(path)] == ["1.0"] * 3


def test_evaluations_are_spread_by_the_rate_of_runs_like_this_one(tmp_path):
    a = study.arguments(["--minutes", "1", "--methods", "lsgan", "--no-reference", "--seeds", "1"])
    (job,) = study.listed(a)
    like = {"method": "lsgan", "seed": 9, "fid": 1, "steps": "60", "seconds": "2"}
    study.save(tmp_path / "study.csv", [made_up(**like)])
    others = {"setting": "3"}, {"dtype": "bf16"}, {"dataset": "digits"}
    rows = [made_up(**like), *(made_up(**like | {"steps": "2"}, **other) for other in others)]
    study.save(tmp_path / "study.csv", rows)
    made = study.Study(a, tmp_path / "study.csv", tmp_path)
    words = made.words_of(job, tmp_path)
    assert words[words.index("--eval-every") + 1] == "450"  # 30 a second, four in a minute


def test_rows_by_other_arguments_are_told(tmp_path, capsys):
    a = arguments("--methods", "cr,lsgan", "--seeds", "1", "--no-reference")
    rows = [{**dict.fromkeys(study.COLUMNS, ""), **j} for j in study.listed(a)]
    rows[0]["args"] += " --sigma 1"
    study.save(tmp_path / "study.csv", rows)
    assert study.train(a, tmp_path / "study.csv")
    said = capsys.readouterr().err
    assert "other arguments" in said and "cr" in said and "lsgan" not in said


@pytest.mark.parametrize("flag", ["--minutes", "--steps", "--seeds"])
def test_a_study_costs_something(flag):
    with pytest.raises(ValueError, match=f"{flag} must be positive"):
        study.arguments([flag, "-1", *(["--steps", "3"] if flag == "--seeds" else [])])


def test_what_random_settings_cannot_do_is_refused():
    with pytest.raises(ValueError, match="one seed"):
        arguments("--settings", "4", "--seeds", "2")
    with pytest.raises(ValueError, match="cyclegan has scores of its own"):
        arguments("--settings", "4", "--methods", "lsgan,cyclegan")


def four_updates(updates, args, set_weights=lambda i: None):
    """Weights and optimiser counts after four updates of G, and of D, on the same images."""
    torch.manual_seed(0)
    nets = icr_gan.build(args)
    update_d, update_g, state = updates(nets, args)
    for i in range(4):
        set_weights(i)
        update_d(torch.linspace(-1, 1, 4 * 1024).view(4, 1, 32, 32))
        update_g()
    steps = {s["step"].item() for opt in ("opt_g", "opt_d") for s in state[opt].state.values()}
    assert steps == {4.0} and state["t"] == 4  # one optimiser has seen every update
    return [p.clone() for net in nets.values() for p in net.state_dict().values()]


@pytest.mark.parametrize("every", [1, 2])
def test_lazy_consistency_is_that_of_every_rth_update_and_lsgan_between(every):
    """By the script's own update, whose weights of bCR are read anew at every call."""
    args = tiny("icr_gan", lambda_dis=0.0, lambda_gen=0.0, lambda_real=3.0, lambda_fake=2.0)

    def set_weights(i):
        on = every * ((i + 1) % every == 0)
        args.lambda_real, args.lambda_fake = 3.0 * on, 2.0 * on

    expected = four_updates(icr_gan.updates, args, set_weights)
    args.lambda_real, args.lambda_fake = 3.0, 2.0
    found = four_updates(lazy.lazy_updates(every), args)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_lazy_consistency_needs_its_number():
    with pytest.raises(ValueError, match="at every how many updates"):
        lazy.main(["--steps", "3"])
    with pytest.raises(ValueError, match="cannot be resumed"):
        lazy.main(["2", "--resume", "runs/some"])


def made_up(method, seed, fid, **more):
    row = dict.fromkeys(study.COLUMNS, "")
    evaluations = [{"seconds": 1, "fid": 2 * float(fid or 1)}]
    evaluations.append({"seconds": 2, "fid": fid, "recall": 0.5})
    row |= {"dataset": "mnist", "subset": "0", "budget": "1 min", "dtype": "fp32", "n": "9"}
    row |= {"method": method, "seed": str(seed), "setting": "0", "fid": str(fid), "recall": ".5"}
    row |= {"steps": "10", "seconds": "2", "jobs": "1", "features": "lenet", "date": "2026"}
    row |= {"control": str(fid), "evaluations": json.dumps(evaluations), "args": method}
    return row | more


def failed(method, seed, **more):
    blank = dict.fromkeys("fid recall steps seconds features control evaluations".split(), "")
    return made_up(method, seed, "") | blank | {"failed": "loss_d turned NaN"} | more


def cells(text, method):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
    return line[2:-2].split(" | ")


def report(rows, folder):
    return study_report.report(rows, folder / "s", study.METHODS, study.COURSE, "lsgan")


def test_ratios_pair_runs_of_one_seed_from_several_files(tmp_path, capsys):
    rows = [made_up("lsgan", s, 4, machine=m) for s in (0, 1) for m in ("one", "other")]
    rows += [made_up("cr", 0, 2, machine="one"), made_up("cr", 1, 8, machine="other", seconds="8")]
    rows += [made_up("zcr", 0, 5, machine="third"), made_up("bcr", 7, 5, machine="one")]
    names = []
    for name in ("one", "other", "third"):
        names.append(str(tmp_path / f"{name}.csv"))
        study.save(tmp_path / f"{name}.csv", [r for r in rows if r["machine"] == name])
    text = study.main(["--ratios", "lsgan", "--csv", ",".join(names)])
    assert text in capsys.readouterr().out
    low, high = (math.exp(s * 12.706 * math.log(2)) for s in (-1, 1))
    found = cells(text, "cr")
    assert found[:3] == ["cr", "2", f"1.00 ({low:.2f} to {high:.2f})"]
    assert found[-2].startswith("2.00 (") and found[-1] == "0: 0.50, 1: 2.00"  # fourfold
    assert "zcr" not in text and "bcr" not in text  # by the clock of another machine, of no seed
    by_steps = [r | {"budget": "9 steps"} for r in rows]
    found = cells(study_report.ratios(by_steps, "lsgan"), "zcr")
    assert found[2] == "1.25 (one pair)" and found[-2] == "-"  # but for the cost
    for row in by_steps[2:4]:  # lsgan's of seed 1: the run of the same machine is the pair
        row["fid"] = "8.0" if row["machine"] == "other" else "4.0"
    assert cells(study_report.ratios(by_steps, "lsgan"), "cr")[-1] == "0: 0.50, 1: 1.00"
    crowded = [r | {"jobs": "2"} if r["method"] == "cr" else r for r in rows]
    found = cells(study_report.ratios(crowded, "lsgan"), "cr")
    assert found[2].startswith("1.00") and found[-2] == "-"
    lost = [r | {"recall": "0.0"} if r["seed"] == "1" else r for r in rows]
    assert cells(study_report.ratios(lost, "lsgan"), "cr")[5].endswith("(one pair)")
    lost = [*rows, failed("cr", 2)]
    assert cells(study_report.ratios(lost, "lsgan"), "cr")[1] == "2, 1 failed"
    for names, why in (("gone.csv", "no runs"), (names[2], "no other method shares a seed")):
        with pytest.raises(ValueError, match=why):
            study.main(["--ratios", "lsgan", "--csv", names])


def test_a_set_at_a_path_and_what_was_added_have_pictures_and_a_table_of_their_own(tmp_path):
    rows = [made_up(m, s, 2, dataset="some/set") for m in ("lsgan", "cr") for s in (0, 1)]
    rows += [r | {"added": "--width=64", "fid": "1.0"} for r in rows]
    rows.append(made_up("zcr", 1, 3, dataset="some/set"))
    text = report(rows, tmp_path)
    assert "course" not in text  # whose figures are of digits
    assert "## some/set, 1 min each, fp32, up to 9 samples, --width=64" in text
    assert [line.split(" | ")[2] for line in text.splitlines() if line.startswith("| cr")] == [
        "2.00 ± 0.00", "1.00 ± 0.00",
    ]  # fmt: skip
    assert cells(text, "zcr")[-1] == "1.50 (one pair)"
    names = {p.name for p in tmp_path.glob("*.svg")}
    assert names == {f"s-some-set{more}-1min-fp32-9-budget.svg" for more in ("", "-width-64")}
    (tmp_path / "two").mkdir()
    report([*rows, *(r | {"dataset": "some-set"} for r in rows[:4])], tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.svg"))) == 3  # none over another


def test_a_ratio_is_that_of_pairs_with_students_interval():
    base = [made_up("lsgan", i, v) for i, v in enumerate((5, 10, 15, 99))]
    rows = [made_up("cr", i, v) for i, v in enumerate((4, 9, 13))]
    logs = [math.log(v) for v in (4 / 5, 9 / 10, 13 / 15)]
    half = 4.3027 * statistics.stdev(logs) / 3**0.5
    found = study_report.ratio(rows, base, study_report.fid)
    ends = (0, -half, half)
    assert found == pytest.approx([math.exp(statistics.mean(logs) + h) for h in ends], rel=1e-4)
    assert study_report.apart(found) == -1  # in each of three pairs, far less than the seeds differ
    back = study_report.ratio(base, rows, study_report.fid)
    assert back == pytest.approx([1 / found[i] for i in (0, 2, 1)])
    assert study_report.apart(back) == 1
    assert study_report.ratio(rows[:1], base, study_report.fid) == pytest.approx((0.8, 0, math.inf))
    assert study_report.ratio(rows, base[3:], study_report.fid) is None
    some = [rows[0], failed("cr", 1), made_up("cr", 2, 13)]
    mean, _, _ = study_report.ratio(some, base, study_report.fid)
    assert mean == pytest.approx((0.8 * 13 / 15) ** 0.5)


@pytest.mark.parametrize("n", range(1, len(study_report.T95) + 1))
def test_the_quantiles_are_students(n):
    scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / (n * math.pi) ** 0.5
    t = torch.linspace(0, study_report.T95[n - 1], 20001, dtype=torch.float64)
    inside = torch.trapezoid(scale * (1 + t * t / n) ** (-(n + 1) / 2), t)
    assert 2 * inside.item() == pytest.approx(0.95, abs=1e-4)


def test_a_method_is_compared_with_the_base_on_the_seeds_of_both(tmp_path):
    """A base that went on while the machine slowed makes no method cheaper or better."""
    base = [made_up("lsgan", i, 5 + 0.1 * i, steps="20") for i in range(2)]
    later = [made_up("lsgan", i, 9 + 0.1 * i, steps="10") for i in range(2, 5)]
    rows = base + later + [made_up("cr", i, 6 + 0.1 * i) for i in range(2)]
    text = report(rows, tmp_path)
    assert cells(text, "cr")[-3:-1] == ["2.00", "1.20 (1.17 to 1.22)"]
    assert "- behind lsgan: cr" in text
    apart = [made_up("cr", i, 6 + 0.1 * i) for i in (7, 8)]
    text = report(base + later + apart, tmp_path)
    assert cells(text, "cr")[-3:-1] == ["-", "-"] and "fewer than two seeds shared" in text


def test_the_report_says_which_differences_are_larger_than_the_spread(tmp_path):
    rows = [made_up("lsgan", i, 5 + 0.1 * i) for i in range(3)]
    rows += [made_up("cr", i, 2 + 0.1 * i) for i in range(3)]
    rows += [made_up("vanilla", i, 5.05 + 0.5 * (i % 2)) for i in range(3)]
    rows += [made_up("began", i, 50 + i, control=f"{1 + 0.01 * i}", steps="5") for i in range(3)]
    rows += [made_up("reference", 0, v, setting=str(v)) for v in (4, 6)]
    text = report(rows, tmp_path)
    assert cells(text, "lsgan")[:3] == ["lsgan", "3", "5.10 ± 0.10"]
    assert cells(text, "lsgan")[-1] == "26.6" and cells(text, "cr")[-1] == ""
    assert cells(text, "began")[-3] == "2.00" and cells(text, "cr")[-3] == "1.00"
    assert "- ahead of lsgan, by the interval of the ratio on the seeds of both: cr\n" in text
    assert "- behind lsgan: began\n" in text and "- not to be told from lsgan: vanilla\n" in text
    assert "2 times: 5.0 to 5.0 updates per second, FID 5.00 ± 1.41" in text
    # began, at its control of 1, comes first of four
    said = "orders 3 of 6 pairs as the distance does; beyond it: cr and began, lsgan and began"
    assert said in text
    assert "By other arguments than today's: began, cr, lsgan, vanilla." in text
    today = [r | {"args": study.METHODS[r["method"]]} for r in rows if r["method"] != "reference"]
    assert "By other" not in report(today, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s-mnist-1min-fp32-9-budget.svg", "s.md"]


def test_a_run_that_failed_is_neither_ahead_nor_gone(tmp_path):
    rows = [made_up("lsgan", i, 5 + 0.1 * i) for i in range(3)]
    rows += [made_up("cr", i, 3 + 0.1 * i) for i in range(2)] + [failed("cr", 2)]
    rows += [failed("wgan", i) for i in range(3)]
    text = report(rows, tmp_path)
    assert "- some runs failed, so not compared: cr (1 of 3), wgan (3 of 3)\n" in text
    assert "ahead" not in text and "not to be told" not in text and "pairs" not in text
    assert cells(text, "wgan")[1:3] == ["3, 3 failed", "-"] and "| 0 |" not in text
    assert text.index("| lsgan |") < text.index("| cr | 3, 1 failed |") < text.index("| wgan |")
    assert ">cr (2 of 3)<" in (tmp_path / "s-mnist-1min-fp32-9-budget.svg").read_text()
    assert "cr, 3, 1 failed" not in report([failed("lsgan", 0)], tmp_path)  # nor image to image


def test_scores_of_their_own_are_told_with_features_and_failures(tmp_path):
    last = json.dumps([{"n": 200, "features": "cifarnet", "psnr": 14.5}])
    rows = [made_up("pix2pix", i, 4, recall="", evaluations=last) for i in range(2)]
    text = report([*rows, failed("pix2pix", 2)], tmp_path)
    assert "- pix2pix, 3, 1 failed runs (n 200, features cifarnet): psnr 14.5 ± 0" in text


def test_random_settings_that_failed_count_as_noise(tmp_path):
    rows = [made_up("cr", 0, v, setting=f"{k}") for k, v in enumerate((3, 1, 2, 7), 1)]
    rows += [made_up("lsgan", 0, v, setting=f"{k}") for k, v in enumerate((2, 2), 1)]
    rows += [failed("lsgan", 0, setting=f"{k}") for k in (3, 4)]
    rows += [failed("wgan", 0, setting=f"{k}") for k in range(1, 5)]
    text = report(rows, tmp_path)
    assert cells(text, "lsgan")[1:4] == ["4, 2 failed", "2.0", "2501.0"]
    assert cells(text, "wgan")[1:4] == ["4, 4 failed", "5000.0", "5000.0"]
    assert cells(text, "cr")[2:5] == ["1.0", "2.5", "1.0"]
    assert cells(text, "cr")[6] == "in 3 of 4"
    assert ">wgan<" in (tmp_path / "s-mnist-1min-fp32-9-boxes.svg").read_text()


def test_the_expected_minimum_is_that_of_choices_without_repetition():
    values = [3.0, 1.0, 2.0, 9.0, 1.0]
    for k in range(1, 6):
        smallest = [min(c) for c in itertools.combinations(values, k)]
        expected = statistics.mean(smallest)
        assert study_report.expected_minimum(values, k) == pytest.approx(expected)
    r = random.Random(0)
    values = [r.gauss(9, 1) for _ in range(40)]
    low, high = study_report.bootstrap(values, 1)
    width = 3.29 * statistics.pstdev(values) / 40**0.5  # from 5 to 95 % of a normal mean
    assert low < statistics.mean(values) < high and high - low == pytest.approx(width, rel=0.15)
    assert study_report.bootstrap(values, 20)[1] < low  # of more, less


def test_curves_of_runs_evaluated_at_different_times_are_those_of_the_runs():
    """Two runs of 20 exp(-t / 30), seen at other times: their mean is that at every time."""
    def seen(*times):
        found = [{"seconds": t, "fid": 20 * math.exp(-t / 30)} for t in times]
        return made_up("cr", 0, 1, evaluations=json.dumps(found))

    rows = [seen(30, 60, 90), seen(44, 88, 91)]
    for t in (44, 50, 60, 77, 88, 90):
        for points in map(study_report.best_so_far, rows):
            assert study_report.at(points, t) == pytest.approx(20 * math.exp(-t / 30))
    svg = study_report.budget_chart("", {"cr": rows, "once": [seen(90)]})
    assert "once" not in svg and ">cr<" in svg
    assert study_report.budget_chart("", {"a": [seen(9)]}) is None


# ---- what a GPU is asked ---------------------------------------------------------------------


def test_parts_fail_and_run_out_of_time_without_the_rest(tmp_path, monkeypatch):
    def parts(cuda, a, work):
        result = f"{work}/x.json"
        code = f"open({result!r}, 'w').write('{{}}'); print('3 passed')"
        gone = f"print('error: no', {result!r}); print({result!r})"
        return [
            gpu.Part("fails", ["-c", "raise SystemExit('no such thing')"], 0.5),
            gpu.Part("names its folder", ["-c", gone], 0.5),
            gpu.Part("hangs", ["-c", "import time; time.sleep(100)"], 0.02),
            gpu.Part("works", ["-c", code], 0.5, result),
        ], ["a note"]

    monkeypatch.setattr(gpu, "parts", parts)
    rows = gpu.main(["--minutes", "1", "--out", str(tmp_path)])
    assert [r["code"] for r in rows] == [1, 0, "limit", 0]
    said = [r["said"] for r in rows]
    assert said == ["no such thing", "error: no FOLDER/x.json", "", "3 passed"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["parts"] == rows and kept["notes"] == ["a note"]
    assert {p.name for p in tmp_path.iterdir()} == {"gpu.json", "table.txt", "logs.tar.gz"}


def test_the_parts_of_a_cpu_and_of_a_gpu_are_commands_that_are_taken(tmp_path):
    a = gpu.arguments(["--data-dir", str(tmp_path)])
    for cuda in (False, True):
        parts, notes = gpu.parts(cuda, a, tmp_path)
        assert len(notes) == 1 and len({p.name for p in parts}) == len(parts)
        for p in parts:
            if p.words[0].endswith(".py"):
                study.arguments_of(p.words)
            elif p.words[1] == "tests.benchmarks.train":
                train.arguments(p.words[2:])
    names = [p.name for p in parts]
    assert names[:2] == ["tests", "kernels"] and {f"updates of {n}" for n in NAMES} <= {*names}


def test_the_benchmark_of_gpus_runs_its_parts_on_a_cpu(tmp_path):
    words = ["--minutes", "2", "--parts", "kernels,profile", "--out", tmp_path / "out"]
    done = shell("-m", "tests.benchmarks.gpu", *words, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [(p["part"], p["code"]) for p in kept["parts"]] == [("kernels", 0), ("profile", 0)]
    assert all(p["result"] for p in kept["parts"])


# ---- the yardstick ---------------------------------------------------------------------------


def test_the_baseline_is_least_squares_on_a_dcgan():
    zero, one = torch.zeros(4), torch.ones(4)
    assert yardstick.discriminator_loss(zero, one) == 1 and yardstick.generator_loss(zero) == 0.5
    g, d = yardstick.init(yardstick.Generator()), yardstick.init(yardstick.Discriminator())
    assert d(g(torch.randn(2, yardstick.Z_DIM))).shape == (2,)
    before = [[p.clone() for p in net.parameters()] for net in (g, d)]
    update_d, update_g = yardstick.updates(g, d)
    for update, given, moving in ((update_d, torch.rand(8, 1, 32, 32), 1), (update_g, 8, 0)):
        update(given)
        moved = [
            any(not torch.equal(p, q) for p, q in zip(net.parameters(), old))
            for net, old in zip((g, d), before)
        ]
        assert moved[moving] and moved.count(True) == (1 if moving else 2)


def test_a_command_of_the_yardstick_is_checked_before_anything_trains():
    added = {"max-minutes": 1.0, "threads": 1} | yardstick.CHEAP
    path, argv, args = yardstick.plan("icr_gan.py --sigma 0.1", added)
    assert path.name == "icr_gan.py" and args.sigma == 0.1 and args.dataset == "mnist"
    assert args.max_minutes == 1 and args.eval_every == 0
    _, _, args = yardstick.plan("lsgan.py --steps 5", added)
    assert args.steps == 5 and args.max_minutes is None
    for text, said in (
        ("nothing.py", "first word"),
        ("lsgan.py --lr x", "lr"),
        ("lsgan.py --dataset digits", "MNIST"),
        ("lsgan.py --image-size 64", "32 x 32"),
        ("pix2pix.py", "latents"),
    ):
        with pytest.raises(ValueError, match=said):
            yardstick.plan(text, added)


def test_ratios_are_to_the_baselines_mean_and_drift_is_told():
    rows = [{"kind": "baseline", "name": "b", "distance": d, "steps": 9 - d} for d in (1, 3)]
    rows.append({"kind": "train", "name": "x", "distance": 1.0})
    assert [r["ratio"] for r in yardstick.with_ratios(rows)] == [0.5, 1.5, 0.5]
    assert "8 and 6" in yardstick.drift(rows) and yardstick.drift(rows[:1]) is None
    assert "x" in yardstick.table(yardstick.with_ratios(rows))


# ---- ablations -------------------------------------------------------------------------------


def test_ablations_train_what_is_missing_and_show_all_of_it(tmp_path, monkeypatch, capsys):
    words = ["cyclegan", "--only", "whole;no cycle", "--steps", "1", "--subset", "8", "--width", "4"]
    words += ["--n-blocks", "0", "--image-size", "32", "--eval-samples", "8", "--cache-dir", CACHE]
    words += ["--rows", "3", "--out-dir", str(tmp_path), "--device", "cpu"]
    path = ablations.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [
        "| input", "| mean of training", "| training images", "| whole", "| no cycle",
    ]  # fmt: skip
    assert "error_AtoB" in lines[0] and lines[5].startswith("| whole | 1 | ")
    logs = {p.parts[-3]: p.read_text() for p in tmp_path.glob("cyclegan/*/*/log.csv")}
    assert "cycle_a" in logs["whole"] and "cycle_a" not in logs["no-cycle"]
    sheet = path.read_bytes()
    monkeypatch.setattr(ablations.subprocess, "run", None)  # nothing is trained again
    assert ablations.main(words).read_bytes() == sheet
    with pytest.raises(TypeError):
        ablations.main([*words, "--seed", "1"])  # but another run is
    monkeypatch.undo()
    ablations.main([*words, "--seed", "1", "--only", "whole"])
    assert len(list(tmp_path.glob("cyclegan/whole/*/generator.pt"))) == 2
    monkeypatch.setattr(ablations.subprocess, "run", None)
    assert ablations.main(words).read_bytes() == sheet  # each finds its own

    # a block of columns for each direction, whose last row is the worst translation
    folder = ablations.trained("cyclegan", "whole", ablations.arguments(words).words, tmp_path)
    args = study.cli.args_of(folder, script("cyclegan").Args)
    (there, x, true), (back, y, plain) = ablations.of_test_split("cyclegan", args)
    assert (there, back) == ("AtoB", "BtoA") and len(x) == len(true) and len(y) == len(plain)
    errors = (ablations.translated(folder, x, there) - true).abs().flatten(1).mean(1)
    column = ablations.strip(x[torch.tensor([0, 1, errors.argmax()])], there)
    whole = ablations.picture("cyclegan", {"whole": folder}, 3)
    foot = whole.height // 2 - 4
    shown = whole.crop((0, foot - column.height, column.width, foot))
    assert shown.tobytes() == column.tobytes()


def test_every_setting_is_one_that_its_script_takes():
    for name in ablations.ABLATIONS:
        assert ablations.arguments([name]).settings == list(ablations.ABLATIONS[name])
    with pytest.raises(ValueError, match="--only has cgan"):
        ablations.arguments(["pix2pix", "--only", "cgan"])
    with pytest.raises(ValueError, match="unknown argument --lamda-l1"):
        ablations.arguments(["pix2pix", "--lamda-l1", "3"])
