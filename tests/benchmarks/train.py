"""Whole training steps of every script: eager, compiled, as CUDA graphs, with kernels, in bf16.

    python -m tests.benchmarks.train                          # all of it; minutes on a GPU
    python -m tests.benchmarks.train --sizes default --scripts lsgan,icr_gan --no-compile

A step is what the loop of a script does between two grids: batches drawn, its updates in their
order, those of D n_critic times. Images are random, which no time here depends on. loop is the same
networks, losses and batch size trained as public collections write it: a DataLoader that transforms
single images, a forward pass per set of images, plain Adam, float32, a gradient for every network,
.item() of each loss at every step, no average of G. eager is the script under --precision fp32
--no-graphs; compile is the same updates under torch.compile(mode="reduce-overhead"), counted only
if all that eager trains moves; what follows adds to eager: the graphs, the kernels, bf16.

Sizes: default is the script's, image to image in colour; large is colour at width 64, or 256 pixels
for image to image.

All variants of a size take turns, so that a drift of the machine meets all of them; ms is the
median of the rounds. On the CPU with one thread it is time of this process, which busy neighbours
change little, else time of the clock. launches are calls that start work on the GPU, kernels what
it runs, GPU the share of time in which it computes; on the CPU launches are operators that write
memory. Kernels and graphs are not for the CPU. On a GPU the rows go to
tests/benchmarks/results/train-DEVICE.json, elsewhere only to --json FILE.
"""
import contextlib
import copy
import datetime
import importlib
import inspect
import math
import os
import re
import statistics
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import cli, data, files, graphs, machine, run, terminal

SIZES = {  # changes to an image GAN, and to a script that turns images into images
    "default": ({}, {"channels": 3}),
    "large": ({"channels": 3, "width": 64}, {"channels": 3, "image_size": 256}),
}
VARIANTS = {  # name: what it adds to the eager float32 step
    "loop": {},
    "eager": {},
    "bf16": {"precision": "bf16"},
    "graphs": {"graphs": True},
    "graphs+bf16": {"graphs": True, "precision": "bf16"},
    "kernels": {"kernels": True},
    "kernels+graphs": {"kernels": True, "graphs": True},
    "kernels+graphs+bf16": {"kernels": True, "graphs": True, "precision": "bf16"},
    "compile": {"compile": True},
}
ON_CPU, ON_GPU = ("loop", "eager", "bf16", "compile"), tuple(v for v in VARIANTS if v != "bf16")
IMAGES = 512
COLUMNS = (
    ("ms", "ms", 9, ".2f"),
    ("p20", "p20_ms", 9, ".2f"),
    ("p80", "p80_ms", 9, ".2f"),
    ("step/s", "steps_per_s", 9, ".1f"),
    ("images/s", "images_per_s", 10, ".0f"),
    ("launches", "launches", 9, "g"),
    ("kernels", "kernels", 8, "g"),
    ("GPU", "gpu_share", 6, ".0%"),
    ("MB", "peak_mb", 7, ".0f"),
)


def scripts():
    """Names of the scripts beside common/: modules with updates and Args."""
    found = sorted(p.stem for p in run.ROOT.glob("*.py") if "\ndef updates(" in p.read_text())
    return sorted(found, key=lambda name: name != "lsgan")  # the base first


# ---- what is timed ---------------------------------------------------------------------------


class Folder(torch.utils.data.Dataset):
    """Single images as a data set of pictures gives them, transformed one by one.

    pixels: uint8 [M, C, S, S]. enlarge: cut S x S out of 286/256 of it, and mirror half of them.
    """

    def __init__(self, pixels, enlarge=False):
        from torchvision import transforms

        self.pixels = pixels
        channels, size = pixels.shape[1:3]
        single = channels in (1, 3)  # as files hold them; a pair is cut as one tensor
        steps = [transforms.ToPILImage()] if single else []
        steps += [transforms.Resize(round(size * 286 / 256) if enlarge else size)]
        if enlarge:
            steps += [transforms.RandomCrop(size), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor() if single else transforms.ConvertImageDtype(torch.float32)]
        steps += [transforms.Normalize([0.5] * channels, [0.5] * channels)]
        self.transform = transforms.Compose(steps)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(self.pixels[i])


def forever(pixels, args, device, enlarge=False):
    dataset = Folder(pixels, enlarge)
    how = {"batch_size": args.batch_size, "shuffle": True, "drop_last": True}
    loader = torch.utils.data.DataLoader(dataset, **how)
    while True:
        for batch in loader:
            yield batch.to(device)


def plain_adam(args, *nets):
    weights = [p for net in nets for p in net.parameters()]
    return torch.optim.Adam(weights, lr=args.lr, betas=(args.beta1, args.beta2))


def gan_loop(m, args, nets, pixels, device):
    """lsgan, cn_lsgan, icr_gan and wgan_gp the straightforward way: one step, as a function."""
    g, d = nets["generator"], nets["discriminator"]
    opt_g, opt_d = plain_adam(args, g), plain_adam(args, d)
    terms = ("real", "fake", "dis", "gen", "gp", "rec")
    weights = {k: getattr(args, f"lambda_{k}", 0) for k in terms}
    sigma, target = getattr(args, "sigma", 0), getattr(args, "gp_target", 1)
    seen = max(1, round(getattr(args, "consistency_share", 1) * args.batch_size))
    adversarial = getattr(m, "critic_loss", None) or m.discriminator_loss
    batches = forever(pixels, args, device)

    def moved(x):
        return m.augment(x, *m.draw_moves(len(x), args, device))

    def near(z):
        return g(z + sigma * torch.randn(z.shape, device=device))

    def penalty(real, fake):
        eps = torch.rand(len(real), 1, 1, 1, device=device)
        x = (eps * real + (1 - eps) * fake).requires_grad_(True)
        scores = d(x)
        grad = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)[0]
        return ((grad.flatten(1).norm(2, dim=1) - target) ** 2).mean()

    def step_g(real, z, fake):
        opt_g.zero_grad()
        loss = m.generator_loss(d(fake))
        if weights["gen"]:
            loss = loss - weights["gen"] * ((fake[:seen] - near(z[:seen])) ** 2).mean()
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
            loss = loss + weights["real"] * ((d_real[:seen] - d(moved(real[:seen]))) ** 2).mean()
        if weights["fake"]:
            loss = loss + weights["fake"] * ((d_fake[:seen] - d(moved(fake[:seen]))) ** 2).mean()
        if weights["dis"]:
            d_near = d(near(z[:seen]).detach())
            loss = loss + weights["dis"] * ((d_fake[:seen] - d_near) ** 2).mean()
        if weights["gp"]:
            loss = loss + weights["gp"] * penalty(real, fake)
        loss.backward()
        opt_d.step()
        return f"[D loss: {loss.item():f}]"

    def once():
        said = []
        for i in range(args.n_critic):
            real = next(batches)
            z = torch.randn(len(real), args.z_dim, device=device)
            fake = g(z)
            if i == 0:
                said.append(step_g(real, z, fake))
            said.append(step_d(real, z, fake.detach()))
        return " ".join(said)

    return once


def pix2pix_loop(m, args, nets, pixels, device):
    g, d = nets["generator"], nets["discriminator"]
    opt_g, opt_d = plain_adam(args, g), plain_adam(args, d)
    batches = forever(pixels, args, device, enlarge=True)

    def once():
        a, b = next(batches).chunk(2, 1)
        fake = g(a)
        opt_d.zero_grad()
        real_scores = d(torch.cat([a, b], 1))
        loss_d = m.discriminator_loss(real_scores, d(torch.cat([a, fake.detach()], 1)))
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        l1 = m.l1_loss(fake, b)
        adv = m.generator_adv_loss(d(torch.cat([a, fake], 1)))
        (args.lambda_adv * adv + args.lambda_l1 * l1).backward()
        opt_g.step()
        return f"[D loss: {loss_d.item():f}] [L1: {l1.item():f}] [adv: {adv.item():f}]"

    return once


def cyclegan_loop(m, args, nets, pixels, device):
    (ab, ba), (d_a, d_b) = nets["generator"].values(), nets["discriminator"].values()
    opt_g, opt_d = plain_adam(args, ab, ba), plain_adam(args, d_a, d_b)
    loaders = [forever(pixels, args, device) for _ in range(2)]
    pools = [], []

    def pooled(images, pool):
        """The pool of most public copies: single images in a list, drawn by Python."""
        found = []
        for x in images.detach().split(1):
            if len(pool) < args.pool_size:
                pool.append(x)
            elif torch.rand(()) < 0.5:
                i = int(torch.randint(args.pool_size, ()))
                x, pool[i] = pool[i], x
            found.append(x)
        return torch.cat(found)

    def once():
        a, b = (next(loader) for loader in loaders)
        opt_g.zero_grad()
        fake_b, fake_a = ab(a), ba(b)
        adv = m.generator_adv_loss(d_b(fake_b)) + m.generator_adv_loss(d_a(fake_a))
        cycle = m.cycle_loss(ba(fake_b), a) + m.cycle_loss(ab(fake_a), b)
        identity = m.identity_loss(ba(a), a) + m.identity_loss(ab(b), b)
        loss_g = adv + args.lambda_cycle * cycle + args.lambda_identity * identity
        loss_g.backward()
        opt_g.step()
        opt_d.zero_grad()
        losses = []
        for judge, real, fake, pool in ((d_a, a, fake_a, pools[0]), (d_b, b, fake_b, pools[1])):
            losses.append(m.discriminator_loss(judge(real), judge(pooled(fake, pool))))
            losses[-1].backward()
        opt_d.step()
        said = {"G": loss_g, "cycle": cycle, "identity": identity}
        said |= {"D_A": losses[0], "D_B": losses[1]}
        return " ".join(f"[{k} loss: {v.item():f}]" for k, v in said.items())

    return once


LOOPS = dict.fromkeys(("lsgan", "cn_lsgan", "icr_gan", "wgan_gp"), gan_loop)
LOOPS |= {"pix2pix": pix2pix_loop, "cyclegan": cyclegan_loop}


def drawn_pixels(m, args):
    """Random uint8 images as the script reads them, pairs with A's channels first."""
    channels = args.channels_a + args.channels_b if hasattr(args, "channels_a") else args.channels
    generator = torch.Generator().manual_seed(0)
    shape = IMAGES, channels or 1, args.image_size, args.image_size
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def stepper(m, args, nets, pixels, device, compile=False, kernels=False, graphed=False):
    """One step of a script as its main makes them; ValueError where the variant does not exist."""
    ops = {}
    if kernels:
        if "ops" not in inspect.signature(m.updates).parameters:
            raise ValueError("nothing to fuse")
        ops = {"ops": importlib.import_module("kernels")}
    *closures, _ = m.updates(nets, args, **ops)
    inputs = [len(inspect.signature(u).parameters) for u in closures]
    sources = [data.Batches(pixels, args.batch_size, 0, device, i) for i in range(max(inputs))]
    if compile:
        updates = [torch.compile(u, mode="reduce-overhead") for u in closures]
    else:
        updates = [graphs.graph(u, device, graphed) for u in closures]
    n_critic = getattr(args, "n_critic", 1)

    def once():
        if compile:
            torch.compiler.cudagraph_mark_step_begin()
        for update, n in zip(updates, inputs):
            for _ in range(n_critic if n else 1):
                update(*(next(s) for s in sources[:n]))

    return once


def made(name, size, variant, device, threads, changes):
    """(step, note): a warmed-up step, or None and the reason why there is none."""
    how = dict(VARIANTS[variant])
    m = importlib.import_module(name)
    wanted = {"precision": how.pop("precision", "fp32"), "device": str(device), "threads": threads}
    wanted |= SIZES[size][not hasattr(m, "latents")] | changes
    if "channels" in wanted:
        wanted |= {"channels_a": wanted["channels"], "channels_b": wanted["channels"]}
    fields = inspect.signature(m.Args).parameters
    args = m.Args(**{k: v for k, v in wanted.items() if k in fields})
    if variant == "loop" and name not in LOOPS:
        return None, "not written"
    torch.manual_seed(0)
    nets, pixels = m.build(args), drawn_pixels(m, args)
    how = {"graphed" if k == "graphs" else k: v for k, v in how.items()}
    try:
        if variant == "loop":
            once = LOOPS[name](m, args, nets, pixels, device)
        else:
            once = stepper(m, args, nets, pixels, device, **how)
    except ValueError as e:
        return None, str(e)
    trained = {k: net for k, net in nets.items() if not k.endswith("_ema")}
    before = copy.deepcopy({k: dict(net.named_parameters()) for k, net in trained.items()})
    with compiling() if how.get("compile") else contextlib.nullcontext():
        try:
            for _ in range(graphs.WARM_UP + 2):
                once()
        except Exception as e:
            if not how.get("compile"):
                raise
            return None, f"fails: {type(e).__name__}"  # the peer's failure is a result
    moved = {
        net: [not torch.equal(p, before[net][k]) for k, p in trained[net].named_parameters()]
        for net in trained
    }
    for net, found in moved.items():
        # a bias before a norm, or one that cancels in a difference of scores, may stand still
        if sum(found) < 0.6 * len(found):
            still = f"{len(found) - sum(found)} of {len(found)} parameters of {net} stand still"
            if how.get("compile"):
                return None, f"does not train: {still}"
            raise AssertionError(f"{variant} of {name}: {still}")
    once.images = args.batch_size * getattr(args, "n_critic", 1)
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
    starts = r"cu(da)?(LaunchKernel|GraphLaunch|MemcpyAsync|MemsetAsync)"
    calls = [e for e in events if re.match(starts, e.name)]
    return {
        "launches": round(len(calls) / steps, 1),
        "kernels": round(len(on_gpu) / steps, 1),
        "busy_us": sum(e.device_time for e in on_gpu) / steps,
    }


def prepared(size, name, variant, a, device, changes):
    """(row, step or None) of one variant, warmed up and profiled."""
    cuda = device.type == "cuda"
    terminal.progress(f"preparing {size} {name} {variant}", now=True)
    row = {"size": size, "script": name, "variant": variant}
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        once, row["note"] = made(name, size, variant, device, a.threads, changes)
    except RuntimeError as e:  # the other rows are worth keeping
        once, row["note"] = None, f"fails: {files.first_line(e)}"
        terminal.warn(f"{size} {name} {variant} {row['note']}")
    if once is not None:
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else None
        row |= {"peak_mb": peak, "launches": None, "kernels": None}
        if variant != "compile" or cuda:
            row |= profile(once, device)
    return row, once


def measure(size, a, variants, device, clock, changes):
    """Rows of one size, all variants in turn. a: arguments."""
    both = [prepared(size, n, v, a, device, changes) for n in a.scripts for v in variants]
    running = []
    for row, once in both:
        if once is not None:
            steps = max(1, math.ceil(a.round_s / timed(once, 1, device, clock)))
            running.append((row, once, steps, []))
    for i in range(a.rounds):
        for _, once, steps, times in running:
            times.append(timed(once, steps, device, clock))
        terminal.progress(f"{size}: round {i + 1}/{a.rounds}")
    for row, once, _, times in running:
        median, cut = statistics.median(times), sorted(times)
        row |= {"ms": median * 1e3, "p20_ms": cut[len(cut) // 5] * 1e3}
        row |= {"p80_ms": cut[-1 - len(cut) // 5] * 1e3}
        row |= {"steps_per_s": 1 / median, "images_per_s": once.images / median}
        busy = row.pop("busy_us", None)
        row["gpu_share"] = None if busy is None else busy / 1e6 / median
    return [row for row, _ in both]


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
                        text = f"{size} {name}: {variant} is so many times as fast as {against}"
                        ratio(text, (size, name, against), (size, name, variant))
        for variant in VARIANTS:
            text = f"{size} {variant}: icr_gan costs so many times lsgan"
            ratio(text, (size, "icr_gan", variant), (size, "lsgan", variant))
    return found


def head():
    columns = "".join(f"{title:>{width}}" for title, _, width, _ in COLUMNS)
    return f"{'size':9}{'script':10}{'variant':21}{columns}"


def line(row):
    start = f"{row['size']:9}{row['script']:10}{row['variant']:21}"
    if "ms" not in row:
        return f"{start}  {row['note'] or 'not measured'}"

    def cell(key, width, form):
        return f"{'-' if row.get(key) is None else format(row[key], form):>{width}}"

    return start + "".join(cell(*column[1:]) for column in COLUMNS)


def arguments(argv=None):
    p = cli.Parser(prog="python -m tests.benchmarks.train", description=__doc__)
    known = {"scripts": scripts(), "sizes": list(SIZES), "variants": list(VARIANTS)}
    for flag, options, text in (
        ("--scripts", {}, "comma-separated [all]"),
        ("--sizes", {}, f"of {', '.join(SIZES)} [all]"),
        ("--variants", {}, f"of {', '.join(VARIANTS)} [all that the device has]"),
        ("--no-compile", {"action": "store_true"}, "leave out torch.compile, which takes minutes"),
        ("--rounds", {"type": int, "default": 9}, "times that each variant gets its turn [9]"),
        ("--round-s", {"type": float, "default": 0.5}, "least seconds of a turn [0.5]"),
        ("--width", {"type": int}, "in place of that of the sizes"),
        ("--batch-size", {"type": int}, "in place of the default"),
        ("--threads", {"type": int, "default": 1}, "CPU threads [1]"),
        ("--device", {"default": "auto"}, "auto, cpu, cuda, cuda:1 [auto]"),
        ("--json", {"metavar": "FILE"}, "where the rows go [on a GPU tests/benchmarks/results/]"),
    ):
        p.add_argument(flag, help=text, **options)
    a = p.parse_args(argv)
    for key, names in known.items():
        asked = getattr(a, key)
        found = asked.split(",") if asked else (None if key == "variants" else names)
        setattr(a, key, found)
        for word in found or ():
            if word not in names:
                raise ValueError(f"--{key} has {word}; wanted some of {', '.join(names)}")
    if a.rounds < 1 or a.threads < 1 or a.round_s < 0:
        raise ValueError("--rounds and --threads must be positive, --round-s not negative")
    return a


def main(argv=None):
    """The table; returns what the JSON file holds."""
    a = arguments(argv)
    device = machine.device_of(a.device)
    cuda = device.type == "cuda"
    torch.set_num_threads(a.threads)
    machine.exact()
    variants = a.variants or list(ON_GPU if cuda else ON_CPU)
    if not cuda and (wrong := [v for v in variants if v not in ON_CPU]):
        raise ValueError(f"--variants has {wrong[0]}, which needs a GPU")
    if a.no_compile and "compile" in variants:
        variants.remove("compile")
    own_time = not cuda and a.threads == 1
    clock = time.process_time if own_time else time.perf_counter
    changes = {k: v for k in ("width", "batch_size") if (v := getattr(a, k)) is not None}
    about = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cores": os.cpu_count(),
        "threads": a.threads,
        "torch": torch.__version__,
        "date": f"{datetime.datetime.now():%Y-%m-%d}",
        "clock": "process" if own_time else "wall",
        "precision": "fp32 without TF32 where bf16 is not named",
    }
    name = re.sub(r"\W+", "-", about["device"]).strip("-").lower()
    path = a.json or (cuda and Path(__file__).parent / "results" / f"train-{name}.json")
    rows = []
    terminal.result(head())
    for size in a.sizes:
        rows += measure(size, a, variants, device, clock, changes)
        terminal.result("\n".join(line(r) for r in rows if r["size"] == size))
        result = about | {"rows": rows, "ratios": dict(ratios(rows))}
        if path:  # as the sizes are done, so that nothing is lost where time runs out
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, result)
    for text, value in result["ratios"].items():
        terminal.result(f"{value:6.2f}  {text}")
    if path:
        terminal.result(str(path))
    return result


if __name__ == "__main__":
    cli.guard(main)
