"""The READMEs' commands: all are parsed, and the first one's are run where the data are built in."""
import re
import shlex

import pytest

from common import cli, evaluate, report, run, sample
from tests.benchmarks import gpu, study, yardstick
from tests.helpers import ALL, CACHE, ROOT, TINY, flags, script

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.S)
LINES = [
    line.split("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
]
COMMANDS = [shlex.split(line) for line in LINES if line.startswith("python ")]
MODULES = {
    "common.sample": sample.main,
    "common.report": report.main,
    "common.evaluate": evaluate.main,
}
BENCHMARKS = {
    "tests.benchmarks.gpu": gpu.arguments,
    "tests.benchmarks.study": study.arguments,
    "tests.benchmarks.yardstick": yardstick.arguments,
}
MORE = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
TOLD = [line.split("  #")[0].strip() for line in MORE.splitlines()]
TOLD = [line for line in TOLD if re.match(r"python \w+\.py|python -m tests", line)]
TOLD = [line for line in TOLD if not re.search(r"[$\\]|\b(RUN|FOLDER|SCRIPT)\b", line)]


TORCHRUN = [shlex.split(line) for line in LINES if line.startswith("torchrun ")]


@pytest.mark.parametrize("words", TORCHRUN, ids=" ".join)
def test_commands_for_several_processes_are_parsed(words):
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(words[1:])
    name = launch.training_script.removesuffix(".py")
    args = cli.parse(script(name).Args, launch.training_script_args)
    assert args.batch_size % (int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of icr_gan, to stand for RUN."""
    out = str(tmp_path_factory.mktemp("runs"))
    return script("icr_gan").main(script("icr_gan").Args(**TINY, out_dir=out, cache_dir=CACHE))


def test_the_first_commands_are_those_a_new_user_types():
    assert LINES[:2] == ["pip install -r requirements.txt", "python icr_gan.py --sigma 0.05"]
    assert TEXT[: TEXT.index("pip install")].count("\n") < 20


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_run(words, trained, tmp_path, monkeypatch):
    words = [str(trained) if w == "RUN" else w for w in words[1:]]
    monkeypatch.chdir(tmp_path)
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module in BENCHMARKS:
            assert BENCHMARKS[module](rest)
        elif module in MODULES:
            small = ["--n", "64", "--cache-dir", CACHE] if module == "common.evaluate" else []
            MODULES[module]([*rest, *small])
        else:
            assert (ROOT / (module.replace(".", "/") + ".py")).exists()
        return
    m = script(words[0].removesuffix(".py"))
    args = cli.parse(m.Args, words[1:])
    if args.resume:
        assert m.main(args) == trained
    elif args.dataset == "digits":
        tiny = flags(TINY | {"out_dir": tmp_path, "cache_dir": CACHE})
        assert (m.main(cli.parse(m.Args, [*words[1:], *tiny])) / "generator.pt").exists()


@pytest.mark.parametrize("line", TOLD)
def test_commands_behind_the_numbers_are_parsed(line):
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        assert BENCHMARKS.get(module, lambda rest: True)(rest)
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()
    else:
        assert cli.parse(script(words[0].removesuffix(".py")).Args, words[1:])


def test_a_generator_is_used_as_written(trained):
    loaded, plain = (text for kind, text in BLOCKS if kind == "python")
    names = {}
    exec(re.sub(r'"runs/[^"]*"', repr(str(trained)), loaded), names)
    assert names["images"].shape == (16, 1, 32, 32)
    m = script("icr_gan")
    names = {"RUN": str(trained), "Args": m.Args, "build": m.build}
    exec("import json, torch\n" + plain, names)
    z = m.latents(3, names["args"])
    nets, args, _ = run.load(trained)
    assert m.sample(names["nets"], names["args"], z).equal(m.sample(nets, args, z))


@pytest.mark.parametrize("text", [TEXT, MORE], ids=["README", "benchmarks"])
def test_rows_of_a_table_have_as_many_cells_as_its_head(text):
    """Else GitHub shows the table as text."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert tables
    for table in tables:
        head, *rows = (len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines())
        assert rows and set(rows) == {head}, table


def test_pictures_and_scripts_are_there():
    for place, text in ((ROOT, TEXT), (ROOT / "tests" / "benchmarks", MORE)):
        for path in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (place / path).exists(), path
        assert not re.search(r"@[A-Z0-9]+@", text), "a place was left open"
    for name in ALL:
        assert f"{name}.py" in TEXT
