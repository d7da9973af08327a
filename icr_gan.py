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
         span [0, 1], so the paper's weights do not carry over; 2. T moves by 1/32 of the image,
         where the paper moves by 4 pixels of 32, and mirrors no digits; 3. sigma is .05, in the
         paper's small models .03, and the distance of G's images is a mean over pixels, so that
         lambda_gen weighs the same at every size; 4. the terms see half of each batch: an update
         then costs 1.4 times one of LSGAN, with all of it 1.7 times; 5. G(z) and G(z + sigma n) are
         one batch to BatchNorm, else it tells them apart, and G is rewarded for that; 6. what
         lsgan.py differs in.
Reached  FID (lenet) 1.97 +- .13, 3 seeds, H100, LSGAN 3.29 +- .50:
         python icr_gan.py --dataset mnist --precision bf16
         In 3 minutes of one thread of a CPU (--threads 1 --max-minutes 3) 1.01 of LSGAN's
         distance (.93 to 1.10, 16 seeds), with --subset 2000 .69 (.59 to .81, 9), with --subset
         500 in 1.5 minutes .53 (.50 to .56, 9). bCR alone (--lambda-dis 0 --lambda-gen 0): .88
         (.80 to .98, 6), .56 (.50 to .63, 6), .43 (.36 to .52, 3).
Run      python icr_gan.py --sigma 0.05                    # built-in digits
         python icr_gan.py --dataset mnist --subset 500 --steps 6000
Use      from icr_gan import augment, consistency, icr_d_loss    # needs torch only
"""
import copy
from dataclasses import dataclass
from types import SimpleNamespace
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
    sigma: float = 0.05  # standard deviation of the step in latent space; 0 = no zCR
    lambda_real: float = 10.0  # weight of D(x) against D(T(x)); 0 = off
    lambda_fake: float = 10.0  # weight of D(G(z)) against D(T(G(z))); 0 = off
    lambda_dis: float = 5.0  # weight of D(G(z)) against D(G(z + sigma n)); 0 = off
    lambda_gen: float = 0.5  # weight of G(z) against G(z + sigma n), which G pushes apart; 0 = off
    consistency_share: float = 0.5  # share of each batch that the terms see, above 0; 1 = all
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
        if self.shift is None and self.resume is None:
            self.shift = max(1, self.image_size // 32)
        elif self.shift is not None and self.shift >= self.image_size:
            raise ValueError(f"shift must be below image_size, {self.image_size}, got {self.shift}")
        if not 0 < self.consistency_share <= 1:
            raise ValueError(f"consistency_share must be in (0, 1], got {self.consistency_share}")


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


def discriminator_loss(d_real, d_fake):
    """Least-squares loss of D. Scores [N], float32; each mean over N; scalar >= 0."""
    return 0.5 * (d_real - 1).square().mean() + 0.5 * d_fake.square().mean()


def generator_loss(d_fake):
    """Least-squares loss of G. Scores [N], float32; mean over N; scalar >= 0."""
    return 0.5 * (d_fake - 1).square().mean()


def consistency(a, b, weight):
    """weight * (a - b)^2, mean over all elements. Same shapes, float32; gradients to both."""
    return weight * (a - b).square().mean()


def icr_d_loss(d_out, lambda_real, lambda_fake, lambda_dis):
    """Loss of D with its consistency terms, algorithms 1 and 2 of the paper.

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


def fill_up(scores, first_is_real):
    """d_out of icr_d_loss from scores of N, N, and for each term of only the first of these images.

    scores: D(x), D(G(z)), then those of the terms, the first of them of real images or not. Where a
    term has not looked an image stands for itself, its difference is 0; so the mean over N is less
    than that over the images seen by their share.
    """
    d_real, d_fake, *terms = scores
    bases = [d_real if first_is_real and i == 0 else d_fake for i in range(len(terms))]
    terms = [torch.cat([term, base[len(term) :]]) for term, base in zip(terms, bases)]
    return torch.stack([d_real, d_fake, *terms])


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
    still = torch.zeros(2, n, dtype=torch.int64, device=device)
    flip = torch.rand(n, device=device) < 0.5 if mirror else still[0] > 0
    return flip, *(torch.randint_like(still, -args.shift, args.shift + 1) if args.shift else still)


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
    [N, channels, H, W] in [-1, 1] on the device of the networks. ops: where consistency,
    icr_d_loss and augment are looked up, this file if None.
    """
    ops = ops or SimpleNamespace(consistency=consistency, icr_d_loss=icr_d_loss, augment=augment)
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
    # without sigma the terms of zCR are 0 anyway
    lambda_dis, lambda_gen = ((args.sigma > 0) * w for w in (args.lambda_dis, args.lambda_gen))

    def generate(z, near):
        """G(z), and G(z + sigma n) of the first `near` of z, by the same statistics of one batch.

        In a batch of their own BatchNorm would tell the near ones, and G be paid for that.
        """
        moved = z[:near] + args.sigma * torch.randn_like(z[:near])
        return g(torch.cat([z, moved])).split([len(z), near])

    def update_d(real):
        z = torch.randn(len(real), args.z_dim, device=device)
        seen = max(1, round(args.consistency_share * len(real)))  # images, by the terms
        with autocast():
            with torch.no_grad():
                fake, near = (x.to(real.dtype) for x in generate(z, seen if lambda_dis else 0))
            sets = [real, fake]
            for images, weight in ((real, args.lambda_real), (fake, args.lambda_fake)):
                if weight:
                    sets.append(ops.augment(images[:seen], *draw_moves(seen, args, device)))
            sets += [near] if lambda_dis else []
            scores = d(torch.cat(sets)).split([len(x) for x in sets])  # one power iteration
        d_out = fill_up(scores, args.lambda_real)
        weights = [w * len(real) / seen for w in (args.lambda_real, args.lambda_fake, lambda_dis)]
        loss, terms = ops.icr_d_loss(d_out, *weights)
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        terms = torch.cat([terms[:1], terms[1:] * (len(real) / seen)])
        return {"loss_d": loss.detach()} | dict(zip(("lsgan", "real", "fake", "dis"), terms))

    def update_g():
        z = torch.randn(args.batch_size, args.z_dim, device=device)
        seen = max(1, round(args.consistency_share * len(z))) if lambda_gen else 0
        with autocast():
            fake, near = generate(z, seen)
            loss = generator_loss(d(fake))
        logs = {}
        if lambda_gen:
            gen = ops.consistency(fake[:seen].to(loss), near.to(loss), lambda_gen)
            logs["gen_ratio"] = gen.detach() / loss.detach().clamp(min=1e-6)
            loss = loss - gen
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
        r.warn_above("gen_ratio", 1, "lambda_gen outweighs G's other loss: lower it or sigma")
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
