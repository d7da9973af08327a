"""pix2pix: paired image-to-image translation, a conditional GAN beside an L1 term.

Paper    Isola et al. 2016, Image-to-Image Translation with Conditional Adversarial Networks,
         arXiv:1611.07004.
Losses   L_D = 1/2 (E[-log D(a, b)] + E[-log(1 - D(a, G(a)))])       E over images and patches
         L_G = lambda_adv E[-log D(a, G(a))] + lambda_l1 E|b - G(a)|        a input, b target
Differs  1. Networks scale with image_size: 64 px, width 16 and patches of 34 px by default, where
         the paper has 256, 64 and 70; batches of 8 at a rate of 1e-3, its 1 to 10 at 2e-4, are for
         short runs, and pairs are only mirrored: enlarging them (--jitter) blurs 64 px; 2. the rate
         falls linearly to 0 over the last half, the paper's is constant; 3. an exponential average
         of G is sampled and scored, the paper has none; 4. at test BatchNorm uses running
         statistics, the paper those of the test batch; dropout stays on, as there; 5. D's loss is
         halved in the gradient too, in the original code only in the log.
Reached  Frechet distance (cifarnet) 4.48 +- .64 on 200 test pairs, seeds 0 to 2, H200, that of the
         input itself 42.8: python pix2pix.py --precision bf16
Run      python pix2pix.py                                 # built-in blueprints
         python pix2pix.py --dataset facades --direction BtoA --jitter
         python pix2pix.py --lambda-adv 0                  # L1 alone; --lambda-l1 0: the cGAN alone
Use      from pix2pix import Args, build, sample           # needs torch only

Commonly done wrong: D that never sees the input; input and target in another order for real than
for generated pairs; one of the two cropped or mirrored alone; dropout in the encoder, or nowhere in
a small network, or off at test; the sum in place of the mean in L1, or images in [0, 1], each of
which changes what a weight of 100 means; targets of a fixed shape in place of that of D's map;
batches of 1 with BatchNorm, and its running statistics at test.
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Args:
    # data
    dataset: str = "blueprints"  # blueprints (built in), facades or a folder of pairs
    data_dir: str = "data"  # where data sets lie; downloads go here
    cache_dir: str = "data/cache"  # decoded images and statistics of real images
    subset: int = 0  # train on only that many images, drawn with a fixed seed; 0 = all
    image_size: int = 64  # height and width in pixels, a power of two from 16 to 512
    channels_a: int = 0  # of A's images, filled in from the data
    channels_b: int = 0  # of B's images, filled in from the data
    direction: Literal["AtoB", "BtoA"] = "AtoB"  # from which images of a pair to which
    jitter: bool = False  # enlarge pairs by 286/256 and cut out a random square
    mirror: bool = True  # mirror half of the images, drawn at random
    # method
    lambda_adv: float = 1.0  # weight of the adversarial loss; 0 = L1 alone, without D
    lambda_l1: float = 100.0  # weight of the L1 distance to the target; 0 = the GAN alone
    condition: bool = True  # D sees the input beside the image
    # networks
    width: int = 16  # channels at the widest resolution; deeper layers double, up to 8 times
    skips: bool = True  # links of the U-Net; off = plain encoder and decoder
    norm: Literal["batch", "instance"] = "batch"  # normalisation in G and D
    patch_layers: int = 2  # size of D's patches: 0 to 5 for 1, 16, 34, 70, 142, 286 pixels
    # optimisation
    steps: int | None = None  # generator updates [4000, or no limit with --max-minutes]
    max_minutes: float | None = None  # end after this much training time [no limit]
    batch_size: int = 8  # pairs per update
    lr: float = 1e-3  # Adam step size, both networks
    lr_decay: float = 0.5  # last part of the run over which lr falls linearly to 0; 0 = constant
    beta1: float = 0.5  # Adam decay of the first moment
    beta2: float = 0.999  # Adam decay of the second moment
    ema_decay: float = 0.99  # decay of the averaged generator, per update
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
    eval_samples: int = 1000  # test pairs per evaluation, at most as many as there are
    features: Literal["auto", "lenet", "cifarnet", "inception"] = "auto"  # auto = by channels
    resume: str | None = None  # run folder to go on with
    quiet: bool = False  # no progress on the terminal

    def __post_init__(self):
        if self.steps is None and self.max_minutes is None and self.resume is None:
            self.steps = 4000
        if not self.lambda_adv and not self.lambda_l1:
            raise ValueError("lambda_adv and lambda_l1 are both 0: nothing is left to train on")
        if not 0 <= self.patch_layers <= 5:
            raise ValueError(f"patch_layers must be 0 to 5, got {self.patch_layers}")
        if self.image_size < 16:
            raise ValueError(f"image_size must be at least 16, got {self.image_size}")
        if self.patch_layers and self.image_size >> self.patch_layers < 3:
            what = f"patch_layers {self.patch_layers} with image_size {self.image_size}"
            raise ValueError(f"{what} leaves no map of scores: take fewer")
        if self.norm == "batch" and self.batch_size == 1:
            raise ValueError("batches of 1 have no statistics that hold at test: --norm instance")


# ---- networks ------------------------------------------------------------------------------


def norm_layer(norm, channels):
    """BatchNorm with scale and shift ("batch"), or InstanceNorm without ("instance")."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)


class UNetGenerator(nn.Module):
    """Images [N, in_channels, H, W] in [-1, 1] -> [N, out_channels, H, W] in [-1, 1].

    H and W are multiples of image_size, which halves to 1 x 1; skips=False leaves the encoder and
    decoder without the links between them. Dropout in the innermost layers is the only noise.
    """

    def __init__(
        self, in_channels, out_channels, image_size=64, width=16, norm="batch", skips=True
    ):
        super().__init__()
        levels = image_size.bit_length() - 1
        dims = [width * min(2**i, 8) for i in range(levels)]
        bias = norm != "batch"  # BatchNorm has a shift of its own
        self.skips, self.downs, self.ups = skips, nn.ModuleList(), nn.ModuleList()
        for i, (d_in, d_out) in enumerate(zip([in_channels] + dims, dims)):
            layers = [nn.LeakyReLU(0.2)] if i else []
            layers += [nn.Conv2d(d_in, d_out, 4, 2, 1, bias=bias)]
            if 0 < i < levels - 1:  # at 1 x 1 an image has no statistics of its own
                layers += [norm_layer(norm, d_out)]
            self.downs.append(nn.Sequential(*layers))
        for i in reversed(range(1, levels)):
            d_in = dims[i] * (2 if skips and i < levels - 1 else 1)
            layers = [nn.ReLU(), nn.ConvTranspose2d(d_in, dims[i - 1], 4, 2, 1, bias=bias)]
            layers += [norm_layer(norm, dims[i - 1])]
            if i > levels - 1 - min(3, levels - 2):
                layers += [nn.Dropout(0.5)]
            self.ups.append(nn.Sequential(*layers))
        self.to_image = nn.ConvTranspose2d(dims[0] * (2 if skips else 1), out_channels, 4, 2, 1)

    def forward(self, x):
        down = []
        for layer in self.downs:
            x = layer(x)
            down.append(x)
        for layer, skip in zip(self.ups, down[-2::-1]):
            x = layer(x)
            x = torch.cat([skip, x], 1) if self.skips else x
        return self.to_image(x.relu()).tanh()


class PatchDiscriminator(nn.Module):
    """Images [N, channels, H, W] in [-1, 1] -> scores [N, 1, h, w] of patches, unbounded, float32.

    n_layers halvings, then two convolutions of kernel 4 at that resolution: fields of 16, 34, 70
    pixels for 1, 2, 3; 0 judges single pixels. Isola et al. 2016, arXiv:1611.07004, section 6.1.2.
    """

    def __init__(self, channels, width, n_layers, norm="batch"):
        super().__init__()
        kernel, padding = (4, 1) if n_layers else (1, 0)
        strides = [2] * n_layers + [1] if n_layers else [1, 1]
        layers, d_in = [], channels
        for i, stride in enumerate(strides):
            d_out = width * min(2**i, 8)
            bias = not i or norm == "instance"
            layers += [nn.Conv2d(d_in, d_out, kernel, stride, padding, bias=bias)]
            layers += [norm_layer(norm, d_out)] if i else []
            layers += [nn.LeakyReLU(0.2)]
            d_in = d_out
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(d_in, 1, kernel, 1, padding)

    def forward(self, x):
        h = self.body(x)
        with torch.autocast(x.device.type, enabled=False):  # bf16 has 8 bits, too few for scores
            return self.head(h.to(self.head.bias.dtype))


# ---- losses: tensors in, scalar out, no state, no randomness ---------------------------------


def discriminator_loss(d_real, d_fake):
    """Half the cross-entropy of real against generated. Logits [N, 1, h, w]; each mean over all."""
    return 0.5 * (F.softplus(-d_real).mean() + F.softplus(d_fake).mean())


def generator_adv_loss(d_fake):
    """Non-saturating loss -E[log D(a, G(a))]. Logits [N, 1, h, w]; mean over all; scalar >= 0."""
    return F.softplus(-d_fake).mean()


def l1_loss(fake_b, real_b):
    """Mean absolute difference of two sets of images in [-1, 1], eq. 3 without its weight."""
    return (fake_b - real_b).abs().mean()


# ---- assembly --------------------------------------------------------------------------------


def ends(pair, args):
    """Pairs [N, CA + CB, H, W] -> input and target, in the direction of args."""
    a, b = pair.split((args.channels_a or 3, args.channels_b or 3), 1)
    return (a, b) if args.direction == "AtoB" else (b, a)


def build(args):
    """Networks on args.device: generator, discriminator, and generator_ema, the one sampled."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else args.device.replace("auto", "cpu")
    source, target = args.channels_a or 3, args.channels_b or 3
    if args.direction == "BtoA":
        source, target = target, source
    g = UNetGenerator(source, target, args.image_size, args.width, args.norm, args.skips)
    seen = source * args.condition + target
    d = PatchDiscriminator(seen, args.width, args.patch_layers, args.norm)
    for net in (g, d):
        net.apply(initialise)
    average = copy.deepcopy(g).eval().requires_grad_(False)
    nets = dict(generator=g, discriminator=d, generator_ema=average)
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


@torch.no_grad()
def initialise(layer):
    """Weights from N(0, .02^2), BatchNorm's scales from N(1, .02^2), biases 0.

    Isola et al. 2016, arXiv:1611.07004, section 6.2."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        layer.weight.normal_(1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0, 0.02)
        if layer.bias is not None:
            layer.bias.zero_()


def multiple(args):
    """Pixels of which height and width of sample's images are multiples."""
    return args.image_size


@torch.no_grad()
def sample(nets, args, x, dropout=True):
    """Inputs x [N, C, H, W] in [-1, 1] -> translations of that size from the averaged weights.

    dropout=True leaves on the noise of training, drawn from the device's default generator."""
    g = nets["generator_ema"]
    for layer in g.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(dropout)
    return g(x.to(next(g.parameters()).device))


def jittered(pair, enlarge=True, mirror=True):
    """Images [N, C, S, S] in [-1, 1], or pairs along C: each enlarged, cropped and mirrored as one.

    Isola et al. 2016, arXiv:1611.07004, section 6.2."""
    n, _, size, _ = pair.shape
    device, large = pair.device, round(size * 286 / 256)
    rows = columns = torch.arange(size, device=device).expand(n, size)
    if enlarge:
        pair = F.interpolate(pair, large, mode="bicubic").clamp(-1, 1)
        rows, columns = torch.randint(large - size + 1, (2, n, 1), device=device) + rows
    if mirror:
        columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns, columns.flip(1))
    image = torch.arange(n, device=device).view(n, 1, 1)
    return pair.movedim(1, -1)[image, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(-1, 1)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model, decay a 0-d tensor; buffers are copied."""
    for e, m in zip(ema.parameters(), model.parameters()):
        e.lerp_(m, 1 - decay)
    for e, m in zip(ema.buffers(), model.buffers()):
        e.copy_(m)


def updates(nets, args):
    """update(pair) and state: what a checkpoint needs besides the networks.

    The update makes one translation, a step of D on it, then a step of G against the new D, and
    returns the 0-d tensors to log, of which d_real and d_fake are D's mean probabilities. pair is
    float32 [N, A's channels + B's, H, W] in [-1, 1] on the device of the networks.
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

    def judge(a, b):
        with autocast():
            return d(torch.cat([a, b], 1) if args.condition else b)

    def update(pair):
        a, b = ends(jittered(pair, args.jitter, args.mirror), args)
        with autocast():
            fake = g(a)
        fake = fake.to(b.dtype)
        losses, loss_g = {}, 0
        if args.lambda_adv:
            d_real, d_fake = judge(a, b), judge(a, fake.detach())  # BatchNorm: a call for each set
            loss_d = discriminator_loss(d_real, d_fake)
            opt_d.zero_grad()
            loss_d.backward()
            opt_d.step()
            loss_adv = generator_adv_loss(judge(a, fake))
            loss_g = args.lambda_adv * loss_adv
            losses |= {"loss_d": loss_d, "loss_adv": loss_adv}
            losses |= {"d_real": d_real.sigmoid().mean(), "d_fake": d_fake.sigmoid().mean()}
        if args.lambda_l1:
            loss_l1 = l1_loss(fake, b)
            loss_g = loss_g + args.lambda_l1 * loss_l1
            losses |= {"loss_l1": loss_l1}
        opt_g.zero_grad()
        loss_g.backward(inputs=list(g.parameters()))  # through D, which keeps none
        opt_g.step()
        t.add_(1)
        update_ema(g_ema, g, ((1 + t) / (10 + t)).clamp(max=args.ema_decay))
        losses = {"loss_g": loss_g} | losses | {"lr": opt_g.param_groups[0]["lr"].clone()}
        return {name: loss.detach() for name, loss in losses.items()}

    return update, dict(opt_g=opt_g, opt_d=opt_d, t=t)


def learning_rate(args, done):
    """Step size when the share done of the run, in [0, 1], is behind: constant, then to 0."""
    return args.lr * min(1, (1 - done) / args.lr_decay) if args.lr_decay else args.lr


def main(args):
    """Train as args say; returns the run folder (pathlib.Path)."""
    from common import data, graphs, processes, run, scores  # borrowed: see lsgan.py

    device = run.setup(args)  # checks, processes, precision, threads, seed
    pairs = data.load_pairs(args.dataset, args.data_dir, args.image_size, args.cache_dir)
    if pairs.test is None:
        raise ValueError(f"{args.dataset} has no pairs in a folder test, which scores are made on")
    for given, found in zip((args.channels_a, args.channels_b), pairs.channels):
        if given not in (0, found):
            raise ValueError(f"channels given as {given}, but {args.dataset} has {pairs.channels}")
    args.channels_a, args.channels_b = pairs.channels
    nets = build(args)
    update, state = updates(nets, processes.share(args))  # its share of a batch
    train = data.subset(pairs, args.subset)
    batches = state["batches"] = data.Batches(train, args.batch_size, args.seed, device)
    source, target = ends(data.to_float(pairs.test.images[: args.eval_samples]), args)
    seen = train.images[: args.eval_samples]
    numbers = {"pairs to test on": len(target), "pairs to train on": len(seen)}
    feature_name = scores.checked_features(args.features, target.shape[1], numbers)
    baselines = {}

    def translate(x):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed)  # the same noise each time, and none of training's
            return torch.cat([sample(nets, args, part).cpu() for part in x.split(64)])

    def coloured(x, channels=3):
        return x if x.shape[1] == channels else x.mean(1, True).expand(-1, channels, -1, -1)

    def draw():
        rows = source[:8], translate(source[:8]), target[:8]
        return {"samples": torch.stack([coloured(x) for x in rows], 1)}

    def distances(images):
        both = data.to_uint8(images), data.to_uint8(target)
        return scores.distances(*both, feature_name, device)

    def compare(images):
        errors = dict(l1=l1_loss(images, target).item(), psnr=scores.psnr(images, target))
        return distances(images) | errors | dict(ssim=scores.ssim(images, target))

    def score():
        if not baselines:
            known = ends(data.to_float(seen), args)[1]
            baselines["input"] = compare(coloured(source, target.shape[1]))
            baselines["mean of training"] = compare(known.mean(0).expand_as(target))
            baselines["training images"] = distances(known)
        row = {"n": len(target), "features": feature_name} | compare(translate(source))
        return row | {"baselines": baselines}

    with run.start(__file__, args, nets, state, draw, score) as r:
        advice = "D has won, G learns from L1 alone: more pairs, fewer patch_layers or a lower lr"
        r.warn_below("loss_d", 0.01, advice)
        update = graphs.graph(update, device, args.graphs)
        while r.going():
            r.set_lr(learning_rate(args, r.fraction))
            r.after_step(update(next(batches)))  # counts; when due: logs, draws, saves, scores
        return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    from common.cli import cli  # training needs the folder common/; importing this file does not

    cli(main, Args, __doc__)
