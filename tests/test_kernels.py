"""kernels/__init__.py: what the package promises about all of its files."""
import ast
import importlib
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

import kernels
from tests.helpers import ROOT, SCRIPTS, TINY, flags, script, shell

FUSED = [name for name in SCRIPTS if hasattr(script(name).Args, "impl")]
FILES = ("augment", "consistency", "gradient_penalty")


def module(name):
    return importlib.import_module(f"kernels.{name}")


def test_exports_are_the_functions_of_the_contract():
    assert set(kernels.__all__) == {"augment", "consistency", "gradient_penalty", "icr_d_loss", "interpolate"}
    assert all(inspect.isfunction(getattr(kernels, name)) for name in kernels.__all__)


def test_copied_helpers_have_not_drifted():
    for helper in ("dense", "fused"):
        assert len({inspect.getsource(getattr(module(name), helper)) for name in FILES}) == 1, helper


@pytest.mark.parametrize("name", FILES)
def test_files_stand_alone_and_wait_for_nothing(name):
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imports |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imports == {"os", "torch", "torch.library", "triton", "triton.language"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "synchronize"}
    assert not {u for u in used if u.startswith("atomic_") or u == "autotune"}


@pytest.mark.parametrize("script", ["icr_gan", "wgan_gp", "cn_lsgan"])
def test_arguments_are_those_of_the_scripts(script):
    script = importlib.import_module(script)
    shared = [name for name in kernels.__all__ if hasattr(script, name)]
    assert shared
    for name in shared:
        ours, theirs = (inspect.signature(getattr(m, name)) for m in (kernels, script))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_without_triton_the_references_serve():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
from importlib import import_module
x, y, e = torch.randn(4, 1, 5, 5, requires_grad=True), torch.randn(4, 1, 5, 5), torch.rand(4)
P, C, A = (import_module(f"kernels.{m}") for m in ("gradient_penalty", "consistency", "augment"))
assert P.triton is C.triton is A.triton is None
assert torch.equal(kernels.gradient_penalty(x), P.gradient_penalty_ref(x))
assert torch.equal(kernels.interpolate(x, y, e), P.interpolate_ref(x, y, e))
assert torch.equal(kernels.consistency(x, y, 2.0), C.consistency_ref(x, y, 2.0))
assert torch.equal(kernels.icr_d_loss(y[:, 0, 0], 1, 0, 1)[0], C.icr_d_loss_ref(y[:, 0, 0], 1, 0, 1)[0])
none = torch.zeros(4, dtype=torch.int64)
assert torch.equal(kernels.augment(x, none > 0, none, none), x)
(x.square() * kernels.gradient_penalty(x)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_on_the_cpu_without_the_interpreter_the_references_serve():
    code = """
import torch, kernels
x = torch.randn(4, 5, requires_grad=True)
assert "kernels" not in kernels.gradient_penalty(x).grad_fn.name()
"""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


def test_the_benchmark_runs_to_its_end_without_a_gpu(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.benchmarks.kernels", "--shapes", "8,3,8,8", "--repeats", "1"]
    results = ROOT / "tests" / "benchmarks" / "results"
    before = sorted(results.glob("*"))
    done = subprocess.run([*command, "--json", tmp_path / "k.json"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "k.json").read_text())["rows"]
    assert {r["what"].split()[0] for r in rows} == set(kernels.__all__)
    assert all(r["measured"] == (r["impl"] == "eager") for r in rows)
    assert done.stdout.count("not measured") == sum(not r["measured"] for r in rows)
    assert sorted(results.glob("*")) == before  # figures of a CPU are not kept unless asked for


def test_results_are_not_views_of_what_came_in(device):
    x = torch.randn(3, 1, 4, 4, device=device)
    none = torch.zeros(3, dtype=torch.int64, device=device)
    for out in (kernels.augment(x, none > 0, none, none), kernels.interpolate(x, x, torch.ones(3, device=device))):
        assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


def test_gpu_tests_refuse_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_augment.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "asks for a GPU" in done.stderr


@pytest.mark.parametrize("name", FUSED)
def test_kernels_train_as_the_plain_functions_do(name, tmp_path):
    """--impl triton, here in the interpreter: the same run to rounding."""
    rows = []
    for impl in ("torch", "triton"):
        out = tmp_path / impl
        line = flags(TINY | {"impl": impl, "log_every": 1, "cache_dir": ROOT / "data" / "cache", "out_dir": out})
        done = shell(ROOT / f"{name}.py", *line, env={"TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stderr
        (log,) = out.glob("*/log.csv")
        head, *body = log.read_text().splitlines()
        rows.append(torch.tensor([[float(v) for k, v in zip(head.split(","), row.split(",")) if k != "seconds"] for row in body]))
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)
