"""EBGAN: D is an auto-encoder, and its reconstruction error an energy, low for real images.

Paper    Zhao, Mathieu, LeCun 2016, Energy-based Generative Adversarial Network, arXiv:1609.03126.
Losses   E(v) = mean over pixels of (AE(v) - v)^2          AE: decoder of encoder, the network D
         L_D = E[E(x)] + E[max(0, margin - E(G(z)))]       a hinge for each sample
         L_G = E[E(G(z))] + lambda_pt PT
         PT = mean over i != j of cos(s_i, s_j)^2          s_i: encoder of G(z_i); batch of N
         The pulling-away term PT turns the codes of a batch away from each other, against collapse:
         EBGAN-PT; --lambda-pt 0 is EBGAN. At the paper's equilibrium L_D is the margin.
         --warmup-steps: updates of D by E[E(x)] alone before step 1, so that G meets an
         auto-encoder that knows the data; they take training time and count as no steps.
Differs  1. The paper's energy is the norm |AE(v) - v|: a margin m is m^2 / d here, for images of d
         numbers, so 10 for MNIST .098, 20 for CelebA .033, 80 for LSUN .52; 2. its networks for
         MNIST are fully connected, those here convolutions, G that of lsgan.py, the encoder's
         spectrally normalised (Miyato et al. 2018, arXiv:1802.05957); 3. --margin-decay is from the
         paper's semi-supervised EBGAN-LN, and off; 4. the warm-up, which the paper has not; 5.
         Adam's rate and decays, the rate's fall to 0 and the average of G are as in lsgan.py.
Reached  FID (lenet) 5.83 +- .11, 3 seeds, H200: python ebgan.py --dataset mnist --precision bf16
Run      python ebgan.py                                   # built-in digits
         python ebgan.py --dataset mnist --lambda-pt 0
Use      from ebgan import energy, pulling_away_term       # needs torch only

Commonly done wrong, each with a test here:
- the hinge of a batch's mean energy, not of each sample's: one bad image hides a good one;
- generated images detached as the target in L_G, which loses half of its gradient;
- PT without the square, which rewards opposite codes; with the pairs i = i, 1 / (N - 1) more;
- PT with norms over the batch or of the whole tensor, on pixels, or by an update of its own;
- the paper's margin under a mean of squares: no energy gets there, and D never stops raising it;
- a margin that grows with the batch, although every loss is a mean over it.
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
    margin: float = 0.1  # energy below which D still raises that of a generated image
    margin_decay: float = 0.0  # last part of the run over which margin falls to 0; 0 = constant
    lambda_pt: float = 0.1  # weight of the pulling-away term in the loss of G; 0 = plain EBGAN
    warmup_steps: int = 200  # updates of D on real images alone before step 1
    code_dim: int = 64  # length of the auto-encoder's code, its bottleneck
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
        if not 0 <= self.margin_decay <= 1:
            raise ValueError(f"margin_decay must be in [0, 1], got {self.margin_decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be zero or positive, got {self.warmup_steps}")
        if self.code_dim < 1:
            raise ValueError(f"code_dim must be positive, got {self.code_dim}")
        if self.lambda_pt and self.batch_size == 1:
            raise ValueError("batch_size 1: lambda_pt compares images, each process needs two")


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


class AutoEncoder(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] -> their reconstructions, alike.

    encoder: images -> codes [N, code_dim], a bottleneck: without it D could copy anything.
    decoder: codes -> images. No layer couples the images of a batch, so sets may share one call."""

    def __init__(self, channels=1, image_size=32, width=16, code_dim=64):
        super().__init__()
        downs = image_size.bit_length() - 3
        dims = [channels] + [width * 2**i for i in range(downs)]
        down, up = [], []
        for d_in, d_out in zip(dims, dims[1:]):
            down += [spectral_norm(SNConv2d(d_in, d_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
            up = [nn.LeakyReLU(0.2), nn.ConvTranspose2d(d_out, d_in, 4, 2, 1)] + up
        deepest = dims[-1] * 16
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(deepest, code_dim))
        self.decoder = nn.Sequential(
            nn.Linear(code_dim, deepest), nn.Unflatten(1, (-1, 4, 4)), *up, nn.Tanh()
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


# ---- losses: tensors in, scalar out, no state, no randomness ---------------------------------


def at_least_float32(x):
    """x, bf16 as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def energy(x_rec, x):
    """Energy [N]: mean over C, H, W of (x_rec - x)^2, at least float32. Gradients to both."""
    return (at_least_float32(x_rec) - at_least_float32(x)).square().flatten(1).mean(1)


def discriminator_loss(e_real, e_fake, margin):
    """Loss of D, eq. 1. Energies [N]; a hinge for each sample, then means over N; scalar >= 0."""
    return e_real.mean() + F.relu(margin - e_fake).mean()


def generator_loss(e_fake):
    """Loss of G without the pulling-away term, eq. 2. Energies [N]; mean over N; scalar >= 0."""
    return e_fake.mean()


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
    d = AutoEncoder(channels, args.image_size, args.width, args.code_dim)
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
    margin, warmed = torch.tensor(args.margin, device=device), torch.zeros((), device=device)
    state = dict(opt_g=opt_g, opt_d=opt_d, t=t, margin=margin, warmed=warmed)

    def update_d(real):
        z = torch.randn(len(real), args.z_dim, device=device)
        with autocast():
            with torch.no_grad():
                fake = g(z).to(real.dtype)
            x = torch.cat([real, fake])
            x_rec = d(x)
        e_real, e_fake = energy(x_rec, x).chunk(2)
        loss = discriminator_loss(e_real, e_fake, margin)
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        logs = {"loss_d": loss, "energy_real": e_real.mean(), "energy_fake": e_fake.mean()}
        active = (e_fake < margin).float().mean()  # share of the hinges that teach D something
        return {name: value.detach() for name, value in logs.items()} | {"active": active}

    def update_g():
        z = torch.randn(args.batch_size, args.z_dim, device=device)
        with autocast():
            fake = g(z)
            code = d.encoder(fake)
            x_rec = d.decoder(code)
        loss = generator_loss(energy(x_rec, fake))  # fake is the target too, and not detached
        logs = {}
        if args.lambda_pt:
            pt = pulling_away_term(code)
            loss = loss + args.lambda_pt * pt
            logs["pt"] = pt.detach()
        opt_g.zero_grad()
        loss.backward(inputs=list(g.parameters()))  # through D, which keeps none
        opt_g.step()
        t.add_(1)
        update_ema(g_ema, g, ((1 + t) / (10 + t)).clamp(max=args.ema_decay))
        return {"loss_g": loss.detach()} | logs

    return update_d, update_g, state


def warm_up(nets, args, state):
    """warm(real): a step of D on E[E(x)] alone, counted in state["warmed"]. state: of updates."""
    d, opt_d = nets["discriminator"], state["opt_d"]

    def warm(real):
        on = args.precision == "bf16"
        with torch.autocast(real.device.type, torch.bfloat16, enabled=on, cache_enabled=False):
            x_rec = d(real)
        loss = energy(x_rec, real).mean()
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        state["warmed"].add_(1)
        return {"energy_real": loss.detach()}

    return warm


@torch.no_grad()
def reconstruct(nets, x):
    """Images [N, C, H, W] in [-1, 1] -> what D makes of them, alike, on the device of D."""
    d = nets["discriminator"].eval()  # in training each call moves the vectors of spectral_norm
    x_rec = d(x.to(next(d.parameters()).device))
    d.train()
    return x_rec


def learning_rate(args, done):
    """Step size when the share done of the run, in [0, 1], is behind: constant, then to 0."""
    return args.lr * min(1, (1 - done) / args.lr_decay) if args.lr_decay else args.lr


def margin_at(args, done):
    """The margin when the share done of the run, in [0, 1], is behind: constant, then to 0."""
    left = min(1, (1 - done) / args.margin_decay) if args.margin_decay else 1
    return args.margin * left


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
        return {"samples": fake, "reconstructions": torch.stack(sets, 1)}

    def generate(n, rng):
        return sample(nets, args, latents(n, args, rng))

    score = scores.of_generator(generate, images, args)
    with run.start(__file__, args, nets, state, draw, score) as r:
        update_d, update_g = (graphs.graph(u, device, args.graphs) for u in (update_d, update_g))
        warm = graphs.graph(warm_up(nets, args, state), device, args.graphs)
        for _ in range(int(state["warmed"]), args.warmup_steps):  # D alone, before step 1
            if not r.going():
                break
            warm(next(batches))
        while r.going():
            r.set_lr(learning_rate(args, r.fraction))
            state["margin"].fill_(margin_at(args, r.fraction))
            for _ in range(args.n_critic):
                losses = update_d(next(batches))
            r.after_step(losses | update_g())  # counts; when due: logs, draws, saves, scores
        return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    from common.cli import cli  # training needs the folder common/; importing this file does not

    cli(main, Args, __doc__)
