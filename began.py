"""BEGAN: D is an auto-encoder, and the ratio of its losses on generated and real images is held.

Paper    Berthelot, Schumm, Metz 2017, BEGAN: Boundary Equilibrium Generative Adversarial
         Networks, arXiv:1703.10717.
Losses   l(v) = mean over pixels of |AE(v) - v|            AE: decoder of encoder, the network D
         L_D = l(x) - k l(G(z_D))
         L_G = l(G(z_G)) + lambda_pt PT                    z_D, z_G: draws of their own, U(-1, 1)
         PT = mean over i != j of cos(s_i, s_j)^2          s_i: encoder of G(z_i); batch of N
         k <- k + lambda_k (gamma l(x) - l(G(z_G))), cut to [0, 1], from 0 on; after G's update
         M = l(x) + |gamma l(x) - l(G(z_G))|, logged as convergence
         The rate follows M: each --stall-steps updates of G the mean of M since the last look is
         compared with the best such mean before; where it is not below .999 of that, the factor on
         Adam's rate, logged as rate, is halved, down to 1/16. Of several processes, k and M come
         from the mean losses of all.
Differs  1. PT is EBGAN's pulling-away term, which the paper has not: k asks for the mean of l(G(z))
         alone, D rebuilds ones best, and without the term all samples of MNIST are ones at gamma .7
         to .9, and at 1 a stroke like them; 2. gamma is 1, where the paper has .3 to .7, and
         lambda_k .05, as .001 hardly moves k in 4,000 updates; 3. D's code is short, 16
         where the paper has 64 or more: with 64 it rebuilds any strokes; 4. weights start as
         Glorot's, as torch's own let signals fade in D, which then learns little in
         hundreds of updates; 5. channels double with each halving of the size, and a size has one
         convolution, where the paper's grow by as many and have two; 6. Adam's rate and decays are
         the best found for short runs, the rate falls to 0 besides its halving, an average of G is
         scored, and samples are cut to [-1, 1]; 7. G's loss, which k and M meet, is taken after
         the step of D, in the paper before it.
Reached  FID (lenet) 30.9 +- 4.8, 3 seeds, H100: python began.py --dataset mnist --precision bf16
Run      python began.py                                   # built-in digits
         python began.py --dataset mnist --gamma 0.7
Use      from began import convergence_measure, encode, update_k    # needs torch only

Commonly done wrong, each with a test here:
- gamma turned round, or the sign of the step of k: k runs to the wrong end; no cut to [0, 1];
- M without its absolute value, which then falls while G gets worse;
- both losses in one backward pass through D, which learns to rebuild whatever G makes;
- generated images detached as the target in L_G, which loses half of its gradient;
- z from N(0, I) and an arc between latents, or D's codes for G's latents: an image has to be
  inverted (encode), and what is left of it to be reported (residual);
- k differentiated, or read on the CPU at every step.
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
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
    gamma: float = 1.0  # l(G(z)) / l(x) that is held: lower = better images, less diverse
    lambda_k: float = 0.05  # step size of k, the weight of l(G(z)) in the loss of D
    lambda_pt: float = 0.3  # weight of the pulling-away term in the loss of G; 0 = off, the paper's
    stall_steps: int = 500  # generator updates after which lr halves unless M fell; 0 = never
    # networks
    z_dim: int = 16  # length of the latent vector, and of D's code
    width: int = 8  # channels at the widest resolution; deeper layers double
    # optimisation
    steps: int | None = None  # generator updates [4000, or no limit with --max-minutes]
    max_minutes: float | None = None  # end after this much training time [no limit]
    batch_size: int = 16  # images per update
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
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        if self.stall_steps < 0:
            raise ValueError(f"stall_steps must be zero or positive, got {self.stall_steps}")
        if self.lambda_pt and self.batch_size == 1:
            raise ValueError("batch_size 1: lambda_pt compares images, each process needs two")


# ---- networks ------------------------------------------------------------------------------


class Generator(nn.Module):
    """z [N, z_dim] -> images [N, channels, image_size, image_size], not held to [-1, 1].

    The decoder of D is another one, with weights of its own."""

    def __init__(self, z_dim=64, channels=1, image_size=32, width=8):
        super().__init__()
        dims = [width * 2**i for i in reversed(range(image_size.bit_length() - 3))]
        self.stem = nn.Linear(z_dim, dims[0] * 64)
        blocks = [nn.Conv2d(dims[0], dims[0], 3, 1, 1), nn.ELU()]  # at 8 x 8
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [nn.Upsample(scale_factor=2), nn.Conv2d(d_in, d_out, 3, 1, 1), nn.ELU()]
        self.body = nn.Sequential(*blocks)
        self.to_image = nn.Conv2d(dims[-1], channels, 3, 1, 1)

    def forward(self, z):
        h = self.stem(z).unflatten(1, (-1, 8, 8))
        return self.to_image(self.body(h))


class AutoEncoder(nn.Module):
    """Images [N, channels, image_size, image_size] -> their reconstructions, alike.

    encoder: images -> codes [N, z_dim], a bottleneck; decoder: a network like G. No layer couples
    the images of a batch, so sets may share one call."""

    def __init__(self, z_dim=64, channels=1, image_size=32, width=8):
        super().__init__()
        dims = [width * 2**i for i in range(image_size.bit_length() - 3)]
        blocks = [nn.Conv2d(channels, width, 3, 1, 1), nn.ELU()]
        for d_in, d_out in zip(dims, dims[1:] + [None]):
            blocks += [nn.Conv2d(d_in, d_in, 3, 1, 1), nn.ELU()]
            blocks += [nn.Conv2d(d_in, d_out, 3, 2, 1), nn.ELU()] if d_out else []
        self.encoder = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(dims[-1] * 64, z_dim))
        self.decoder = Generator(z_dim, channels, image_size, width)

    def forward(self, x):
        return self.decoder(self.encoder(x))


@torch.no_grad()
def initialise(layer):
    """Glorot's weights and zero biases: torch's own weights let a signal fade from layer to layer,
    and without normalisation nothing brings it back."""
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(layer.weight)
        layer.bias.zero_()


# ---- losses: tensors in, scalar out, no state, no randomness ---------------------------------


def at_least_float32(x):
    """x, bf16 as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recon_loss(x_rec, x):
    """mean |x_rec - x| over every element, at least float32; scalar >= 0. Gradients to both."""
    return (at_least_float32(x_rec) - at_least_float32(x)).abs().mean()


def discriminator_loss(loss_real, loss_fake, k):
    """L_D = l(x) - k l(G(z)). 0-d tensors; scalar of either sign. k takes no gradient."""
    return loss_real - torch.as_tensor(k).detach() * loss_fake


@torch.no_grad()
def update_k(k, loss_real, loss_fake, gamma, lambda_k):
    """The next k: k + lambda_k (gamma l(x) - l(G(z))), cut to [0, 1]. 0-d tensors; a new one."""
    return (k + lambda_k * (gamma * loss_real - loss_fake)).clamp(0, 1)


@torch.no_grad()
def convergence_measure(loss_real, loss_fake, gamma):
    """M = l(x) + |gamma l(x) - l(G(z))|. 0-d tensors; scalar >= 0."""
    return loss_real + (gamma * loss_real - loss_fake).abs()


@torch.no_grad()
def after_look(m, best, rate):
    """(best, rate) after a look at m, mean M since the last look. 0-d tensors; new ones.

    rate is a factor on the step size: halved, but not below 1/16, unless m < best (1 - 1e-3)."""
    stalled = m >= best * (1 - 1e-3)
    return torch.minimum(m, best), torch.where(stalled, (rate / 2).clamp(min=1 / 16), rate)


def pulling_away_term(s):
    """Pulling-away term: squared cosine of two codes, mean over the N (N - 1) pairs of a batch.

    s [N, ...], flattened from dim 1; at least float32; scalar in [0, 1]. Pairs with a code of zeros
    count as 0, and so does a batch of one.
    """
    n = len(s)
    if n == 1:
        return at_least_float32(s).sum() * 0
    with torch.autocast(s.device.type, enabled=False):
        s = F.normalize(at_least_float32(s).flatten(1), dim=1, eps=1e-8)
        squares = (s @ s.T).square()
    return (squares.sum() - squares.diagonal().sum()) / (n * (n - 1))


# ---- assembly --------------------------------------------------------------------------------


def build(args):
    """Networks on args.device: generator, discriminator, and generator_ema, the one sampled."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else args.device.replace("auto", "cpu")
    channels = args.channels or 1
    g = Generator(args.z_dim, channels, args.image_size, args.width)
    d = AutoEncoder(args.z_dim, channels, args.image_size, args.width)
    for net in (g, d):
        net.apply(initialise)
    average = copy.deepcopy(g).eval().requires_grad_(False)
    nets = dict(generator=g, discriminator=d, generator_ema=average)
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


def latents(n, args, generator=None):
    """z [n, z_dim] from the prior, uniform in [-1, 1], on the CPU."""
    return torch.rand(n, args.z_dim, generator=generator) * 2 - 1


@torch.no_grad()
def sample(nets, args, z):
    """z [N, z_dim] -> images [N, channels, H, W] in [-1, 1], float32, from the averaged weights."""
    g = nets["generator_ema"]
    return g(z.to(next(g.parameters()).device)).clamp(-1, 1)


def between(z_a, z_b, t):
    """Latents [N, z_dim], z_a at t = 0, z_b at t = 1, on a line: a cube asks for no arc."""
    return (1 - t) * z_a + t * z_b


def encode(nets, args, x, steps=100):
    """Latents [N, z_dim] in [-1, 1] for images x [N, C, H, W] in [-1, 1], of each the z that
    minimises mean |x - G(z)|: Adam from z = 0, cut to the prior's cube after every step.
    How far G(z) stays from x is no small thing: see residual."""
    g = nets["generator_ema"]
    x = x.to(next(g.parameters()).device)
    z = torch.zeros(len(x), args.z_dim, device=x.device, requires_grad=True)
    opt = torch.optim.Adam([z], 0.1)
    for i in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - i / steps)
        with torch.enable_grad():
            loss = (g(z) - x).abs().flatten(1).mean(1).sum()  # a sum: no image knows of the others
        (z.grad,) = torch.autograd.grad(loss, z)
        opt.step()
        with torch.no_grad():
            z.clamp_(-1, 1)
    return z.detach()


def residual(nets, args, x, z):
    """mean |x - G(z)| [N] of images x [N, C, H, W] and latents z [N, z_dim], as of encode."""
    images = sample(nets, args, z)
    return (images - x.to(images.device)).abs().flatten(1).mean(1)


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
    [N, channels, H, W] in [-1, 1] on the device of the networks. update_g follows an update_d.
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
    k, loss_real, m_mean, m_sum = (torch.zeros((), device=device) for _ in range(4))
    best, rate = torch.tensor(float("inf"), device=device), torch.ones((), device=device)

    def prior(n):
        return torch.rand(n, args.z_dim, device=device) * 2 - 1

    def update_d(real):
        z = prior(len(real))
        with autocast():
            with torch.no_grad():
                fake = g(z).to(real.dtype)
            x = torch.cat([real, fake])
            x_rec = d(x)
        on_real, on_fake = (recon_loss(*pair) for pair in zip(x_rec.chunk(2), x.chunk(2)))
        loss = discriminator_loss(on_real, on_fake, k)
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        loss_real.copy_(on_real.detach())
        return {"loss_d": loss.detach(), "loss_real": on_real.detach()}

    def update_g():
        z = prior(args.batch_size)
        with autocast():
            fake = g(z)
            code = d.encoder(fake)
            x_rec = d.decoder(code)
        loss_fake = recon_loss(x_rec, fake)  # fake is the target too, and not detached
        loss, logs = loss_fake, {}
        if args.lambda_pt:
            pt = pulling_away_term(code)
            loss = loss + args.lambda_pt * pt
            logs["pt"] = pt.detach()
        opt_g.zero_grad()
        loss.backward(inputs=list(g.parameters()))  # through D, which keeps none
        opt_g.step()
        t.add_(1)
        update_ema(g_ema, g, ((1 + t) / (10 + t)).clamp(max=args.ema_decay))
        logs |= {"loss_g": loss.detach(), "loss_fake": loss_fake.detach()}
        return logs | balance(loss_fake.detach().to(k.dtype))

    def balance(loss_fake):
        both = torch.stack([loss_real, loss_fake])
        if dist.is_available() and dist.is_initialized():  # one k of all processes
            dist.all_reduce(both)
            both /= dist.get_world_size()
        k.copy_(update_k(k, *both, args.gamma, args.lambda_k))
        m = convergence_measure(*both, args.gamma)
        m_mean.lerp_(m, (1 / t).clamp(min=0.01))  # over about the last 100 updates
        if args.stall_steps:
            look = t % args.stall_steps == 0
            m_sum.add_(m)
            found = after_look(m_sum / args.stall_steps, best, rate)
            for value, new in zip((best, rate), found):
                value.copy_(torch.where(look, new, value))
            m_sum.mul_(~look)
        return {"k": k.clone(), "convergence": m, "rate": rate.clone()}

    scalars = dict(k=k, loss_real=loss_real, m_mean=m_mean, m_sum=m_sum, best=best, rate=rate)
    return update_d, update_g, dict(opt_g=opt_g, opt_d=opt_d, t=t) | scalars


@torch.no_grad()
def reconstruct(nets, x):
    """Images [N, C, H, W] in [-1, 1] -> what D makes of them, cut to [-1, 1], on D's device."""
    d = nets["discriminator"]
    return d(x.to(next(d.parameters()).device)).clamp(-1, 1)


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

    some = torch.randint(len(train), (8,), generator=torch.Generator().manual_seed(args.seed))
    real = data.to_float(train.images[some]).to(device)

    def draw():
        fake = sample(nets, args, shown)
        sets = [real, reconstruct(nets, real), fake[:8], reconstruct(nets, fake[:8])]
        ends = [real[:4], real[:4].flip(3)]  # images and their mirror images, as in figure 4
        z_a, z_b = encode(nets, args, torch.cat(ends)).chunk(2)
        way = [sample(nets, args, between(z_a, z_b, i / 7)) for i in range(8)]
        return {
            "samples": fake,
            "reconstructions": torch.stack(sets, 1),
            "mirrored": torch.stack([ends[0], *way, ends[1]], 1),
        }

    def generate(n, rng):
        return sample(nets, args, latents(n, args, rng))

    of_images = scores.of_generator(generate, images, args)

    def score():
        left = residual(nets, args, real, encode(nets, args, real)).mean()
        return of_images() | {"convergence": float(state["m_mean"]), "residual": float(left)}

    with run.start(__file__, args, nets, state, draw, score) as r:
        update_d, update_g = (graphs.graph(u, device, args.graphs) for u in (update_d, update_g))
        while r.going():
            r.set_lr(learning_rate(args, r.fraction) * state["rate"])
            for _ in range(args.n_critic):
                losses = update_d(next(batches))
            r.after_step(losses | update_g())  # counts; when due: logs, draws, saves, scores
        return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    from common.cli import cli  # training needs the folder common/; importing this file does not

    cli(main, Args, __doc__)
