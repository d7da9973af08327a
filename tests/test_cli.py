"""common/cli.py: resuming from Python and from a shell, what ends in which exit code."""
import json
import shutil

import pytest
import torch

from common import cli, files, processes, run
from tests.helpers import CACHE, resume, script, tiny, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose arguments are none of the defaults'."""
    out = tmp_path_factory.mktemp("runs")
    return train("lsgan", out, log_every=1, lr_decay=0.0, subset=64, seed=3)


def copied(folder, to):
    return shutil.copytree(folder, to / "copy")


# ---- resume


def test_python_takes_the_arguments_of_the_folder_but_for_those_given(finished, tmp_path):
    folder = copied(finished, tmp_path)
    assert resume("lsgan", folder, steps=3) == folder
    rows = files.read_csv(folder / "log.csv")
    assert [r["step"] for r in rows] == ["1", "2", "3"]  # log_every 1, not the default's 50
    saved = files.load_tensors(folder / "checkpoint.pt")
    assert saved["state"]["batches"]["drawn"] == 3  # the subset's order goes on


def test_python_can_ask_for_the_number_of_steps_that_is_the_default(finished, tmp_path):
    args = script("lsgan").Args(resume=str(finished), steps=4000)
    cli.take_over(args)
    assert (args.steps, args.log_every) == (4000, 1)
    args = script("lsgan").Args(resume=str(finished))
    cli.take_over(args)
    assert args.steps == 2


@pytest.mark.parametrize(
    "name, typed, follows",
    [
        ("wgan_gp", {"clip": 0.01}, {"lr": 3e-3}),
        ("icr_gan", {"image_size": 32}, {"shift": 3}),
        ("cyclegan", {"lambda_cycle": 10.0}, {"lambda_cycle_b": 2.0}),
    ],
)
def test_what_follows_from_a_value_typed_again_is_no_change(name, typed, follows, tmp_path):
    args = tiny(name, **typed, **follows) if name != "cyclegan" else script(name).Args(**follows)
    (tmp_path / "args.json").write_text(json.dumps({"script": name, "args": vars(args)}))
    again = script(name).Args(resume=str(tmp_path), **typed)
    cli.take_over(again)
    assert {k: getattr(again, k) for k in follows} == follows


def test_an_old_value_typed_again_is_no_change(finished):
    line = ["--resume", str(finished), "--lr-decay", "0", "--width", "4", "--channels", "0"]
    args = cli.parse(script("lsgan").Args, [*line, "--precision", "auto", "--threads", "0"])
    assert (args.width, args.precision, args.threads, args.channels) == (4, "fp32", 1, 1)
    assert args.resume == str(finished)


@pytest.mark.parametrize("words, said", [("--lr 1", "--lr"), ("--dataset mnist", "--dataset")])
def test_anything_else_is_refused_with_both_values(finished, words, said):
    with pytest.raises(ValueError, match=f"{said} cannot change"):
        cli.parse(script("lsgan").Args, ["--resume", str(finished), *words.split()])


def test_a_folder_of_images_may_move_but_not_change(tmp_path):
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(16):
        pixels = torch.randint(0, 256, (32, 32), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(photos / f"{i}.png")
    cache = str(tmp_path / "cache")
    folder = train("lsgan", tmp_path / "runs", dataset=str(photos), cache_dir=cache)
    photos.rename(tmp_path / "moved")
    (photos / "4.png").mkdir(parents=True)  # something else lies there now
    resume("lsgan", folder, dataset=str(tmp_path / "moved"), steps=3)
    Image.new("L", (32, 32)).save(tmp_path / "moved" / "3.png")
    with pytest.raises(ValueError, match="checkpoint.pt does not fit"):
        resume("lsgan", folder, dataset=str(tmp_path / "moved"), steps=4)


def test_more_arguments_than_the_script_takes_are_named(finished, tmp_path):
    folder = copied(finished, tmp_path)
    saved = json.loads((folder / "args.json").read_text())
    saved["args"]["momentum"] = 1
    (folder / "args.json").write_text(json.dumps(saved))
    for attempt in (lambda: run.load(folder), lambda: resume("lsgan", folder)):
        with pytest.raises(ValueError, match="momentum"):
            attempt()


def test_what_an_editor_or_a_spreadsheet_saved_with_a_mark_is_read(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for name in ("metrics.csv", "args.json"):
        text = (folder / name).read_text()
        (folder / name).write_text("\ufeff" + text, encoding="utf-8")
    resume("lsgan", folder, steps=3)
    assert [r["step"] for r in files.read_csv(folder / "metrics.csv")] == ["2", "3"]


@pytest.mark.parametrize(
    "old, new", [(b",", b";"), (b"\n2,", b"\n2.0,"), (b"step", b"steps"), (b"lenet", b"\xff"), (b".", b",")]
)
def test_a_table_in_another_form_is_named(finished, tmp_path, old, new):
    folder = copied(finished, tmp_path)
    text = (folder / "metrics.csv").read_bytes()
    assert old in text
    (folder / "metrics.csv").write_bytes(text.replace(old, new))
    with pytest.raises(ValueError, match="metrics.csv has another form"):
        resume("lsgan", folder, steps=3)


# ---- checks


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": "8"}, "batch_size"),
        ({"quiet": 1}, "quiet"),
        ({"steps": True}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"eval_every": 2**63}, "eval_every must fit 63 bits"),
        ({"dataset": 3}, "dataset"),
        ({"lambda_gen": -1.0}, "lambda_gen"),
        ({"shift": 32}, "shift must be below image_size, 32"),
    ],
)
def test_types_and_ranges_are_checked_from_python_too(changes, said, tmp_path):
    m = script("icr_gan")
    with pytest.raises(ValueError, match=said):
        m.main(tiny("icr_gan", out_dir=str(tmp_path / "runs"), cache_dir=CACHE, **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, wanted",
    [("--quiet", True), ("--no-quiet", False), ("--quiet on", True), ("--quiet off --lr 1", False)],
)
def test_switches_are_spelt_in_two_ways(words, wanted):
    assert cli.parse(script("lsgan").Args, words.split()).quiet is wanted


def test_a_switch_is_on_or_off():
    with pytest.raises(ValueError, match="quiet.*wanted on or off, got maybe"):
        cli.parse(script("lsgan").Args, ["--quiet", "maybe"])


# ---- exit codes


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("x"), 2),
        (FileNotFoundError(2, "gone", "x"), 2),
        (files.NotSaved("x"), 1),
        (cli.Diverged("x"), 1),
        (processes.Lost("x"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. x"), 1),
        (MemoryError("x"), 1),
        (KeyboardInterrupt(), 130),
        (cli.Stopped(15, "x"), 143),
    ],
)
def test_each_error_has_its_code_and_its_line(error, code, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as e:
        cli.guard(command)
    assert e.value.code == code
    lines = capsys.readouterr().err.splitlines()
    if code == 130:
        assert not lines
    else:
        assert len(lines) == 1 and "x" in lines[0]
        assert lines[0].startswith("error: ") == (code in (1, 2))


def test_a_mistake_of_the_program_keeps_its_traceback():
    def command():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError):
        cli.guard(command)
