"""ICR-GAN: improved consistency regularisation on least-squares losses.

Paper    Zhao et al. 2020, Improved Consistency Regularization for GANs, arXiv:2002.04724, on
         Zhang et al. 2019, Consistency Regularization for GANs, arXiv:1910.12027.
Losses   L_D = L_D of LSGAN + lambda_real E[(D(x) - D(T(x)))^2]
                            + lambda_fake E[(D(G(z)) - D(T(G(z))))^2]
                            + lambda_dis  E[(D(G(z)) - D(G(z + sigma n)))^2]
         L_G = L_G of LSGAN - lambda_gen  E[mean over pixels of (G(z) - G(z + sigma n))^2]
         T: a random shift and mirror of each image; n ~ N(0, I).
         CR is lambda_real alone, bCR lambda_real and lambda_fake, zCR lambda_dis and lambda_gen.
Differs  1. Least squares, where the paper has the hinge and the non-saturating loss: these scores
         span [0, 1], so the paper's weights weigh more here; 2. T moves by 1/32 of the image, where
         the paper moves by 4 pixels of 32, and mirrors no digits; 3. what lsgan.py differs in.
Reached  MNIST, 10,000 samples, 6,000 steps in 280 to 580 s of one thread of a shared 2-core x86 CPU:
         FID (lenet) 1.61, precision .692, recall .727 (seed 0); on 500 training images 4.64, 3.54,
         3.41 (seeds 0 to 2). Commands and dates in README.md.
Run      python icr_gan.py --sigma 0.05                    # built-in digits
         python icr_gan.py --dataset mnist --subset 500 --steps 6000
Use      from icr_gan import augment, consistency, icr_d_loss    # needs torch only
"""
import copy
import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


@dataclass
class Args:
    # data
    dataset: str = "digits"  # digits (built in), mnist, fashion, cifar10 or a folder of images
    data_dir: str = "data"  # where data sets lie; downloads go here
    cache_dir: str = "data/cache"  # decoded images and statistics of real images
    subset: int = 0  # train on only that many images, drawn with a fixed seed; 0 = all
    image_size: int = 32  # height and width in pixels, a power of two from 8 to 512
    channels: int = 0  # 0 = as the data, 1 = grey, 3 = colour
    # method
    sigma: float = 0.05  # standard deviation of the step in latent space; 0 = no zCR
    lambda_real: float = 10.0  # weight of D(x) against D(T(x)); 0 = off
    lambda_fake: float = 10.0  # weight of D(G(z)) against D(T(G(z))); 0 = off
    lambda_dis: float = 5.0  # weight of D(G(z)) against D(G(z + sigma n)); 0 = off
    lambda_gen: float = 0.5  # weight of G(z) against G(z + sigma n), which G pushes apart; 0 = off
    shift: int | None = None  # largest move of T in pixels, 0 = none [image_size / 32, at least 1]
    flip: Literal["auto", "on", "off"] = "auto"  # whether T mirrors; auto = not digits and mnist
    # networks
    z_dim: int = 64  # length of the latent vector
    width: int = 16  # channels at the widest resolution; deeper layers double
    # optimisation
    steps: int | None = None  # generator updates [4000, or no limit with --max-minutes]
    max_minutes: float | None = None  # end after this much training time [no limit]
    batch_size: int = 64  # images per update
    n_critic: int = 1  # discriminator updates per generator update
    lr: float = 2e-3  # Adam step size, both networks
    lr_decay: float = 0.5  # last part of the run over which lr falls linearly to 0; 0 = constant
    beta1: float = 0.5  # Adam decay of the first moment
    beta2: float = 0.99  # Adam decay of the second moment
    ema_decay: float = 0.99  # decay of the averaged generator, per generator update
    precision: Literal["fp32", "bf16"] = "bf16"  # of convolutions; losses stay fp32
    impl: Literal["auto", "torch", "triton"] = "auto"  # plain functions or kernels; auto = the faster as measured
    graphs: bool = True  # on a GPU, replay each update as a CUDA graph
    # run
    seed: int = 0  # seeds weights, noise and the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: int = 1  # CPU threads; a second one can cost more than it brings on shared cores
    out_dir: str = "runs"  # parent of the run folder
    log_every: int = 50  # generator updates between rows of log.csv
    sample_every: int = 500  # generator updates between grids and checkpoints; 0 = only at the end
    eval_every: int = 1000  # generator updates between evaluations; 0 = only at the end
    eval_samples: int = 10000  # generated images per evaluation
    features: Literal["auto", "lenet", "cifarnet"] = "auto"  # network behind the metrics; auto = by channels
    resume: str | None = None  # run folder to go on with
    quiet: bool = False  # no progress on the terminal

    def __post_init__(self):
        if self.steps is None and self.max_minutes is None:
            self.steps = 4000
        if self.shift is None:
            self.shift = max(1, self.image_size // 32)
        for names, ok, wanted in (
            ("image_size", lambda v: 8 <= v <= 512 and v & (v - 1) == 0, "a power of two from 8 to 512"),
            ("channels", lambda v: v in (0, 1, 3), "0, 1 or 3"),
            ("batch_size steps max_minutes n_critic lr z_dim width threads log_every", lambda v: v > 0, "positive"),
            ("eval_samples", lambda v: v >= 6, "at least 6"),
            ("subset sample_every eval_every seed", lambda v: v >= 0, "zero or positive"),
            ("beta1 beta2 ema_decay", lambda v: 0 <= v < 1, "in [0, 1)"),
            ("lr_decay", lambda v: 0 <= v <= 1, "in [0, 1]"),
            ("sigma lambda_real lambda_fake lambda_dis lambda_gen", lambda v: v >= 0, "zero or positive"),
            ("shift", lambda v: 0 <= v < self.image_size, "at least 0 and below image_size"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and ok(value)):
                    raise ValueError(f"{name} must be {wanted}, got {value}")


# ---- networks ------------------------------------------------------------------------------


class Generator(nn.Module):
    """z [N, z_dim] -> images [N, channels, image_size, image_size] in [-1, 1]."""

    def __init__(self, z_dim=64, channels=1, image_size=32, width=16):
        super().__init__()
        ups = image_size.bit_length() - 3  # doublings from 4 x 4
        dims = [width * 2**i for i in reversed(range(ups))]
        self.stem = nn.Linear(z_dim, dims[0] * 16, bias=False)
        blocks = []
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [nn.BatchNorm2d(d_in), nn.ReLU(), nn.ConvTranspose2d(d_in, d_out, 4, 2, 1, bias=False)]
        self.body = nn.Sequential(*blocks, nn.BatchNorm2d(dims[-1]), nn.ReLU())
        self.to_image = nn.ConvTranspose2d(dims[-1], channels, 4, 2, 1)

    def forward(self, z):
        h = self.stem(z).view(len(z), -1, 4, 4)
        return self.to_image(self.body(h)).tanh()


class Discriminator(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] -> scores [N], unbounded, float32.

    No layer couples the images of a batch, so sets may share one call."""

    def __init__(self, channels=1, image_size=32, width=16):
        super().__init__()
        downs = image_size.bit_length() - 3
        dims = [channels] + [width * 2**i for i in range(downs)]
        blocks = []
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [spectral_norm(nn.Conv2d(d_in, d_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*blocks)
        self.head = spectral_norm(nn.Linear(dims[-1] * 16, 1))

    def forward(self, x):
        h = self.body(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bf16 has 8 bits, too few for scores
            return self.head(h.to(self.head.bias.dtype)).squeeze(1)


# ---- losses: tensors in, scalar out, no state, no randomness ---------------------------------


def discriminator_loss(d_real, d_fake):
    """Least-squares loss of D. Scores [N], float32; each mean over N; scalar >= 0."""
    return 0.5 * (d_real - 1).square().mean() + 0.5 * d_fake.square().mean()


def generator_loss(d_fake):
    """Least-squares loss of G. Scores [N], float32; mean over N; scalar >= 0."""
    return 0.5 * (d_fake - 1).square().mean()


def consistency(a, b, weight):
    """weight * (a - b)^2, mean over all elements. Same shapes, float32; scalar; gradients to both."""
    return weight * (a - b).square().mean()


def icr_d_loss(d_out, lambda_real, lambda_fake, lambda_dis):
    """Loss of D with its consistency terms, algorithm 2 of the paper on least squares.

    d_out [2 + number of non-zero weights, N], float32: D(x), D(G(z)), then D(T(x)), D(T(G(z))),
    D(G(z + sigma n)); a term of weight 0 has no row. Means over N. Returns (loss, terms): the
    scalar, and terms [4] unweighted and detached: lsgan, real, fake, dis, 0 where off.
    """
    d_real, d_fake, *rest = d_out
    loss = discriminator_loss(d_real, d_fake)
    terms = [loss.detach()]
    for reference, weight in ((d_real, lambda_real), (d_fake, lambda_fake), (d_fake, lambda_dis)):
        terms.append(torch.zeros_like(terms[0]))
        if weight:
            term = consistency(reference, rest.pop(0), 1.0)
            loss = loss + weight * term
            terms[-1] = term.detach()
    return loss, torch.stack(terms)


# ---- augmentation ----------------------------------------------------------------------------


def augment(x, flip, dx, dy):
    """T: image i mirrored if flip[i], then moved by dx[i] to the right and dy[i] down.

    x [N, C, H, W], flip bool [N], dx and dy int64 [N], |dx| < W, |dy| < H. out[y, x] is
    in[y - dy, x - dx]; what comes in at an edge is reflected without repeating the edge.
    """
    n, c, h, w = x.shape

    def source(moves, size):
        at = torch.arange(size, device=x.device) - moves[:, None]
        return size - 1 - (size - 1 - at.abs()).abs()

    rows, cols = source(dy, h), source(dx, w)
    cols = torch.where(flip[:, None], w - 1 - cols, cols)
    image = torch.arange(n, device=x.device).view(n, 1, 1)
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def draw_moves(n, args, device):
    """Random flip, dx, dy of augment for n images, each drawn for itself."""
    mirror = args.flip == "on" or (args.flip == "auto" and args.dataset not in ("digits", "mnist"))
    flip = torch.rand(n, device=device) < 0.5 if mirror else torch.zeros(n, dtype=torch.bool, device=device)
    still = torch.zeros(2, n, dtype=torch.int64, device=device)
    return flip, *(torch.randint_like(still, -args.shift, args.shift + 1) if args.shift else still)


# ---- assembly --------------------------------------------------------------------------------


def build(args):
    """Networks on args.device: generator, discriminator, and generator_ema, the one sampled."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else args.device.replace("auto", "cpu")
    channels = args.channels or 1
    g = Generator(args.z_dim, channels, args.image_size, args.width)
    d = Discriminator(channels, args.image_size, args.width)
    nets = dict(generator=g, discriminator=d, generator_ema=copy.deepcopy(g).eval().requires_grad_(False))
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


def latents(n, args, generator=None):
    """z [n, z_dim] from the prior N(0, I), on the CPU."""
    return torch.randn(n, args.z_dim, generator=generator)


@torch.no_grad()
def sample(nets, args, z):
    """z [N, z_dim] -> images [N, channels, H, W] in [-1, 1] from the averaged weights, in float32."""
    g = nets["generator_ema"]
    return g(z.to(next(g.parameters()).device))


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, decay a 0-d tensor; buffers are copied."""
    for e, m in zip(ema.parameters(), model.parameters()):
        e.lerp_(m, 1 - decay)
    for e, m in zip(ema.buffers(), model.buffers()):
        e.copy_(m)


def updates(nets, args, ops=None):
    """update_d(real), update_g() and state: what a checkpoint needs besides the networks.

    Each update ends in its optimiser step and returns the 0-d tensors to log. real is float32
    [N, channels, H, W] in [-1, 1] on the device of the networks. ops: where consistency,
    icr_d_loss and augment are looked up, this file if None.
    """
    ops = ops or sys.modules[__name__]
    g, d, g_ema = nets["generator"], nets["discriminator"], nets["generator_ema"]
    device = next(g.parameters()).device

    def adam(net):
        lr = torch.tensor(args.lr, device=device)  # a tensor, so that a captured update sees changes
        capturable = device.type == "cuda"
        return torch.optim.Adam(net.parameters(), lr, (args.beta1, args.beta2), fused=True, capturable=capturable)

    def autocast():
        on = args.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    state = dict(opt_g=adam(g), opt_d=adam(d), t=torch.zeros((), device=device))
    lambda_dis, lambda_gen = (args.lambda_dis, args.lambda_gen) if args.sigma else (0, 0)  # terms that are 0 anyway

    def update_d(real):
        z = torch.randn(len(real), args.z_dim, device=device)
        with autocast():
            with torch.no_grad():
                fake = g(z).to(real.dtype)
            sets = [real, fake]
            if args.lambda_real:
                sets.append(ops.augment(real, *draw_moves(len(real), args, device)))
            if args.lambda_fake:
                sets.append(ops.augment(fake, *draw_moves(len(fake), args, device)))
            if lambda_dis:
                with torch.no_grad():
                    sets.append(g(z + args.sigma * torch.randn_like(z)).to(real.dtype))
            d_out = d(torch.cat(sets)).view(len(sets), -1)  # one call: one power iteration
        loss, terms = ops.icr_d_loss(d_out, args.lambda_real, args.lambda_fake, lambda_dis)
        state["opt_d"].zero_grad()
        loss.backward()
        state["opt_d"].step()
        return {"loss_d": loss.detach()} | dict(zip(("lsgan", "real", "fake", "dis"), terms))

    def update_g():
        d.requires_grad_(False)  # gradients pass through D, none are kept for it
        z = torch.randn(args.batch_size, args.z_dim, device=device)
        with autocast():
            fake = g(z)
            loss = generator_loss(d(fake))
            if lambda_gen:
                near = g(z + args.sigma * torch.randn_like(z))
        logs = {}
        if lambda_gen:
            gen = ops.consistency(fake.to(loss.dtype), near.to(loss.dtype), lambda_gen)
            logs["gen_ratio"] = gen.detach() / loss.detach()
            loss = loss - gen
        state["opt_g"].zero_grad()
        loss.backward()
        state["opt_g"].step()
        d.requires_grad_(True)
        state["t"] += 1
        update_ema(g_ema, g, ((1 + state["t"]) / (10 + state["t"])).clamp(max=args.ema_decay))
        return {"loss_g": loss.detach()} | logs

    return update_d, update_g, state


def main(args):
    """Train as args say; returns the run folder (pathlib.Path)."""
    from common import data, gpu, run  # borrowed, here and nowhere else: replace to train elsewhere

    run.setup(args)  # checks, processes, threads, seed
    images = data.load_images(args.dataset, args.data_dir, args.image_size, args.channels, args.cache_dir)
    args.channels = images.channels
    train = data.subset(images, args.subset, args.batch_size)
    nets = build(args)
    ops = None
    if run.fused(args):
        import kernels as ops
    update_d, update_g, state = updates(nets, gpu.share(args), ops)  # of several processes, one's share of the batch
    r = run.start(__file__, args, images, nets, state, latents, sample)
    r.warn_above("gen_ratio", 1, "lambda_gen outweighs the adversarial loss of G, whose images turn rough; lower it or sigma")
    update_d, update_g = (gpu.graph(u, r.device, args.graphs) for u in (update_d, update_g))
    batches = data.batches(train, args.batch_size, args.seed, r.drawn, r.device, r.rank, r.ranks, update_d.captures)
    while r.going():
        r.set_lr(args.lr * min(1, (1 - r.fraction) / args.lr_decay) if args.lr_decay else args.lr)
        for _ in range(args.n_critic):
            losses = update_d(next(batches))
        r.after_step(losses | update_g())  # counts; when due: logs, draws the grid, scores, saves
    return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    try:
        from common.run import cli
    except ModuleNotFoundError as e:
        if e.name not in ("common", "common.run"):
            raise
        raise SystemExit("error: training needs the folder common/ beside this file; networks, losses and updates can be imported as they are")
    cli(main, Args, __doc__)
