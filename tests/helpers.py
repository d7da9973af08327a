"""What several test files need: the scripts, tiny arguments, and watching a script from outside."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("lsgan", "icr_gan")
TINY = {"steps": 2, "batch_size": 8, "width": 4, "z_dim": 8, "eval_samples": 64, "device": "cpu", "precision": "fp32", "quiet": True}


def script(name):
    return importlib.import_module(name)


def tiny(name, **changes):
    """Args of a script for a run of seconds."""
    return script(name).Args(**(TINY | changes))


def flags(values):
    """The same as a command line."""
    words = []
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return words


def shell(*words, cwd=ROOT, timeout=120, env=()):
    """A finished Python process: returncode, stdout, stderr."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **dict(env)}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=timeout)


def trained(name, iterations, seed=0, batch_size=8, image_size=32, channels=1, **changes):
    """(nets, losses) after that many iterations of `updates` on random images, from a fixed seed."""
    m = script(name)
    args = tiny(name, batch_size=batch_size, image_size=image_size, channels=channels, **changes)
    torch.manual_seed(seed)
    nets = m.build(args)
    update_d, update_g, _ = m.updates(nets, args)
    real = torch.rand(batch_size, channels, image_size, image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    losses = [update_d(real) | update_g() for _ in range(iterations)]
    return nets, losses


def states(nets):
    """Every tensor of a dict of networks, by name."""
    return {f"{name}.{key}": v for name, net in nets.items() for key, v in net.state_dict().items()}


def assert_same(a, b):
    """Two dicts of tensors are equal to the bit."""
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different
