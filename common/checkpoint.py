"""What a run folder begins with, and the checkpoint that a run goes on from."""
import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from common import files, processes


def new_folder(script, args, device):
    """A folder under args.out_dir with args.json inside; ValueError where there can be none."""
    dataset = Path(args.dataset).resolve().name or "data"
    name = f"{script}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}-s{args.seed}"
    parent = Path(args.out_dir)
    values = dataclasses.asdict(args)
    del values["resume"]
    saved = {"script": script, "args": values, "versions": _versions(device)}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for i in itertools.count(1):
            folder = parent / (name if i == 1 else f"{name}-{i}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        try:
            files.write_json(folder / "args.json", saved)
        except OSError:  # a full disk
            folder.rmdir()
            raise
    except OSError as e:
        raise ValueError(
            f"out_dir {args.out_dir} cannot be written to: {e.strerror}; wanted a folder for "
            "run folders"
        ) from None
    return folder


def _versions(device):
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5)
        if git.returncode == 0:
            found["git"] = git.stdout.strip()
    return found


def save(folder, script, step, seconds, nets, state, losses):
    """checkpoint.pt by rank 0, with the random numbers of all ranks."""
    device = next(next(iter(nets.values())).parameters()).device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    own = {k: _on_cpu(v.state_dict()) for k, v in state.items() if _is_own(v)}
    every = processes.gather({"cpu": torch.get_rng_state(), "cuda": cuda, "own": own})
    if processes.rank():
        return
    saved = {
        "script": script,
        "step": step,
        "seconds": seconds,
        "nets": {name: net.state_dict() for name, net in nets.items()},
        "state": {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()},
        "losses": {k: float(v) for k, v in losses.items()},
        "ranks": every,
    }
    path = folder / "checkpoint.pt"
    with files.writing(path):
        files.save_tensors(path, saved)


def load(folder, script, nets, state):
    """Take over checkpoint.pt into nets, state and the random numbers; returns what is saved.

    None for a run that was killed before its first save. ValueError names what does not fit.
    """
    path = folder / "checkpoint.pt"
    exists = processes.rank() == 0 and path.exists()
    if not path.exists() and (folder / "generator.pt").exists():
        raise ValueError(f"{path} is not there, and without it this run cannot go on")
    saved = processes.broadcast(files.load_tensors(path) if exists else None)
    if saved is None:
        return None
    device = next(next(iter(nets.values())).parameters()).device
    try:
        if saved["script"] != script:
            raise ValueError(f"it is of {saved['script']}.py, not of {script}.py")
        for name, net in nets.items():
            net.load_state_dict(saved["nets"][name])
        for name, value in state.items():
            _take_over(value, saved["state"][name])
        if len(saved["ranks"]) == processes.ranks():
            mine = saved["ranks"][processes.rank()]
            for name, value in mine["own"].items():
                _take_over(state[name], value)
            torch.set_rng_state(mine["cpu"])
            if mine["cuda"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"], device)
        else:  # saved by another number of processes
            processes.seed(int(torch.initial_seed() % 2**32), saved["step"])
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} does not fit this run: {files.first_line(e)}") from None
    return saved


def _is_own(value):
    """Whether each rank fills this entry of a script's state for itself, as an image pool."""
    return hasattr(value, "state_dict") and not hasattr(value, "param_groups")


def _on_cpu(values):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def _take_over(value, saved):
    """Load what was saved of one entry of a script's state into its place."""
    if not hasattr(value, "load_state_dict"):
        value.copy_(saved)
        return
    if not hasattr(value, "param_groups"):
        value.load_state_dict(saved)
        return
    device = value.param_groups[0]["params"][0].device
    for group in saved["param_groups"]:
        if "capturable" in group:  # the run may go on on another kind of device
            group["capturable"] = device.type == "cuda"
    value.load_state_dict(saved)
    for group in value.param_groups:  # load_state_dict leaves a tensor rate on the CPU
        group["lr"] = group["lr"].to(device)


def remove_later_grids(folder, step):
    """Drop the pictures that a run had drawn after the checkpoint it goes on from."""
    for old in folder.glob("*/*.png") if processes.rank() == 0 else ():
        if old.stem.isdigit() and int(old.stem) > step:
            old.unlink()
