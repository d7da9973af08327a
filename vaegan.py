"""VAE-GAN: an auto-encoder whose errors are measured in the features of a discriminator.

Paper    Larsen et al. 2015, Autoencoding beyond pixels using a learned similarity metric,
         arXiv:1512.09300.
Losses   z ~ q(z|x) = N(mu, exp(logvar)) of Enc(x); rec = Dec(z); prior = Dec(n), n ~ N(0, I);
         F = features of Dis, Dis(.) = its logits
         L_prior = E KL(q(z|x) || N(0, I))                 summed over dimensions
         L_llike = E 1/2 |F(x) - F(rec)|^2                 summed over features
         L_Enc = lambda_prior L_prior + lambda_llike L_llike
         L_Dec = gamma lambda_llike L_llike
                 + lambda_adv E[softplus(-Dis(rec)) + softplus(-Dis(prior))]
         L_Dis = E[softplus(-Dis(x)) + softplus(Dis(rec)) + softplus(Dis(prior))]
         Each trains the network of its name and no other: L_llike passes through Dis unfelt, and
         what Dis says of rec ends at Dec. lambda_pixel adds lambda_pixel E 1/2 |x - rec|^2 beside
         lambda_llike L_llike, in both places.
Differs  1. Dec's adversarial loss is the non-saturating one, the paper prints the minimax one;
         2. Dis has spectral norms (Miyato et al. 2018, arXiv:1802.05957) for BatchNorm, so x, rec
         and prior go through together and no statistics hide a difference between them; its head
         is free of it. F is the convolution that reaches 8 x 8 pixels, before its activation;
         3. a VAE with learned similarity (--lambda-adv 0) learns F along with Dec: Dis tells x from
         rec and prior, and Dec does not answer. The paper's Dis comes from a GAN trained before;
         4. the authors' code leaves Dis or Dec untrained while it is ahead of the other, and its
         runs on faces judge prior samples alone and weigh each side by half: the paper has none of
         that, nor has this; 5. lambda_llike is 10, not 1, as F of normed convolutions is small;
         6. Adam for RMSProp, its rate, and averages of Enc and Dec sampled and scored.
Near     AAE (arXiv:1511.05644): a discriminator of codes, not of images, replaces L_prior.
         VEEGAN (arXiv:1705.07761): Dis judges pairs of image and code, and what is reconstructed
         is the code of a generated image. VGH (arXiv:1802.06847): discriminators estimate the two
         ratios of densities that stand in L_prior and the likelihood.
Reached  FID (lenet) 9.11 +- .31, 3 seeds, H200: python vaegan.py --dataset mnist --precision bf16;
         test images come back with a mean squared error of .037 and a sharpness of 1.00 of theirs.
Run      python vaegan.py                                  # built-in digits
         python vaegan.py --lambda-pixel 1 --lambda-llike 0 --lambda-adv 0         # a VAE
         python vaegan.py --lambda-adv 0                   # a VAE with the learned similarity
Use      from vaegan import Args, build, encode, sample    # needs torch only

Commonly done wrong
    L_llike, or one sum of all losses, trains Dis too, whose features then shrink to a constant
    the adversarial loss trains Enc too, or gamma weighs L_llike for Enc as well
    L_llike averaged over features, with a gamma meant for their sum: nothing is reconstructed
    x and rec through BatchNorm in separate calls: F(x) and F(rec) lose what they differ by
    KL averaged over dimensions or summed over the batch; logvar read as the log of the deviation
    rec not judged by Dis; a minus between L_Dis's terms; a sigmoid before a loss of logits
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
    gamma: float = 0.01  # factor of both likelihoods in the decoder's loss, not in the encoder's
    lambda_llike: float = 10.0  # weight of the likelihood of the discriminator's features; 0 = off
    lambda_pixel: float = 0.0  # weight of the likelihood of pixels; 0 = off
    lambda_prior: float = 1.0  # weight of the divergence between codes and prior; 0 = off
    lambda_adv: float = 1.0  # weight of the decoder's adversarial loss; 0 = off
    kl_warmup: int = 0  # updates over which lambda_prior rises from 0; 0 = none
    # networks
    z_dim: int = 64  # length of the latent vector
    width: int = 16  # channels at the widest resolution; deeper layers double
    # optimisation
    steps: int | None = None  # generator updates [4000, or no limit with --max-minutes]
    max_minutes: float | None = None  # end after this much training time [no limit]
    batch_size: int = 32  # images per update
    lr: float = 3e-3  # Adam step size, all networks
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
        for name in ("gamma", "kl_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be zero or positive, got {getattr(self, name)}")
        if not (self.lambda_llike or self.lambda_pixel):
            raise ValueError(
                "lambda_llike and lambda_pixel are both 0, so nothing is reconstructed; "
                "a GAN of the same networks is lsgan.py --loss vanilla"
            )
        if not (self.gamma or self.lambda_adv):
            raise ValueError("gamma and lambda_adv are both 0, so the decoder learns nothing")


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


class Encoder(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] -> mu, logvar [N, z_dim], float32.

    Mean and log of the variance of q(z|x), a normal distribution with a diagonal covariance."""

    def __init__(self, z_dim=64, channels=1, image_size=32, width=16):
        super().__init__()
        downs = image_size.bit_length() - 3
        dims = [channels] + [width * 2**i for i in range(downs)]
        blocks = []
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [nn.Conv2d(d_in, d_out, 4, 2, 1, bias=False)]
            blocks += [nn.BatchNorm2d(d_out), nn.ReLU()]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(dims[-1] * 16, 2 * z_dim)

    def forward(self, x):
        h = self.body(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # logvar is exponentiated
            return self.head(h.to(self.head.bias.dtype)).chunk(2, 1)


class SNConv2d(nn.Conv2d):
    """Convolution for spectral_norm, whose power iteration autocast must not take in bf16."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Discriminator(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] -> scores [N], unbounded, float32.

    The features are what the convolution that reaches 8 x 8 pixels gives, before its activation:
    [N, 2 width, 8, 8] at 32 pixels, [N, 4 width, 8, 8] at 64.
    No layer couples the images of a batch, so sets may share one call."""

    def __init__(self, channels=1, image_size=32, width=16):
        super().__init__()
        downs = image_size.bit_length() - 3
        dims = [channels] + [width * 2**i for i in range(downs)]
        blocks = []
        for d_in, d_out in zip(dims, dims[1:]):
            blocks += [spectral_norm(SNConv2d(d_in, d_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
        cut = max(2 * downs - 3, 1)
        self.features = nn.Sequential(*blocks[:cut])
        self.body = nn.Sequential(*blocks[cut:])
        self.head = nn.Linear(dims[-1] * 16, 1)  # free, as logits need a scale of their own

    def score(self, features):
        h = self.body(features).flatten(1)
        with torch.autocast(h.device.type, enabled=False):  # bf16 has 8 bits, too few for scores
            return self.head(h.to(self.head.bias.dtype)).squeeze(1)

    def forward(self, x):
        return self.score(self.features(x))


# ---- losses: tensors in, scalar out, no state ----------------------------------------------


def reparameterize(mu, logvar):
    """A draw from N(mu, exp(logvar)), both [N, z_dim]; gradients reach both."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def prior_loss(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)), [N, z_dim] each, float32; sum over z_dim, mean over N."""
    return 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(1).mean()


def llike_loss(h_rec, h_real):
    """-log N(h_real; h_rec, I) without its constant: half the squared error.

    Features or images [N, ...], float32; sum over all of a sample, mean over N; scalar >= 0.
    """
    return 0.5 * (h_rec - h_real).square().flatten(1).sum(1).mean()


def dis_loss(d_real, d_rec, d_prior):
    """Cross-entropies of Dis. Logits [N] each, float32; means over N, summed; scalar >= 0."""
    return F.softplus(-d_real).mean() + F.softplus(d_rec).mean() + F.softplus(d_prior).mean()


def dec_adv_loss(d_rec, d_prior):
    """Non-saturating loss of Dec. Logits [N] each, float32; means over N, summed; scalar >= 0."""
    return F.softplus(-d_rec).mean() + F.softplus(-d_prior).mean()


# ---- what is measured of images -----------------------------------------------------------------


def sharpness(x):
    """Mean square of the Laplacian of images [N, C, H, W], without their border; 0-d.

    Blur lowers it and noise raises it; the mean slope would not do, which a blurred edge keeps.
    """
    inner = x[..., 1:-1, 1:-1]
    sides = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return (sides - 4 * inner).square().mean()


# ---- assembly --------------------------------------------------------------------------------


def build(args):
    """Networks on args.device: encoder, generator, discriminator, and the averages sampled."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else args.device.replace("auto", "cpu")
    channels = args.channels or 1
    e = Encoder(args.z_dim, channels, args.image_size, args.width)
    g = Generator(args.z_dim, channels, args.image_size, args.width)
    d = Discriminator(channels, args.image_size, args.width)
    nets = dict(encoder=e, generator=g, discriminator=d)
    for name in ("encoder", "generator"):
        nets[f"{name}_ema"] = copy.deepcopy(nets[name]).eval().requires_grad_(False)
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


def latents(n, args, generator=None):
    """z [n, z_dim] from the prior N(0, I), on the CPU."""
    return torch.randn(n, args.z_dim, generator=generator)


@torch.no_grad()
def sample(nets, args, z):
    """z [N, z_dim] -> images [N, channels, H, W] in [-1, 1], float32, from the averaged weights."""
    g = nets["generator_ema"]
    return g(z.to(next(g.parameters()).device))


@torch.no_grad()
def encode(nets, args, x):
    """Images [N, channels, H, W] in [-1, 1] -> means of q(z|x) [N, z_dim], averaged weights."""
    e = nets["encoder_ema"]
    return e(x.to(next(e.parameters()).device))[0]


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
    """update(real) and state: what a checkpoint needs besides the networks.

    The update ends in a step of every optimiser and returns the 0-d tensors to log. real is float32
    [N, channels, H, W] in [-1, 1] on the device of the networks.
    """
    enc, g, d = nets["encoder"], nets["generator"], nets["discriminator"]
    device = next(g.parameters()).device

    def adam(net):
        lr = torch.tensor(args.lr, device=device)  # a tensor: a captured update sees its changes
        betas, capturable = (args.beta1, args.beta2), device.type == "cuda"
        return torch.optim.Adam(net.parameters(), lr, betas, fused=True, capturable=capturable)

    def autocast():
        on = args.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    opt_e, opt_g, opt_d = adam(enc), adam(g), adam(d)
    t = torch.zeros((), device=device)
    adversary = args.lambda_adv or args.lambda_llike  # features want a trained Dis as well

    def update(real):
        with autocast():
            mu, logvar = enc(real)
            z = reparameterize(mu, logvar)
            if adversary:
                z = torch.cat([z, torch.randn_like(z)])
            fake = g(z).to(real.dtype)
            if adversary:
                h = d.features(torch.cat([real, fake]))  # one call: one power iteration
                d_real, d_rec, d_prior = d.score(h).chunk(3)

        logs, llike = {}, 0
        if args.lambda_llike:
            h_real, h_rec, _ = h.to(real.dtype).chunk(3)
            logs["llike"] = llike_loss(h_rec, h_real)
            llike = llike + args.lambda_llike * logs["llike"]
        if args.lambda_pixel:
            logs["pixel"] = llike_loss(fake[: len(real)], real)
            llike = llike + args.lambda_pixel * logs["pixel"]
        loss_e, loss_g = llike, args.gamma * llike if args.gamma else 0
        if args.lambda_prior:
            logs["prior"] = prior_loss(mu, logvar)
            weight = (t / args.kl_warmup).clamp(max=1) if args.kl_warmup else 1
            loss_e = loss_e + args.lambda_prior * weight * logs["prior"]
        if args.lambda_adv:
            logs["adv"] = dec_adv_loss(d_rec, d_prior)
            loss_g = loss_g + args.lambda_adv * logs["adv"]
        todo = [(opt_e, enc, loss_e), (opt_g, g, loss_g)]
        if adversary:
            todo.append((opt_d, d, dis_loss(d_real, d_rec, d_prior)))

        for opt, net, loss in todo:  # of its own network alone, all at the weights of the forward
            opt.zero_grad()
            loss.backward(inputs=list(net.parameters()), retain_graph=True)
        for opt, _, _ in todo:
            opt.step()
        t.add_(1)
        decay = ((1 + t) / (10 + t)).clamp(max=args.ema_decay)
        update_ema(nets["encoder_ema"], enc, decay)
        update_ema(nets["generator_ema"], g, decay)
        names = ("loss_e", "loss_g", "loss_d")
        logs |= {name: loss for name, (_, _, loss) in zip(names, todo)}
        return {name: value.detach() for name, value in logs.items()}

    return update, dict(opt_e=opt_e, opt_g=opt_g, opt_d=opt_d, t=t)


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
    update, state = updates(nets, processes.share(args))  # its share of a batch
    train = data.subset(images, args.subset)
    batches = state["batches"] = data.Batches(train, args.batch_size, args.seed, device)
    shown = latents(64, args, torch.Generator().manual_seed(args.seed))
    held = (images.test or images).images  # not trained on, where a set has any such
    held = held[scores.drawn_rows(len(held), args.eval_samples)]
    scores.checked_features(args.features, args.channels, {"images to encode": len(held)})

    def reconstruct(x):
        return sample(nets, args, encode(nets, args, x)).cpu()

    def draw():
        x = data.to_float(held[torch.arange(32) % len(held)])
        pairs = torch.stack([x, reconstruct(x)], 1).unflatten(0, (-1, 4)).flatten(1, 2)
        first, last = x[:8], torch.cat([x[8:12], x[4:8].flip(3)])  # other images, mirror images
        z_a, z_b = encode(nets, args, torch.cat([first, last])).chunk(2)
        way = [sample(nets, args, between(z_a, z_b, i / 7)).cpu() for i in range(8)]
        return {
            "samples": sample(nets, args, shown),
            "reconstructions": pairs,
            "interpolations": torch.stack([first, *way, last], 1),
        }

    def generate(n, rng):
        return sample(nets, args, latents(n, args, rng))

    score_samples = scores.of_generator(generate, images, args)

    def score():
        row, found, error = score_samples(), [], 0.0
        for part in held.split(500):
            x = data.to_float(part)
            y = reconstruct(x)
            found.append(data.to_uint8(y))
            error += (y - x).square().mean().item() * len(part) / len(held)
        rec, few = torch.cat(found), held[:1000]
        real = sharpness(data.to_float(few))
        drawn = generate(len(few), torch.Generator().manual_seed(args.seed)).cpu()
        return row | {
            "rec_error": error,  # mean squared error of a pixel in [-1, 1]
            "rec_fid": scores.distances(rec, held, args.features, device)["fid"],
            "sharpness": (sharpness(drawn) / real).item(),
            "rec_sharpness": (sharpness(data.to_float(rec[:1000])) / real).item(),
        }

    with run.start(__file__, args, nets, state, draw, score) as r:
        update = graphs.graph(update, device, args.graphs)
        while r.going():
            r.set_lr(learning_rate(args, r.fraction))
            r.after_step(update(next(batches)))  # counts; when due: logs, draws, saves, scores
        return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    from common.cli import cli  # training needs the folder common/; importing this file does not

    cli(main, Args, __doc__)
