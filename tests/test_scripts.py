"""What holds for every script: shape of the file, the copied file, arguments, bad input."""
import ast
import dataclasses
import difflib
import inspect
import re
import shutil

import pytest
import torch

from common import cli
from tests.helpers import ALL, CACHE, ROOT, SCRIPTS, TINY, flags, script, shell, tiny

SHARED = (  # names that mean the same wherever they stand; losses belong to their method
    "Generator",
    "SNConv2d",
    "Discriminator",
    "PatchDiscriminator",
    "build",
    "latents",
    "sample",
    "between",
    "update_ema",
    "learning_rate",
    "augment",
    "draw_moves",
    "consistency",
    "gradient_penalty",
    "interpolate",
    "jittered",
    "initialise",
    "sharpness",
)
# where a method wants another network or default, and only there
OTHER_CODE = {("cn_lsgan", "Discriminator"), ("vaegan", "Discriminator"), ("wgan_gp", "build")}
OTHER_CODE |= {(n, "build") for n in ("ebgan", "began", "vaegan", "pix2pix", "cyclegan")}
OTHER_CODE |= {("began", key) for key in ("Generator", "latents", "sample", "between", "initialise")}
OTHER_CODE |= {("pix2pix", "sample"), ("cyclegan", "sample")}  # of images, not of latents
OTHER_LINES = {
    "wgan_gp": "steps n_critic lr beta2 lambda_gp width",
    "began": "gamma lambda_pt z_dim width batch_size",
    "vaegan": "gamma batch_size lr lambda_adv",
    "pix2pix": "dataset image_size width batch_size lr beta2 ema_decay eval_samples jitter lambda_adv",
    "cyclegan": (
        "dataset image_size steps batch_size lr beta2 ema_decay eval_samples jitter channels "
        "patch_layers"
    ),
}


def source(name):
    return (ROOT / f"{name}.py").read_text()


def code_of(text):
    """Lines of a script with its docstrings, comment-only and blank lines taken out."""
    drop = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            drop |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line for i, line in enumerate(text.splitlines(), 1) if i not in drop]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


# ---- the file


@pytest.mark.parametrize("key", SHARED)
def test_shared_stretches_are_identical_wherever_they_are_copied(key):
    found = {n: inspect.getsource(getattr(script(n), key)) for n in ALL if hasattr(script(n), key)}
    same = {text for n, text in found.items() if (n, key) not in OTHER_CODE}
    assert len(same) <= 1, f"{key} has drifted between {', '.join(found)}"
    for n, text in found.items():
        assert (text in same) != ((n, key) in OTHER_CODE), f"{key} of {n} needs no exception"


def test_what_is_excepted_differs_by_one_thing_alone():
    lsgan, cn_lsgan, wgan_gp = (script(n) for n in ("lsgan", "cn_lsgan", "wgan_gp"))
    critic = inspect.getsource(wgan_gp.Critic)
    assert critic.replace("class Critic(", "class Discriminator(") == inspect.getsource(cn_lsgan.Discriminator)
    assert inspect.getsource(wgan_gp.build).replace("Critic(", "Discriminator(") == inspect.getsource(lsgan.build)
    ours, theirs = (code_of(inspect.getsource(m.Discriminator)) for m in (cn_lsgan, lsgan))
    theirs = [line.replace("SNConv2d", "nn.Conv2d") for line in theirs]
    assert ours == [re.sub(r"spectral_norm\((nn\.\w+\(.*?, \d\))\)", r"\1", line) for line in theirs]


def test_every_script_ends_in_the_same_lines():
    ends = {source(n)[source(n).index('if __name__ == "__main__":') :] for n in ALL}
    assert len(ends) == 1


@pytest.mark.parametrize("name", ALL)
def test_arguments_of_the_same_name_are_the_same_line(name):
    def lines(n):
        return {m[1]: m[0] for m in re.finditer(r"^    (\w+): .*  # .*$", source(n), re.M)}

    mine, own = lines(name), OTHER_LINES.get(name, "").split()
    for other in ALL:
        theirs = lines(other)
        for key in mine.keys() & theirs.keys() - {*own, *OTHER_LINES.get(other, "").split()}:
            assert mine[key] == theirs[key], f"{key} of {name} and {other}"


def test_what_updates_and_main_share_is_the_same_text():
    """Both are the method's own, but what lsgan.py has there of optimisers, averages and the loop is in every script."""

    def between(text, first, last):
        start = text.index(first)
        return text[start : text.index(last, start) + len(last)]

    spans = (
        ("        lr = torch.tensor(", "changes\n"),
        ("        return torch.optim.Adam(", "\n"),
        ("    def autocast():", "cache_enabled=False)\n"),
        ("        z = torch.randn(len(real)", "\n"),
        ("        opt_d.zero_grad()", "opt_d.step()\n"),
        ("    def update_g():", "device=device)\n"),
        ("        opt_g.zero_grad()", "max=args.ema_decay))\n"),
    )
    for first, last in spans:
        wanted = between(inspect.getsource(script("lsgan").updates), first, last)
        for name in SCRIPTS:
            assert wanted in inspect.getsource(script(name).updates), f"{name}: {wanted}"
    own = (  # what fuses, and what ICR warns of
        r"    ops = None\n    if machine.fused\(args\):\n        import kernels as ops\n"
        r"|(?<=share\(args\)), ops|machine, |(?<=# borrowed).*|        r\.warn_above\(.*\n"
    )
    mains = {name: re.sub(own, "", inspect.getsource(script(name).main)) for name in SCRIPTS}
    assert len(set(mains.values())) == 1
    for name in SCRIPTS:
        fuses = "import kernels as ops" in inspect.getsource(script(name).main)
        assert fuses == hasattr(script(name).Args, "impl") == (name != "lsgan")


def changes(a, b):
    """Lines of code, with a sign in front, by which two scripts differ."""
    lines = difflib.unified_diff(*(code_of(source(n)) for n in (a, b)), n=0)
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n != "lsgan"])
def test_the_difference_to_lsgan_is_less_than_120_lines(name):
    assert len(changes("lsgan", name)) < 120


@pytest.mark.parametrize("name", ALL)
def test_above_main_only_the_standard_library_and_torch_are_imported(name):
    for node in ast.parse(source(name)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] in {"copy", "math", "types", "dataclasses", "typing", "torch"}


@pytest.mark.parametrize("name", ALL)
def test_every_argument_has_help_and_is_used(name):
    args = inspect.getsource(script(name).Args)
    rest = source(name).replace(args, "") + "".join(p.read_text() for p in (ROOT / "common").glob("*.py"))
    for field in dataclasses.fields(script(name).Args):
        assert re.search(rf"^    {field.name}: .*  # \w", args, re.M), f"{field.name} has no help"
        assert re.search(rf"\b(args|a|self|saved|values)\.{field.name}\b", rest), f"{field.name} is a dead flag"


def test_copied_scripts_work_with_torch_alone(tmp_path):
    """Each loaded from its file alone, without an entry in sys.modules, as notebooks do it."""
    code = "import sys, torch\nfrom importlib.util import module_from_spec, spec_from_file_location\n"
    for name in ALL:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        size = 64 if name in ("pix2pix", "cyclegan") else 32
        code += f"""
spec = spec_from_file_location("{name}", "{name}.py")
m = module_from_spec(spec)
spec.loader.exec_module(m)
args = m.Args(width=4, batch_size=4)
nets = m.build(args)
*updates, state = m.updates(nets, args)
x = torch.rand(4, 3 if {size} == 64 else 1, {size}, {size})
inputs = dict(pix2pix=([torch.cat([x, x], 1)],), cyclegan=([x[:, :1], x[:, 1:2]],))
inputs = inputs.get("{name}", ([x], []))
losses = [u(*i) for u, i in zip(updates, inputs, strict="{name}" != "vaegan")]
assert all(torch.isfinite(v) for one in losses for v in one.values())
z = m.latents(3, args) if hasattr(m, "latents") else inputs[0][0][:3, :3]
assert m.sample(nets, args, z).shape[2:] == ({size}, {size})
"""
    code += "assert not {'common', 'kernels', 'torchvision', 'PIL'} & set(sys.modules)\n"
    (tmp_path / "use.py").write_text(code)
    done = shell("use.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_copy_beside_common_is_a_script_like_any_other(tmp_path):
    """cp lsgan.py my_gan.py: it trains, resumes, and can be loaded."""
    shutil.copytree(ROOT / "common", tmp_path / "copy" / "common")
    shutil.copy(ROOT / "lsgan.py", tmp_path / "copy" / "my_gan.py")
    at = tmp_path / "copy"
    line = flags(TINY | {"out_dir": "runs", "cache_dir": CACHE})
    assert shell("my_gan.py", *line, cwd=at).returncode == 0
    (folder,) = (at / "runs").iterdir()
    assert folder.name.startswith("my_gan-digits")
    done = shell("my_gan.py", "--resume", folder, "--steps", "3", cwd=at)
    assert done.returncode == 0, done.stderr
    done = shell("-m", "common.sample", folder, "--n", "4", cwd=at)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_generator_is_exported_with_any_number_of_latents(name):
    m = script(name)
    g = m.Generator(8, 1, 32, 4).eval()
    n = torch.export.Dim("n", min=2, max=64)
    exported = torch.export.export(g, (torch.randn(4, 8),), dynamic_shapes=({0: n},)).module()
    for count in (2, 7):
        z = torch.randn(count, 8)
        torch.testing.assert_close(exported(z), g(z))
    assert g(torch.randn(0, 8)).shape == (0, 1, 32, 32)


@pytest.mark.parametrize("name", ALL)
def test_rate_is_constant_and_then_falls_over_the_share_that_lr_decay_says(name):
    m = script(name)
    args = m.Args(lr=1.0, lr_decay=0.25)
    rates = [m.learning_rate(args, done) for done in (0.0, 0.5, 0.75, 0.875, 1.0)]
    assert rates == [1, 1, 1, 0.5, 0]
    assert m.learning_rate(m.Args(lr=1.0, lr_decay=0.0), 1.0) == 1


def test_between_two_latents_lies_the_arc():
    m = script("lsgan")
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    half = m.between(a, b, 0.5)
    torch.testing.assert_close(half, torch.tensor([[1.0, 1.0]]) * 3 / 2**0.5)
    torch.testing.assert_close(m.between(a, b, 0.0), a)
    torch.testing.assert_close(m.between(a, b, 1.0), b)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("image_size", [8, 16, 64])
def test_sizes_and_channels_train(name, image_size):
    m, args = script(name), tiny(name, image_size=image_size, channels=3)
    nets = m.build(args)
    update_d, update_g, _ = m.updates(nets, args)
    losses = update_d(torch.rand(8, 3, image_size, image_size)) | update_g()
    assert all(torch.isfinite(v) for v in losses.values())
    assert m.sample(nets, args, m.latents(2, args)).shape == (2, 3, image_size, image_size)


# ---- the command line


@pytest.mark.parametrize("name", ALL)
def test_both_spellings_and_all_types_are_parsed(name):
    cls = script(name).Args
    line = "--batch_size 32 --max-minutes 0.5 --data-dir=some/data_dir --quiet --no-quiet --precision fp32 --lr 1e-3".split()
    args = cli.parse(cls, line)
    assert (args.batch_size, args.max_minutes, args.data_dir, args.quiet) == (32, 0.5, "some/data_dir", False)
    assert (args.precision, args.lr, args.steps) == ("fp32", 1e-3, None)
    assert cli.parse(cls, []) == cls()


BAD = {
    "image_size": ["30", "4", "1024", "-32", "0", "3.5", "nan"],
    "batch_size": ["0", "-1", "many"],
    "steps": ["0", "-5", "1e3"],
    "max_minutes": ["0", "-1", "nan", "inf"],
    "lr": ["0", "-0.001", "nan", "inf"],
    "beta1": ["1", "-0.1", "nan"],
    "ema_decay": ["1"],
    "eval_samples": ["5"],
    "eval_every": ["-1"],
    "threads": ["-1"],
    "seed": ["-1", "1" * 23],
    "z_dim": ["0", "999999999999"],
    "subset": ["-1"],
    "channels": ["2"],
    "precision": ["fp8"],
    "lr_decay": ["1.5"],
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("key, value", [(k, v) for k, values in BAD.items() for v in values])
def test_bad_values_are_named_with_what_is_accepted(name, key, value):
    if key not in {f.name for f in dataclasses.fields(script(name).Args)}:
        pytest.skip(f"{name}.py has no {key}")
    with pytest.raises(ValueError) as e:
        cli.parse(script(name).Args, [f"--{key.replace('_', '-')}", value])
    assert key in str(e.value).replace("-", "_") and value.lstrip("-") in str(e.value)


@pytest.mark.parametrize("name, key, value", [("icr_gan", "sigma", -1), ("icr_gan", "lambda_gen", float("nan")), ("lsgan", "a", float("inf"))])
def test_bad_weights_are_named(name, key, value):
    with pytest.raises(ValueError, match=key):
        cli.check(script(name).Args(**{key: value}))


def test_close_spellings_are_suggested():
    cls = script("icr_gan").Args
    with pytest.raises(ValueError, match="--lambda-real"):
        cli.parse(cls, ["--lamda-real", "1"])
    with pytest.raises(ValueError, match="unknown argument"):
        cli.parse(cls, ["--lambda", "1"])  # no abbreviations
    with pytest.raises(ValueError, match="bf16"):
        cli.parse(cls, ["--precision", "bf61"])


@pytest.mark.parametrize("name", ALL)
def test_help_shows_every_argument_with_its_default(name):
    done = shell(f"{name}.py", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for field in dataclasses.fields(script(name).Args):
        assert f"--{field.name.replace('_', '-')} " in text
    assert script(name).__doc__.split("\n")[0] in text


@pytest.mark.parametrize(
    "words, said",
    [
        (["--dataset", "no/such/folder"], "no/such/folder"),
        (["--dataset", "mnits"], "mnist"),
        (["--dataset", "mnist", "--data-dir", "EMPTY"], "--dataset digits"),
        (["--dataset", "EMPTY"], "image"),
        (["--image-size", "30"], "30"),
        (["--lr", "nan"], "lr"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--device", "gpu"], "gpu"),
        (["--batch-size", "30000"], "30000"),
        (["--out-dir", "FILE"], "out_dir"),
        (["--features", "cifarnet"], "3-channel"),
        (["--resume", "EMPTY"], "args.json"),
        (["--no-such"], "--no-such"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, said, tmp_path, monkeypatch, capsys):
    """In this process: an import of torch per case would be most of the test."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # a download fails at once
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    out = tmp_path / "runs"
    m = script("icr_gan")
    words = [str(tmp_path / w) if w in ("EMPTY", "FILE") else w for w in words]
    line = flags(TINY | {"cache_dir": CACHE}) + ["--out-dir", str(out)] + words
    monkeypatch.setattr("sys.argv", ["icr_gan.py", *line])
    with pytest.raises(SystemExit) as e:
        cli.cli(m.main, m.Args, m.__doc__)
    assert e.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: ") and said in err[0]
    assert not out.exists()


def test_kernels_are_not_needed(tmp_path):
    """Neither kernels nor torchvision is imported by a default run."""
    code = f"""
import sys
import icr_gan
icr_gan.main(icr_gan.Args(**{TINY!r}, out_dir={str(tmp_path)!r}))
assert not {{"kernels", "torchvision"}} & set(sys.modules)
"""
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr


def photos(folder, n):
    from PIL import Image

    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for i in range(n):
        pixels = torch.randint(0, 256, (32, 32), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    "name, folders, said",
    [
        ("vaegan", {"train": 8, "test": 1}, "images to encode: 1 of"),
        ("cyclegan", {"trainA": 8, "trainB": 1, "testA": 2, "testB": 2}, "trainB: 1 of"),
        ("cyclegan", {"trainA": 8, "trainB": 8, "testA": 2, "testB": 1}, "testB: 1 of"),
    ],
)
def test_too_few_images_to_score_are_told_before_the_training(name, folders, said, tmp_path):
    for folder, n in folders.items():
        photos(tmp_path / "photos" / folder, n)
    with pytest.raises(ValueError, match=said):
        short(name, tmp_path, dataset=str(tmp_path / "photos"), batch_size=2 - (name == "cyclegan"))
    assert not (tmp_path / "runs").exists()


def test_too_few_pairs_to_score_are_told_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="pairs to train on: 1 of"):
        short("pix2pix", tmp_path, cache_dir=CACHE, norm="instance", batch_size=1, subset=1)
    assert not (tmp_path / "runs").exists()


def short(name, folder, **changes):
    given = {"cache_dir": str(folder / "cache"), "image_size": 32, "width": 4, "steps": 1} | changes
    given |= {"device": "cpu", "precision": "fp32", "threads": 1, "quiet": True}
    return script(name).main(script(name).Args(out_dir=str(folder / "runs"), **given))


@pytest.mark.parametrize("name", ["ebgan", "began"])
def test_a_term_between_images_asks_for_two_in_every_process(name):
    with pytest.raises(ValueError, match="each process needs two"):
        script(name).Args(batch_size=1)
    script(name).Args(batch_size=1, lambda_pt=0.0)
