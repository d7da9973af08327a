"""One run on several processes: torchrun --nproc-per-node 4 icr_gan.py

Each process computes the updates on its own share of every batch, with its own noise; an
optimiser's gradients are averaged right before its step, by one all-reduce of all of them, so a
script's `updates` need not know. DistributedDataParallel is not used: it leaves out parameters that
a penalty gives no gradient, and reduces nothing for a backward pass of the penalty alone. What a
layer computes from its batch (BatchNorm) is of the share of one process.
"""
import contextlib
import dataclasses
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _NormBase

from common.files import first_line
from common.synthetic import generator

TIMEOUT = timedelta(minutes=15)  # for a process that hangs; one that dies is noticed at once

_control = None  # group for what the CPU decides, so that agreeing does not wait for the GPU


class Lost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


def launched():
    """Whether torchrun, or something that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def several():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank():
    return dist.get_rank() if several() else 0


def ranks():
    return dist.get_world_size() if several() else 1


def start(device):
    """Join the processes that torchrun started, if any; device is what args.device means here."""
    global _control
    if not launched() or dist.is_initialized():
        return
    cuda = device.type == "cuda"
    if cuda:
        if device.index is not None and os.environ["WORLD_SIZE"] != "1":
            raise ValueError(
                f"device is {device}; with several processes cuda, auto or cpu: each takes the GPU "
                "of its own number"
            )
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {count}: "
                f"--nproc-per-node {count}, or --device cpu"
            )
        torch.cuda.set_device(local if device.index is None else device.index)
    with _connected():
        own = {"device_id": torch.device("cuda", torch.cuda.current_device())} if cuda else {}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, **own)
        _control = dist.new_group(backend="gloo", timeout=TIMEOUT) if cuda else None


def stop():
    """Leave the other processes, at the end of a run; returns whether there were any."""
    left = several()
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # one that is gone already does no harm now
            dist.barrier(group=_control)
        dist.destroy_process_group()
    return left


@contextlib.contextmanager
def _connected():
    """Turn the many errors of a broken connection into Lost."""
    try:
        yield
    except RuntimeError as e:
        raise Lost(
            f"another process of this run ended or does not answer: {first_line(e)}"
        ) from e


def is_connection_error(e):
    """Whether a RuntimeError came from a broken connection to another process."""
    return several() and (isinstance(e, dist.DistError) or "gloo" in str(e) or "NCCL" in str(e))


def share(args):
    """args with the batch size of one process; ValueError where it cannot be split evenly."""
    if args.batch_size % ranks():
        raise ValueError(
            f"batch_size is {args.batch_size}; wanted a multiple of the {ranks()} processes"
        )
    if ranks() == 1:
        return args
    return dataclasses.replace(args, batch_size=args.batch_size // ranks())


def seed(*numbers):
    """Seed the noise of this process, by these numbers and its rank."""
    torch.manual_seed(generator(*numbers, rank()).initial_seed())


# ---- tensors of networks, by nccl or gloo ----------------------------------------------------


@torch.no_grad()
def _flat(tensors, communicate, scale=1.0):
    """communicate(flat) once for all tensors of a type laid end to end; scaled and laid back."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])
        with _connected():
            communicate(flat)
        if scale != 1:
            flat.mul_(scale)
        parts = flat.split([t.numel() for t in same])
        torch._foreach_copy_(same, [part.view(t.shape) for t, part in zip(same, parts)])


def broadcast_weights(nets):
    """Parameters and buffers of rank 0 for all."""
    if several():
        tensors = [t for net in nets.values() for t in net.state_dict().values()]
        _flat(tensors, lambda flat: dist.broadcast(flat, 0))


def average_gradients(optimiser):
    """From now on, every step of the optimiser is taken with gradients averaged over the ranks."""

    def before_step(optimiser, args, kwargs):
        own = [p for group in optimiser.param_groups for p in group["params"]]
        for p in own:
            if p.grad is None:  # all ranks must send the same number of floats
                p.grad = torch.zeros_like(p)
        _flat([p.grad for p in own], dist.all_reduce, 1 / ranks())

    if several():
        optimiser.register_step_pre_hook(before_step)


def average_buffers(nets):
    """Running statistics of BatchNorm averaged over the ranks, whose batches they describe."""
    if several():
        norms = [m for net in nets.values() for m in net.modules() if isinstance(m, _NormBase)]
        floats = [b for m in norms for b in m.buffers() if b.is_floating_point()]
        if floats:
            _flat(floats, dist.all_reduce, 1 / ranks())


# ---- what the CPU decides, by gloo -----------------------------------------------------------


def average(values):
    """A dict of 0-d tensors or numbers, averaged over the ranks, as numbers."""
    if not several() or not values:
        return values
    found = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    with _connected():
        dist.all_reduce(found, group=_control)
    return dict(zip(values, (found / ranks()).tolist()))


def all_reduce_max(*numbers):
    """The largest of each number over the ranks."""
    if not several():
        return numbers
    found = torch.tensor(numbers, dtype=torch.float64)
    with _connected():
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return tuple(found.tolist())


def broadcast(value):
    """The value that rank 0 has; the others' is ignored."""
    if not several():
        return value
    box = [value]
    with _connected():
        dist.broadcast_object_list(box, 0, group=_control)
    return box[0]


def gather(value):
    """[value of rank 0, of rank 1, ...] at rank 0; None elsewhere."""
    if not several():
        return [value]
    found = [None] * ranks() if rank() == 0 else None
    with _connected():
        dist.gather_object(value, found, 0, group=_control)
    return found
