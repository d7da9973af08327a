"""The machine at hand: its device, its exactness, and which precision and threads are fast here."""
import importlib.util
import os
import re
import statistics
import time
from functools import partial

import torch
from torch import nn

TRIES = 20  # of each way, of 2 to 20 ms
MOST = 1.0  # seconds after which fewer tries must do
PAYS = 1.15  # times as fast must twice the threads be; less is not worth the other cores


def device_of(text):
    """The torch.device that --device means here; ValueError where there is no such device."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {text}")
    device, count = torch.device(text), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {text} is not there: this machine has {count} usable CUDA devices; "
            "cpu always works"
        )
    return device


def exact():
    """fp32 means fp32: TF32 has 10 bits, and what should run in few says --precision bf16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def fused(args):
    """Whether --impl means the package kernels; ValueError where they cannot run.

    auto: on a GPU with triton, where whole updates take .89 (icr_gan), .96 (cn_lsgan) and .98
    (wgan_gp) of the time of the plain functions, as graphs in bf16 on an H100
    (tests/benchmarks/README.md).
    """
    if args.impl == "auto":
        cuda = device_of(args.device).type == "cuda"
        return cuda and importlib.util.find_spec("triton") is not None
    if args.impl == "torch":
        return False
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "impl triton needs the package triton, which is not installed here; use --impl torch"
        )
    if device_of(args.device).type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "impl triton on the CPU works only in Triton's slow interpreter: set "
            "TRITON_INTERPRET=1, or use --impl torch"
        )
    return True


def fastest(device, precision="auto", threads=0):
    """(precision, threads) with auto and 0 replaced by what is faster on this machine, now.

    A GPU tells whether it has bf16. What a CPU says of itself is no guide, so a small convolution,
    forward and backward, is timed: its minimum for the precision, which is a property of the chip,
    its median for the threads, which is one of the cores that others leave.
    """
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return (("bf16" if has else "fp32") if precision == "auto" else precision), threads or 1
    if precision != "auto" and threads:
        return precision, threads
    before = torch.get_num_threads()
    try:
        if precision == "auto":
            torch.set_num_threads(threads or 1)
            times = _alternating({p: _convolution(p) for p in ("fp32", "bf16")})
            precision = min(times, key=lambda p: min(times[p]))
        if not threads:
            threads = _worthwhile_threads(_convolution(precision))
    finally:
        torch.set_num_threads(before)
    return precision, threads


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worthwhile_threads(step):
    """1, 2, 4, ... as long as twice as many bring PAYS, at most as many as there are cores."""
    threads = 1

    def with_threads(n):
        torch.set_num_threads(n)
        step()

    while 2 * threads <= cores():
        ways = {n: partial(with_threads, n) for n in (threads, 2 * threads)}
        few, more = _alternating(ways).values()
        if statistics.median(few) < PAYS * statistics.median(more):
            break
        threads *= 2
    return threads


def _convolution(precision):
    """A function that computes a convolution of a small GAN, forward and backward."""
    layer = nn.Conv2d(16, 32, 4, 2, 1).to(memory_format=torch.channels_last)
    x = torch.zeros(64, 16, 32, 32).to(memory_format=torch.channels_last).requires_grad_()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = layer(x)
        y.sum().backward()

    return step


def _alternating(steps):
    """{name: seconds of TRIES calls}, the ways in turn, so that a busy moment meets all."""
    found, start = {name: [] for name in steps}, time.perf_counter()
    for i in range(TRIES + 2):
        if i > 6 and time.perf_counter() - start > MOST:
            break
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= 2:  # the first calls build kernels
                found[name].append(time.perf_counter() - began)
    return found
