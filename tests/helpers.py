"""What several test files need: the scripts, tiny arguments, and watching a script from outside."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
ALL = tuple(sorted(p.stem for p in ROOT.glob("*.py")))
SCRIPTS = ("lsgan", "cn_lsgan", "icr_gan", "wgan_gp")  # image GANs with update_d and update_g
CACHE = str(ROOT / "data" / "cache")
TINY = {
    "steps": 2, "batch_size": 8, "width": 4, "z_dim": 8, "eval_samples": 64,
    "device": "cpu", "precision": "fp32", "threads": 1, "quiet": True,
}  # fmt: skip


def script(name):
    return importlib.import_module(name)


def tiny(name, **changes):
    """Args of a script for a run of seconds."""
    return script(name).Args(**(TINY | changes))


def train(name, out, **changes):
    """The folder of a run of seconds."""
    return script(name).main(tiny(name, out_dir=str(out), **({"cache_dir": CACHE} | changes)))


def resume(name, folder, **changes):
    """Go on with the run in a folder, as Python code does."""
    return script(name).main(script(name).Args(resume=str(folder), **changes))


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


class Recorder:
    """Stands for the functions of a script that have kernels, and notes what they were called with."""

    def __init__(self, name):
        self.script, self.calls = script(name), []

    def __getattr__(self, name):
        def call(*a):
            self.calls.append((name, a))
            return getattr(self.script, name)(*a)

        return call


class LinearCritic(nn.Module):
    """D(x) = w.x over the pixels, in the dtype of w: its slope is w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x):
        return x.flatten(1) @ self.w


class TinyGenerator(nn.Module):
    """z [N, 2] -> images [N, 1, 2, 2] in float64, smooth; 12 weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 4).double()

    def forward(self, z):
        return self.body(z.double()).tanh().view(-1, 1, 2, 2)


class TinyCritic(nn.Module):
    """Images [N, 1, 2, 2] -> scores [N] in float64, smooth; 19 weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def forward(self, x):
        return self.body(x).squeeze(1)


def still_losses(name, real, nets=None, **changes):
    """(nets, losses): losses["discriminator"]() and losses["generator"]() make an update in float64,

    which leaves gradients and returns the loss, but at rate 0 no trace in the weights. Each draws
    the same random numbers every time. real: float64; nets: small ones in place of the script's.
    """
    m = script(name)
    args = tiny(name, channels=real.shape[1], **changes)
    torch.manual_seed(0)
    if nets is None:
        nets = {key: net.double() for key, net in m.build(args).items()}
        nets["generator"].register_forward_pre_hook(lambda net, z: (z[0].double(),))
        nets["discriminator"].eval()  # or each call would move the vectors of a spectral norm
    update_d, update_g, state = m.updates(nets, args)
    for key in ("opt_g", "opt_d"):
        state[key].param_groups[0]["lr"].fill_(0.0)

    def loss_d():
        torch.manual_seed(1)
        return update_d(real)["loss_d"]

    def loss_g():
        torch.manual_seed(2)
        return update_g()["loss_g"]

    loss_d()
    return nets, {"discriminator": loss_d, "generator": loss_g}


def central_difference(loss, weights, directions, h):
    """Derivative of loss() along directions, one tensor for each of the weights, which come back."""
    values = []
    before = [w.detach().clone() for w in weights]
    for sign in (h, -h):
        with torch.no_grad():
            for w, b, v in zip(weights, before, directions):
                w.copy_(b + sign * v)
        values.append(loss())
    with torch.no_grad():
        for w, b in zip(weights, before):
            w.copy_(b)
    return (values[0] - values[1]) / (2 * h)
