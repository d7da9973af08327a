"""Updates as CUDA graphs, and one run on several processes.

    update_d = graph(update_d, device)      # a plain call on the CPU and under --no-graphs
    torchrun --nproc-per-node 4 icr_gan.py  # one process per GPU, or on the CPU with --device cpu

Several processes: each computes the updates on its own share of every batch, with its own noise;
an optimiser's gradients are averaged right before its step, by one all-reduce of all of them, so a
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

from common import synthetic

WARM_UP = 3  # ordinary calls before a capture: they build what must not be built during one
TIMEOUT = timedelta(minutes=15)  # for a process that hangs; one that dies is noticed at once

_control = None  # group for what the CPU decides, so that agreeing does not wait for the GPU
_capturing = None  # the Update that is being captured


class Lost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


# ---- graphs ----------------------------------------------------------------------------------


def graph(fn, device, on=True):
    """fn as an Update: on a GPU replayed as a CUDA graph, unless on is False; elsewhere a plain call."""
    return Update(fn, torch.device(device), on)


class Update:
    """A function of tensors of fixed shapes that waits for nothing, replayed from its 4th call on.

    The first calls are ordinary ones, on a side stream: autograd binds a parameter's gradient to
    the stream of its first use, which must be the one that is captured. The tensors returned by a
    replay are overwritten by the next. An argument that is the same tensor at every call is read
    where it is; others are copied to where the graph reads.
    """

    streams = {}  # one for all updates of a device, as they share parameters

    def __init__(self, fn, device, on=True):
        self.fn, self.device = fn, device
        self.captures = on and device.type == "cuda"
        self._calls, self._seen, self._owned = 0, None, False
        self._parts = None  # graphs, and between them functions that are called
        self._inputs = self._outputs = self._context = None

    def __call__(self, *inputs):
        if not self.captures:
            return self.fn(*inputs)
        with torch.cuda.device(self.device):  # a graph is replayed on the current one
            return self._on_gpu(inputs)

    def _on_gpu(self, inputs):
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._plain(inputs)
        if self._parts is None:
            self._capture(inputs)
        for static, x in zip(self._inputs, inputs, strict=True):
            if static is not x:
                static.copy_(x)
        for part in self._parts:
            part()
        return self._outputs

    def _stream(self):
        device = torch.cuda.current_device()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return self.streams[device]

    def _plain(self, inputs):
        side, here = self._stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            outputs = self.fn(*inputs)
        here.wait_stream(side)
        same = self._seen is not None and all(a is b for a, b in zip(self._seen, inputs))
        self._owned, self._seen = same, inputs
        return outputs

    def _capture(self, inputs):
        """Record fn; nothing of it is computed, so the call that captures replays right after."""
        global _capturing
        self._inputs = inputs if self._owned else tuple(x.clone() for x in inputs)
        self._seen, self._parts, self._pool = None, [], torch.cuda.graph_pool_handle()
        _capturing = self
        self._begin()
        try:
            self._outputs = self.fn(*self._inputs)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what broke the capture is the better message
                self._end()
            raise
        finally:
            _capturing = None
        self._end()

    def _begin(self):
        part = torch.cuda.CUDAGraph()
        # thread_local: threads of nccl may go on asking for the state of their own work
        self._context = torch.cuda.graph(part, pool=self._pool, stream=self._stream(), capture_error_mode="thread_local")
        self._context.__enter__()
        self._parts.append(part.replay)

    def _end(self):
        self._context.__exit__(None, None, None)

    def split(self, call):
        """End the graph here and begin another one; each replay calls `call` between the two."""
        self._end()
        self._parts.append(call)
        self._begin()


def outside(call):
    """call(), which no graph holds: one that is being captured is split here."""
    call() if _capturing is None else _capturing.split(call)


# ---- processes -------------------------------------------------------------------------------


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
            raise ValueError(f"device is {device}; with several processes cuda, auto or cpu: each takes the GPU of its own number")
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} of this machine has no GPU, there are {count}: --nproc-per-node {count}, or --device cpu")
        torch.cuda.set_device(local if device.index is None else device.index)
    with together():
        own = dict(device_id=torch.device("cuda", torch.cuda.current_device())) if cuda else {}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, **own)
        _control = dist.new_group(backend="gloo", timeout=TIMEOUT) if cuda else None


def stop():
    """Leave the other processes, at the end of a run that went well; returns whether there were any."""
    left = several()
    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the run is over, so one that is gone already does no harm
            dist.barrier(group=_control)
        dist.destroy_process_group()
    return left


@contextlib.contextmanager
def together():
    """Turn the many errors of a broken connection into Lost."""
    try:
        yield
    except RuntimeError as e:
        raise Lost(f"another process of this run ended or does not answer: {str(e).splitlines()[0]}") from e


def share(args):
    """args with the batch size of one process; ValueError where it cannot be split evenly."""
    if args.batch_size % ranks():
        raise ValueError(f"batch_size is {args.batch_size}; wanted a multiple of the {ranks()} processes")
    return args if ranks() == 1 else dataclasses.replace(args, batch_size=args.batch_size // ranks())


def seed(*numbers):
    """Seed the noise of this process, by these numbers and its rank."""
    torch.manual_seed(synthetic.generator(*numbers, rank()).initial_seed())


@torch.no_grad()
def _flat(tensors, call, scale=1.0):
    """call(flat) once for all tensors of a type, laid end to end; then scaled and laid back."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])

        def communicate(flat=flat):
            with together():
                call(flat)

        outside(communicate)
        if scale != 1:
            flat.mul_(scale)
        parts = flat.split([t.numel() for t in same])
        torch._foreach_copy_(same, [part.view(t.shape) for t, part in zip(same, parts)])


def align(nets):
    """Parameters and buffers of rank 0 for all."""
    if several():
        _flat([t for net in nets.values() for t in net.state_dict().values()], lambda flat: dist.broadcast(flat, 0))


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


def average(values):
    """A dict of 0-d tensors or numbers, averaged over the ranks, as numbers."""
    if not several() or not values:
        return values
    found = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    with together():
        dist.all_reduce(found, group=_control)
    return dict(zip(values, (found / ranks()).tolist()))


def highest(*numbers):
    """The largest of each number over the ranks."""
    if not several():
        return numbers
    found = torch.tensor(numbers, dtype=torch.float64)
    with together():
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return tuple(found.tolist())


def told(value):
    """The value that rank 0 has; the others' is ignored."""
    if not several():
        return value
    box = [value]
    with together():
        dist.broadcast_object_list(box, 0, group=_control)
    return box[0]


def gathered(value):
    """[value of rank 0, of rank 1, ...] at rank 0; None elsewhere."""
    if not several():
        return [value]
    found = [None] * ranks() if rank() == 0 else None
    with together():
        dist.gather_object(value, found, 0, group=_control)
    return found
