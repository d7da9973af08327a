"""LSGAN: least-squares adversarial losses.

Paper    Mao et al. 2016, Least Squares Generative Adversarial Networks, arXiv:1611.04076.
Losses   L_D = 1/2 E[(D(x) - b)^2] + 1/2 E[(D(G(z)) - a)^2]
         L_G = 1/2 E[(D(G(z)) - c)^2]                  with a, b, c = 0, 1, 1
         --loss vanilla: the non-saturating loss of Goodfellow et al. 2014, arXiv:1406.2661.
Differs  1. D is spectrally normalised (Miyato et al. 2018, arXiv:1802.05957), where the paper has
         BatchNorm; 2. Adam's rate and decays, and the rate's fall to 0, are the best found for
         short runs; 3. an exponential average of G is sampled and scored, in the paper G itself.
Reached  FID (lenet) 3.29 +- .50, 3 seeds, H200: python lsgan.py --dataset mnist --precision bf16
Run      python lsgan.py                                   # built-in digits
         python lsgan.py --dataset mnist --loss vanilla
Use      from lsgan import Args, build, latents, sample    # needs torch only
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
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
    loss: Literal["lsgan", "vanilla"] = "lsgan"  # least squares, or non-saturating logistic
    a: float = 0.0  # score that D aims at for generated images
    b: float = 1.0  # score that D aims at for real images
    c: float = 1.0  # score that G aims at for its images
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
        if self.loss == "vanilla" and (self.a, self.b, self.c) != (0, 1, 1):
            raise ValueError("a, b and c belong to the least-squares loss, not to --loss vanilla")


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


class SNConv2d(nn.Conv2d):
    """Convolution for spectral_norm, whose power iteration autocast must not take in bf16."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Discriminator(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] -> scores [N], unbounded, float32.

    No layer couples the images of a batch, so sets may share one call."""

    def __init__(self, channels=1, image_size=32, width=16):
        super().__init__()
        downs = image_size.bit_length() - 3
        dims = [channels] + [width * 2**i for i in range(downs)]
        blocks = []
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [spectral_norm(SNConv2d(d_in, d_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*blocks)
        self.head = spectral_norm(nn.Linear(dims[-1] * 16, 1))

    def forward(self, x):
        h = self.body(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # bf16 has 8 bits, too few for scores
            return self.head(h.to(self.head.bias.dtype)).squeeze(1)


# ---- losses: tensors in, scalar out, no state, no randomness ---------------------------------


def discriminator_loss(d_real, d_fake, a=0.0, b=1.0):
    """Least-squares loss of D, eq. 2. Scores [N], float32; each mean over N; scalar >= 0."""
    return 0.5 * (d_real - b).square().mean() + 0.5 * (d_fake - a).square().mean()


def generator_loss(d_fake, c=1.0):
    """Least-squares loss of G, eq. 2. Scores [N], float32; mean over N; scalar >= 0."""
    return 0.5 * (d_fake - c).square().mean()


def vanilla_discriminator_loss(d_real, d_fake):
    """Cross-entropy of real against generated. Logits [N], float32; means over N; scalar >= 0."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()


def vanilla_generator_loss(d_fake):
    """Non-saturating loss -E[log D(G(z))]. Logits [N], float32; mean over N; scalar >= 0."""
    return F.softplus(-d_fake).mean()


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


def updates(nets, args):
    """update_d(real), update_g() and state: what a checkpoint needs besides the networks.

    Each update ends in its optimiser step and returns the 0-d tensors to log. real is float32
    [N, channels, H, W] in [-1, 1] on the device of the networks.
    """
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

    def d_loss(d_real, d_fake):
        if args.loss == "vanilla":
            return vanilla_discriminator_loss(d_real, d_fake)
        return discriminator_loss(d_real, d_fake, args.a, args.b)

    def g_loss(d_fake):
        if args.loss == "vanilla":
            return vanilla_generator_loss(d_fake)
        return generator_loss(d_fake, args.c)

    def update_d(real):
        z = torch.randn(len(real), args.z_dim, device=device)
        with autocast():
            with torch.no_grad():
                fake = g(z).to(real.dtype)
            d_out = d(torch.cat([real, fake])).chunk(2)  # one call: one power iteration
        loss = d_loss(*d_out)
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        return {"loss_d": loss.detach()}

    def update_g():
        z = torch.randn(args.batch_size, args.z_dim, device=device)
        with autocast():
            fake = g(z)
            loss = g_loss(d(fake))
        opt_g.zero_grad()
        loss.backward(inputs=list(g.parameters()))  # through D, which keeps none
        opt_g.step()
        t.add_(1)
        update_ema(g_ema, g, ((1 + t) / (10 + t)).clamp(max=args.ema_decay))
        return {"loss_g": loss.detach()}

    return update_d, update_g, dict(opt_g=opt_g, opt_d=opt_d, t=t)


def learning_rate(args, done):
    """Step size when the share done of the run, in [0, 1], is behind: constant, then to 0."""
    return args.lr * min(1, (1 - done) / args.lr_decay) if args.lr_decay else args.lr


def main(args):
    """Train as args say; returns the run folder (pathlib.Path)."""
    from common import data, graphs, processes, run, scores  # borrowed: replace to train elsewhere

    device = run.setup(args)  # checks, processes, precision, threads, seed
    images = data.load_images(
        args.dataset, args.data_dir, args.image_size, args.channels, args.cache_dir
    )
    args.channels = images.channels
    nets = build(args)
    update_d, update_g, state = updates(nets, processes.share(args))  # its share of a batch
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
