"""Whole training steps of every script: eager, compiled, with kernels, as CUDA graphs, in bf16.

    python -m tests.benchmarks.train                          # all of it; minutes on a GPU
    python -m tests.benchmarks.train --sizes default --scripts lsgan,icr_gan --no-compile

A step is what the loop of a script does between two grids: batches drawn, n_critic updates of D, one
of G, the average of G. Images are random, which no time here depends on. loop is the same networks,
losses and batch size trained as public collections write it: a DataLoader that transforms single
images, a forward pass per set of images, plain Adam, float32, a gradient for every network, .item()
of each loss at every step, no average of G. eager is the script under --precision fp32 --no-graphs; compile is the same
updates under torch.compile(mode="reduce-overhead"), counted only if all parameters move; what
follows adds to eager: the kernels, the graphs, bf16.

All variants of a size take turns, so that a drift of the machine meets all of them; ms is the median
of the rounds. On the CPU with one thread it is time of this process, which busy neighbours change
little, else time of the clock. launches are calls that start work on the GPU, kernels what it runs, GPU the
share of time in which it computes; on the CPU launches are operators that write memory. Kernels and
graphs are not for the CPU. On a GPU the rows go to tests/benchmarks/results/train-DEVICE.json,
elsewhere only to --json FILE.
"""
import argparse
import contextlib
import copy
import datetime
import importlib
import inspect
import json
import math
import os
import re
import statistics
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import data, gpu, run, terminal

SIZES = {"default": {}, "cifar10": {"channels": 3, "width": 64, "dataset": "cifar10"}}
LOOPS = ("lsgan", "cn_lsgan", "icr_gan", "wgan_gp")  # scripts with a straightforward loop to compare with
VARIANTS = {  # name: what it adds to the eager float32 step
    "loop": {},
    "eager": {},
    "compile": {"compile": True},
    "kernels": {"kernels": True},
    "kernels+graphs": {"kernels": True, "graphs": True},
    "kernels+graphs+bf16": {"kernels": True, "graphs": True, "precision": "bf16"},
    "bf16": {"precision": "bf16"},
}
ON_CPU, ON_GPU = ("loop", "eager", "compile", "bf16"), tuple(VARIANTS)[:-1]
IMAGES = 4096
HEAD = f"{'size':9}{'script':10}{'variant':21}{'ms':>9}{'p20':>9}{'p80':>9}{'step/s':>9}{'images/s':>10}{'launches':>9}{'kernels':>8}{'GPU':>6}{'MB':>7}"


# ---- what is timed ---------------------------------------------------------------------------


class Folder(torch.utils.data.Dataset):
    """Single images as a data set of pictures gives them, transformed one by one."""

    def __init__(self, pixels, size):
        from torchvision import transforms

        self.pixels = pixels
        grey = [0.5] * pixels.shape[1]
        steps = [transforms.Resize(size), transforms.ToTensor(), transforms.Normalize(grey, grey)]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        from common.sample import picture

        return self.transform(picture(self.pixels[i]))


def loop(m, args, pixels, device):
    """The nets and losses of a script of LOOPS, trained the straightforward way."""
    nets = m.build(args)
    g, d = nets["generator"], nets["discriminator"]
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), lr=args.lr, betas=(args.beta1, args.beta2)) for net in (g, d))
    loader = torch.utils.data.DataLoader(Folder(pixels, args.image_size), batch_size=args.batch_size, shuffle=True, drop_last=True)
    weights = {k: getattr(args, f"lambda_{k}", 0) for k in ("real", "fake", "dis", "gen", "gp", "rec")}
    sigma, target = getattr(args, "sigma", 0), getattr(args, "gp_target", 1)
    adversarial = m.critic_loss if hasattr(m, "critic_loss") else m.discriminator_loss

    def forever():
        while True:
            yield from loader

    def moved(x):
        return m.augment(x, *m.draw_moves(len(x), args, device))

    def near(z):
        return g(z + sigma * torch.randn(z.shape, device=device))

    def penalty(real, fake):
        eps = torch.rand(len(real), 1, 1, 1, device=device)
        x = (eps * real + (1 - eps) * fake).requires_grad_(True)
        scores = d(x)
        grad = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
        return ((grad.flatten(1).norm(2, dim=1) - target) ** 2).mean()

    batches = forever()

    def step_g(real, z, fake):
        opt_g.zero_grad()
        loss = m.generator_loss(d(fake))
        if weights["gen"]:
            loss = loss - weights["gen"] * ((fake - near(z)) ** 2).mean()
        if weights["rec"]:
            loss = loss + weights["rec"] * ((fake - real) ** 2).mean()
        loss.backward()
        opt_g.step()
        return f"[G loss: {loss.item():f}]"

    def step_d(real, z, fake):
        opt_d.zero_grad()
        d_real, d_fake = d(real), d(fake)
        loss = adversarial(d_real, d_fake)
        if weights["real"]:
            loss = loss + weights["real"] * ((d_real - d(moved(real))) ** 2).mean()
        if weights["fake"]:
            loss = loss + weights["fake"] * ((d_fake - d(moved(fake))) ** 2).mean()
        if weights["dis"]:
            loss = loss + weights["dis"] * ((d_fake - d(near(z).detach())) ** 2).mean()
        if weights["gp"]:
            loss = loss + weights["gp"] * penalty(real, fake)
        loss.backward()
        opt_d.step()
        return f"[D loss: {loss.item():f}]"

    def once():
        said = []
        for i in range(args.n_critic):
            real = next(batches).to(device)
            z = torch.randn(len(real), args.z_dim, device=device)
            fake = g(z)
            if i == 0:
                said.append(step_g(real, z, fake))
            said.append(step_d(real, z, fake.detach()))
        return " ".join(said)

    return once, {"generator": g, "discriminator": d}  # such loops keep no average of G


def stepper(m, args, pixels, device, compile=False, kernels=False, graphs=False):
    """One step of a script as its main makes them; ValueError where the variant does not exist."""
    nets = m.build(args)
    ops = {}
    if kernels and "ops" in inspect.signature(m.updates).parameters:
        ops = {"ops": importlib.import_module("kernels")}
    elif kernels and not graphs:
        raise ValueError("nothing to fuse")
    update_d, update_g, _ = m.updates(nets, args, **ops)
    if compile:
        update_d, update_g = (torch.compile(u, mode="reduce-overhead") for u in (update_d, update_g))
    else:
        update_d, update_g = (gpu.graph(u, device, graphs) for u in (update_d, update_g))
    batches = data.batches(pixels, args.batch_size, 0, device=device, static=graphs)

    def once():
        if compile:
            torch.compiler.cudagraph_mark_step_begin()
        for _ in range(args.n_critic):
            update_d(next(batches))
        update_g()

    return once, nets


def made(name, size, variant, device, threads, changes):
    """(step, note): a warmed-up step, or None and the reason why there is none."""
    how = dict(VARIANTS[variant])
    m = importlib.import_module(name)
    wanted = {"precision": how.pop("precision", "fp32"), "device": str(device), "threads": threads} | SIZES[size] | changes
    fields = inspect.signature(m.Args).parameters
    args = m.Args(**{k: v for k, v in wanted.items() if k in fields})
    pixels = torch.randint(0, 256, (IMAGES, args.channels or 1, args.image_size, args.image_size), dtype=torch.uint8)
    if variant == "loop" and name not in LOOPS:
        return None, "not written"
    torch.manual_seed(0)
    try:
        once, nets = loop(m, args, pixels, device) if variant == "loop" else stepper(m, args, pixels, device, **how)
    except ValueError as e:
        return None, str(e)
    before = copy.deepcopy({k: dict(net.named_parameters()) for k, net in nets.items()})
    with compiling() if how.get("compile") else contextlib.nullcontext():
        try:
            for _ in range(gpu.WARM_UP + 2):
                once()
        except Exception as e:
            if not how.get("compile"):
                raise
            return None, f"fails: {type(e).__name__}"  # the peer's failure is a result
    still = [k for net in nets for k, p in nets[net].named_parameters() if torch.equal(p, before[net][k])]
    if hasattr(m, "critic_loss"):  # a difference of scores, in which the last bias cancels
        still = [k for k in still if k != "head.bias"]
    if still and how.get("compile"):
        return None, f"does not train: {len(still)} parameters stand still"
    assert not still, f"{variant} of {name} leaves {still} as they are"
    once.images = args.batch_size * args.n_critic
    return once, ""


@contextlib.contextmanager
def compiling():
    """Let torch.compile trace autograd.grad, which it refuses by default; older torch cannot."""
    import torch._dynamo

    old = getattr(torch._dynamo.config, "trace_autograd_ops", None)
    if old is not None:
        torch._dynamo.config.trace_autograd_ops = True
    try:
        yield
    finally:
        if old is not None:
            torch._dynamo.config.trace_autograd_ops = old


# ---- measuring -------------------------------------------------------------------------------


def timed(once, steps, device, clock):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = clock()
    for _ in range(steps):
        once()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - began) / steps


class Writes(TorchDispatchMode):
    """Counts the operators that write memory: what would be launches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += not f.is_view
        return f(*args, **(kwargs or {}))


def profile(once, device, steps=3):
    """launches and kernels per step, microseconds of computing per step on a GPU."""
    if device.type != "cuda":
        with Writes() as seen:
            once()
        return {"launches": seen.count, "kernels": None, "busy_us": None}
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            once()
        torch.cuda.synchronize()
    events = seen.events()
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    calls = [e for e in events if re.match(r"cu(da)?(LaunchKernel|GraphLaunch|MemcpyAsync|MemsetAsync)", e.name)]
    return {
        "launches": round(len(calls) / steps, 1),
        "kernels": round(len(on_gpu) / steps, 1),
        "busy_us": sum(e.device_time for e in on_gpu) / steps,
    }


def measure(size, scripts, variants, device, threads, rounds, round_s, clock, changes):
    """Rows of one size, all variants in turn."""
    rows, running = [], []
    for name in scripts:
        for variant in variants:
            terminal.progress(f"preparing {size} {name} {variant}", now=True)
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            once, note = made(name, size, variant, device, threads, changes)
            row = {"size": size, "script": name, "variant": variant, "note": note}
            rows.append(row)
            if once is None:
                continue
            row["peak_mb"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1) if device.type == "cuda" else None
            row |= profile(once, device) if variant != "compile" or device.type == "cuda" else {"launches": None, "kernels": None}
            steps = max(1, math.ceil(round_s / timed(once, 1, device, clock)))
            running.append((row, once, steps, []))
    for i in range(rounds):
        for row, once, steps, times in running:
            times.append(timed(once, steps, device, clock))
        terminal.progress(f"{size}: round {i + 1}/{rounds}")
    for row, once, _, times in running:
        median = statistics.median(times)
        cut = sorted(times)
        row |= {"ms": median * 1e3, "p20_ms": cut[len(cut) // 5] * 1e3, "p80_ms": cut[-1 - len(cut) // 5] * 1e3}
        row |= {"steps_per_s": 1 / median, "images_per_s": once.images / median}
        busy = row.pop("busy_us", None)
        row["gpu_share"] = None if busy is None else busy / 1e6 / median
    return rows


def ratios(rows):
    """What the aims speak of: [(text, value)] within each size."""
    found = []
    ms = {(r["size"], r["script"], r["variant"]): r["ms"] for r in rows if "ms" in r}

    def ratio(text, a, b):
        if a in ms and b in ms:
            found.append((text, ms[a] / ms[b]))

    for size in dict.fromkeys(r["size"] for r in rows):
        for name in dict.fromkeys(r["script"] for r in rows):
            for variant in VARIANTS:
                for against in ("eager", "loop"):
                    if variant not in ("eager", "loop") or (variant, against) == ("eager", "loop"):
                        ratio(f"{size} {name}: {variant} is so many times as fast as {against}", (size, name, against), (size, name, variant))
        for variant in VARIANTS:
            ratio(f"{size} {variant}: icr_gan costs so many times lsgan", (size, "icr_gan", variant), (size, "lsgan", variant))
    return found


def line(row):
    start = f"{row['size']:9}{row['script']:10}{row['variant']:21}"
    if "ms" not in row:
        return f"{start}  {row['note'] or 'not measured'}"

    def cell(key, width, form):
        return f"{'-' if row.get(key) is None else format(row[key], form):>{width}}"

    cells = (("ms", 9, ".2f"), ("p20_ms", 9, ".2f"), ("p80_ms", 9, ".2f"), ("steps_per_s", 9, ".1f"), ("images_per_s", 10, ".0f"))
    cells += (("launches", 9, "g"), ("kernels", 8, "g"), ("gpu_share", 6, ".0%"), ("peak_mb", 7, ".0f"))
    return start + "".join(cell(*c) for c in cells)


def arguments(argv=None):
    p = run.Parser(prog="python -m tests.benchmarks.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scripts", default=",".join(run.SCRIPTS), help="comma-separated [all]")
    p.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)} [all]")
    p.add_argument("--variants", help=f"of {', '.join(VARIANTS)} [all that the device has]")
    p.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes to prepare")
    p.add_argument("--rounds", type=int, default=9, help="times that each variant gets its turn [9]")
    p.add_argument("--round-s", type=float, default=0.5, help="least seconds of a turn [0.5]")
    p.add_argument("--width", type=int, help="of all networks, instead of the size's")
    p.add_argument("--batch-size", type=int, help="instead of the default")
    p.add_argument("--threads", type=int, default=1, help="of the CPU [1]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda [auto]")
    p.add_argument("--json", metavar="FILE", help="where the rows go [on a GPU tests/benchmarks/results/]")
    a = p.parse_args(argv)
    for key, known in (("scripts", run.SCRIPTS), ("sizes", SIZES), ("variants", VARIANTS)):
        asked = getattr(a, key)
        setattr(a, key, asked.split(",") if asked else None)
        for word in getattr(a, key) or ():
            if word not in known:
                raise ValueError(f"--{key} has {word}; wanted some of {', '.join(known)}")
    if a.rounds < 1 or a.threads < 1 or a.round_s < 0:
        raise ValueError("--rounds and --threads must be positive, --round-s not negative")
    return a


def main(argv=None):
    """The table; returns what the JSON file holds."""
    a = arguments(argv)
    device = run.device_of(a)
    cuda = device.type == "cuda"
    torch.set_num_threads(a.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    variants = a.variants or list(ON_GPU if cuda else ON_CPU)
    if not cuda and (wrong := [v for v in variants if v not in ON_CPU]):
        raise ValueError(f"--variants has {wrong[0]}, which needs a GPU")
    if a.no_compile and "compile" in variants:
        variants.remove("compile")
    own_time = not cuda and a.threads == 1
    changes = {k: v for k, v in (("width", a.width), ("batch_size", a.batch_size)) if v is not None}
    rows = []
    print(HEAD)
    for size in a.sizes:
        rows += measure(
            size, a.scripts, variants, device, a.threads, a.rounds, a.round_s, time.process_time if own_time else time.perf_counter, changes
        )
        terminal.close()
        print("\n".join(line(r) for r in rows if r["size"] == size), flush=True)
    found = ratios(rows)
    for text, value in found:
        print(f"{value:6.2f}  {text}")
    result = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cores": os.cpu_count(),
        "threads": a.threads,
        "torch": torch.__version__,
        "date": f"{datetime.datetime.now():%Y-%m-%d}",
        "clock": "process" if own_time else "wall",
        "precision": "fp32 without TF32 where bf16 is not named",
        "rows": rows,
        "ratios": dict(found),
    }
    name = re.sub(r"\W+", "-", result["device"]).strip("-").lower()
    path = a.json or (cuda and Path(__file__).parent / "results" / f"train-{name}.json")
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(path)
    return result


if __name__ == "__main__":
    run.guard(main)
