"""What every test shares: one thread, the interpreter where there is no GPU, options, markers.

    pytest                      everything but the slow tests; GPU tests are skipped without a GPU
    pytest --slow               the slow tests too
    pytest -m gpu               only what runs on the GPU; an error, not a pass, where there is none
    pytest --data-dir DIR       also the tests that need real data sets, which lie in DIR
    TRITON_INTERPRET=1 pytest   the kernels on the CPU although there is a GPU
"""
import ctypes
import os
import re
from pathlib import Path

import pytest


def has_gpu():
    # the driver is asked, not torch: triton reads TRITON_INTERPRET while it is imported
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    n = ctypes.c_int(0)
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(n)) == 0 and n.value > 0


if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402  (after the environment is set)

torch.set_num_threads(1)  # on shared cores a second thread can make a step many times slower
torch.backends.cudnn.allow_tf32 = False  # its 10 bits would hide what tests compare

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available()


def pytest_addoption(parser):
    parser.addoption("--data-dir", metavar="DIR", help="folder of real data sets for tests that need one")
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a GPU, skipped without one unless asked for by -m")
    config.addinivalue_line("markers", "slow: off unless --slow is given")
    asked = re.search(r"(?<!not )\bgpu\b", config.option.markexpr or "")
    if asked and not ON_GPU:
        why = "there is none" if not has_gpu() else "TRITON_INTERPRET is 1, or this torch has no CUDA"
        raise pytest.UsageError(f"-m {config.option.markexpr!r} asks for a GPU, and {why}")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and ON_GPU:
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(autouse=True)
def terminal_of_its_own():
    """A run with quiet=True must not silence the tests after it."""
    from common import terminal

    terminal.quiet = False


@pytest.fixture
def data_dir(request):
    """The folder given by --data-dir, as a Path."""
    folder = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs real data: give --data-dir")
    return Path(folder)


@pytest.fixture
def device():
    """Where kernels run: "cuda", or "cpu" under the interpreter. Under -m gpu such tests are in."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def poison():
    """torch.empty gives NaN while a test runs, so an element that a kernel forgets cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
