"""CN-LSGAN: least squares with a gradient penalty and a reconstruction constraint.

Paper    none: the name and the objective are a course's, on Mao et al. 2016, arXiv:1611.04076, and
         Gulrajani et al. 2017, arXiv:1704.00028.
Losses   L_D = E[(D(x) - 1)^2] + E[D(G(z))^2] + lambda_gp E[(|grad D(y)| - gp_target)^2]
         L_G = E[(D(G(z)) - 1)^2] + lambda_rec E[mean over pixels of (G(z) - x)^2]
         y = e x + (1 - e) G(z), one e ~ U(0, 1) per sample; |.| over all pixels of a sample.
         Without halves: beside lsgan.py's losses each weight here counts half.
Effect   x is drawn independently of z, so with m = E[x] and d pixels the constraint expects
         (|E[G(z)] - m|^2 + tr Cov G(z) + tr Cov x) / d: it draws the mean image to the data's,
         punishes the variance of G, and is least where every z gives m. It is meant against
         collapse and rewards it: the larger lambda_rec, the less varied the samples.
         Targets 0 and 1 ask for a slope of 1 / |x - G(z)| between the two, about 0.05 for digits
         of 32 x 32; gp_target 1 asks for twenty times that, gp_target 0 for a smooth D alone.
Differs  1. The course gives no weights: lambda_gp is the best of 0.1, 1 and 10 at target 1;
         2. D has no normalisation beside the penalty; 3. otherwise as lsgan.py.
Reached  FID (lenet) 8.49 +- .83, 3 seeds, H200: python cn_lsgan.py --dataset mnist --precision bf16
         and with --gp-target 0 --lambda-gp 10 --lambda-rec 0, 3 seeds, H100, 2.74 +- .19; LSGAN
         there 3.29 +- .50 (the ratio .84, .66 to 1.07).
Run      python cn_lsgan.py                                # built-in digits
         python cn_lsgan.py --dataset mnist --gp-target 0 --lambda-gp 10 --lambda-rec 0
Use      from cn_lsgan import gradient_penalty, reconstruction_constraint    # needs torch only
"""
import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F


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
    lambda_gp: float = 0.1  # weight of the gradient penalty; 0 = off
    gp_target: float = 1.0  # gradient norm that the penalty asks for; 0 = as small as can be
    lambda_rec: float = 0.01  # weight of G(z) against real images, neared in the mean; 0 = off
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of convolutions; auto = bf16 where faster
    impl: Literal["auto", "torch", "triton"] = "auto"  # plain functions or kernels; auto = faster
    graphs: bool = True  # on a GPU, replay each update as a CUDA graph
    # run
    seed: int = 0  # seeds weights, noise and the order of the data
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: int = 0  # CPU threads; 0 = as many as pay on this machine
    out_dir: str = "runs"  # parent of the run folder
    log_every: int = 50  # generator updates between rows of log.csv
    sample_every: int = 500  # generator updates between grids and checkpoints; 0 = only at the end
    eval_every: int = 1000  # generator updates between evaluations; 0 = only at the end
    eval_samples: int = 10000  # generated images per evaluation
    features: Literal["auto", "lenet", "cifarnet", "inception"] = "auto"  # auto = by channels
    resume: str | None = None  # run folder to go on with
    quiet: bool = False  # no progress on the terminal

    def __post_init__(self):
        if self.steps is None and self.max_minutes is None and self.resume is None:
            self.steps = 4000


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
            blocks += [nn.BatchNorm2d(d_in), nn.ReLU()]
            blocks += [nn.ConvTranspose2d(d_in, d_out, 4, 2, 1, bias=False)]
        self.body = nn.Sequential(*blocks, nn.BatchNorm2d(dims[-1]), nn.ReLU())
        self.to_image = nn.ConvTranspose2d(dims[-1], channels, 4, 2, 1)

    def forward(self, z):
        h = self.stem(z).unflatten(1, (-1, 4, 4))
        return self.to_image(self.body(h)).tanh()


class Discriminator(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] -> scores [N], unbounded, float32.

    No layer couples the images of a batch: the penalty asks each for a slope of its own, and sets
    may share one call."""

    def __init__(self, channels=1, image_size=32, width=16):
        super().__init__()
        downs = image_size.bit_length() - 3
        dims = [channels] + [width * 2**i for i in range(downs)]
        blocks = []
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [nn.Conv2d(d_in, d_out, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(dims[-1] * 16, 1)

    def forward(self, x):
        h = self.body(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bf16 has 8 bits, too few for scores
            return self.head(h.to(self.head.bias.dtype)).squeeze(1)


# ---- losses: tensors in, scalar out, no state, no randomness ---------------------------------


def discriminator_loss(d_real, d_fake):
    """Least-squares loss of D. Scores [N], float32; each mean over N; scalar >= 0."""
    return (d_real - 1).square().mean() + d_fake.square().mean()


def generator_loss(d_fake):
    """Least-squares loss of G. Scores [N], float32; mean over N; scalar >= 0."""
    return (d_fake - 1).square().mean()


def interpolate(x_real, x_fake, eps):
    """eps x_real + (1 - eps) x_fake. Images [N, C, H, W], eps [N], one per sample; no gradient."""
    eps = eps.view(-1, *[1] * (x_real.dim() - 1))
    return (eps * x_real + (1 - eps) * x_fake).detach()


def gradient_penalty(grad, target=1.0):
    """Penalty E[(|grad_i| - target)^2]. grad [N, ...] = dD/dx_i, its norm over all but N, in
    float32; mean over N; scalar >= 0. Zero gradients: value target^2, gradient 0."""
    grad = grad if grad.dtype == torch.float64 else grad.float()
    return (grad.flatten(1).norm(dim=1) - target).square().mean()


def reconstruction_constraint(x_fake, x_real):
    """Images [N, C, H, W], drawn independently of each other; mean over all; scalar >= 0."""
    return (x_fake - x_real).square().mean()


# ---- assembly --------------------------------------------------------------------------------


def build(args):
    """Networks on args.device: generator, discriminator, and generator_ema, the one sampled."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else args.device.replace("auto", "cpu")
    channels = args.channels or 1
    g = Generator(args.z_dim, channels, args.image_size, args.width)
    d = Discriminator(channels, args.image_size, args.width)
    average = copy.deepcopy(g).eval().requires_grad_(False)
    nets = dict(generator=g, discriminator=d, generator_ema=average)
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


def latents(n, args, generator=None):
    """z [n, z_dim] from the prior N(0, I), on the CPU."""
    return torch.randn(n, args.z_dim, generator=generator)


@torch.no_grad()
def sample(nets, args, z):
    """z [N, z_dim] -> images [N, channels, H, W] in [-1, 1], float32, from the averaged weights."""
    g = nets["generator_ema"]
    return g(z.to(next(g.parameters()).device))


def between(z_a, z_b, t):
    """Latents [N, z_dim], z_a at t = 0, z_b at t = 1, on an arc as N(0, I) lies around a sphere."""
    angle = F.cosine_similarity(z_a, z_b).clamp(-1 + 1e-6, 1 - 1e-6).acos()[:, None]
    return (((1 - t) * angle).sin() * z_a + (t * angle).sin() * z_b) / angle.sin()


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
    [N, channels, H, W] in [-1, 1] on the device of the networks; update_g compares with that of the
    last update_d, whose N is args.batch_size. ops: where interpolate and gradient_penalty are
    looked up, this file if None.
    """
    ops = ops or SimpleNamespace(interpolate=interpolate, gradient_penalty=gradient_penalty)
    g, d, g_ema = nets["generator"], nets["discriminator"], nets["generator_ema"]
    device = next(g.parameters()).device

    def adam(net):
        lr = torch.tensor(args.lr, device=device)  # a tensor: a captured update sees its changes
        betas, capturable = (args.beta1, args.beta2), device.type == "cuda"
        return torch.optim.Adam(net.parameters(), lr, betas, fused=True, capturable=capturable)

    def autocast():
        on = args.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    opt_g, opt_d, t = adam(g), adam(d), torch.zeros((), device=device)
    shown = None  # images of the last update of D, in a graph its input; G's z know nothing of them

    def update_d(real):
        nonlocal shown
        shown = real
        z = torch.randn(len(real), args.z_dim, device=device)
        with autocast():
            with torch.no_grad():
                fake = g(z).to(real.dtype)
            d_out = d(torch.cat([real, fake])).chunk(2)
        loss = discriminator_loss(*d_out)
        logs = {"lsgan": loss.detach()}
        if args.lambda_gp:
            x = ops.interpolate(real, fake, torch.rand(len(real), device=device)).requires_grad_()
            with autocast():
                d_x = d(x)  # in one call with real and fake the slope takes 1.7 times as long
            (grad,) = torch.autograd.grad(d_x.sum(), x, create_graph=True)
            penalty = ops.gradient_penalty(grad, args.gp_target)
            loss = loss + args.lambda_gp * penalty
            norm = grad.detach().flatten(1).norm(dim=1).mean()
            logs |= {"penalty": penalty.detach(), "grad_norm": norm}
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        return {"loss_d": loss.detach()} | logs

    def update_g():
        z = torch.randn(args.batch_size, args.z_dim, device=device)
        with autocast():
            fake = g(z)
            loss = generator_loss(d(fake))
        logs = {}
        if args.lambda_rec:
            constraint = reconstruction_constraint(fake.to(shown.dtype), shown)
            loss = loss + args.lambda_rec * constraint
            logs["constraint"] = constraint.detach()
        opt_g.zero_grad()
        loss.backward(inputs=list(g.parameters()))  # through D, which keeps none
        opt_g.step()
        t.add_(1)
        update_ema(g_ema, g, ((1 + t) / (10 + t)).clamp(max=args.ema_decay))
        return {"loss_g": loss.detach()} | logs

    return update_d, update_g, dict(opt_g=opt_g, opt_d=opt_d, t=t)


def learning_rate(args, done):
    """Step size when the share done of the run, in [0, 1], is behind: constant, then to 0."""
    return args.lr * min(1, (1 - done) / args.lr_decay) if args.lr_decay else args.lr


def main(args):
    """Train as args say; returns the run folder (pathlib.Path)."""
    from common import data, graphs, machine, processes, run, scores  # borrowed

    device = run.setup(args)  # checks, processes, precision, threads, seed
    images = data.load_images(
        args.dataset, args.data_dir, args.image_size, args.channels, args.cache_dir
    )
    args.channels = images.channels
    nets = build(args)
    ops = None
    if machine.fused(args):
        import kernels as ops
    update_d, update_g, state = updates(nets, processes.share(args), ops)  # its share of a batch
    train = data.subset(images, args.subset)
    batches = state["batches"] = data.Batches(train, args.batch_size, args.seed, device)
    shown = latents(64, args, torch.Generator().manual_seed(args.seed))

    def draw():
        return {"samples": sample(nets, args, shown)}

    def generate(n, rng):
        return sample(nets, args, latents(n, args, rng))

    score = scores.of_generator(generate, images, args)
    with run.start(__file__, args, nets, state, draw, score) as r:
        update_d, update_g = (graphs.graph(u, device, args.graphs) for u in (update_d, update_g))
        while r.going():
            r.set_lr(learning_rate(args, r.fraction))
            for _ in range(args.n_critic):
                losses = update_d(next(batches))
            r.after_step(losses | update_g())  # counts; when due: logs, draws, saves, scores
        return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    from common.cli import cli  # training needs the folder common/; importing this file does not

    cli(main, Args, __doc__)
