"""CycleGAN: translation between two sets of images of which no two belong together.

Paper    Zhu et al. 2017, Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
         Networks, arXiv:1703.10593.
Losses   Generators G: A -> B, F: B -> A; least squares (Mao et al. 2016, arXiv:1611.04076) on
         the maps of scores of D_A and D_B, D_A judging images of domain A; means everywhere:
         L_D  = 1/2 E[(D_B(b) - 1)^2] + 1/2 E[D_B(pool(G(a)))^2], and the same of D_A and F(b)
         L_GF = E[(D_B(G(a)) - 1)^2] + E[(D_A(F(b)) - 1)^2]
                + lambda_cycle E|F(G(a)) - a| + lambda_cycle_b E|G(F(b)) - b|
                + lambda_identity (E|G(b) - b| + E|F(a) - a|)
Differs  1. A generator adds what it finds to its input (--skip off: not). InstanceNorm after the
         first convolution takes away the mean colour of an image, which the paper's generators can
         only guess; what leaves [-1, 1] is cut, and a pixel there has no gradient; 2. maps are
         enlarged by kernels of 4, which cover all pixels evenly; the paper's of 3 do not, and leave
         checkerboards; 3. networks, the batch and the rate are those found for 64 pixels and
         minutes, at which D's patches of 70 pixels, the paper's, are wider than the image; 4. an
         exponential average of both generators is sampled and scored, in the paper they themselves;
         5. the identity's weight is absolute, 5; the paper's is relative, .5 of 10, and on for
         paintings alone.
Reached  stripes, 1,400 updates (200 s of one thread of a CPU to itself), seeds 0 to 2: Frechet
         distance (cifarnet) 10.7 +- .5 from A and 16.0 +- 2.3 from B (the input itself 55.3, other
         real images 1.8 and 1.3); error against the true counterpart .084 and .049 (the input .071
         and .072), as stripes look right and lie wrong:
         python cyclegan.py --precision bf16 --threads 1
Run      python cyclegan.py                                # built-in stripes
         python cyclegan.py --dataset horse2zebra
Use      from cyclegan import Args, build, sample          # needs torch only

Commonly done wrong: the way from A to B to A detached in its middle, which leaves G without half of
its cycle's gradient; images put into the pool with their graph, or as a view of a batch that is
overwritten later; the pool's random numbers outside the checkpoint; reflection by as many pixels as
there are channels, which shrinks grey images; a sigmoid, or a mean over the map, before the square;
the two sets read side by side in one order, so that each image only ever meets the same other.
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
    dataset: str = "stripes"  # stripes (built in), horse2zebra or a folder with trainA, trainB
    data_dir: str = "data"  # where data sets lie; downloads go here
    cache_dir: str = "data/cache"  # decoded images and statistics of real images
    subset: int = 0  # train on only that many images, drawn with a fixed seed; 0 = all
    image_size: int = 64  # height and width in pixels, a power of two from 8 to 512
    channels: int = 0  # 0 = as the data, 1 = grey, 3 = colour
    jitter: bool = True  # enlarge images by 286/256 and cut out a random square
    mirror: bool = True  # mirror half of the images, drawn at random
    # method
    lambda_cycle: float = 10.0  # weight of A to B to A giving the image back
    lambda_cycle_b: float | None = None  # weight of B to A to B [as lambda_cycle]
    lambda_identity: float = 5.0  # weight of leaving images alone that are in the domain already
    pool_size: int = 50  # generated images kept per domain to train D on; 0 = the newest only
    # networks
    n_blocks: int = 3  # residual blocks of a generator
    width: int = 16  # channels at the widest resolution; deeper layers double
    patch_layers: int = 3  # size of D's patches: 0 to 5 for 1, 16, 34, 70, 142, 286 pixels
    paper_upsampling: bool = False  # kernels of 3 where maps are enlarged, uneven as in the paper
    skip: bool = True  # a generator adds what it finds to its input; off as in the paper
    # optimisation
    steps: int | None = None  # generator updates [1400, or no limit with --max-minutes]
    max_minutes: float | None = None  # end after this much training time [no limit]
    batch_size: int = 2  # images of each domain per update
    lr: float = 5e-4  # Adam step size, all networks
    lr_decay: float = 0.5  # last part of the run over which lr falls linearly to 0; 0 = constant
    beta1: float = 0.5  # Adam decay of the first moment
    beta2: float = 0.999  # Adam decay of the second moment
    ema_decay: float = 0.99  # decay of the averaged generators, per update
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
    eval_samples: int = 1000  # test images of each domain per evaluation, if there are as many
    features: Literal["auto", "lenet", "cifarnet", "inception"] = "auto"  # auto = by channels
    resume: str | None = None  # run folder to go on with
    quiet: bool = False  # no progress on the terminal

    def __post_init__(self):
        if self.steps is None and self.max_minutes is None and self.resume is None:
            self.steps = 1400
        if self.lambda_cycle_b is None and self.resume is None:
            self.lambda_cycle_b = self.lambda_cycle
        if not 0 <= self.patch_layers <= 5:
            raise ValueError(f"patch_layers must be 0 to 5, got {self.patch_layers}")
        if self.patch_layers and self.image_size >> self.patch_layers < 3:
            what = f"patch_layers {self.patch_layers} with image_size {self.image_size}"
            raise ValueError(f"{what} leaves no map of scores: take fewer")
        if self.n_blocks < 0 or self.pool_size < 0:
            raise ValueError("n_blocks and pool_size must be zero or positive")


# ---- networks ------------------------------------------------------------------------------


def norm_layer(norm, channels):
    """BatchNorm with scale and shift ("batch"), or InstanceNorm without ("instance")."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)


class ResidualBlock(nn.Module):
    """Maps [N, width, H, W] -> the same shape; nothing follows the sum."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x):
        return x + self.body(x)


class ResnetGenerator(nn.Module):
    """Images [N, channels, H, W] in [-1, 1] -> the same shape, range and dtype.

    H and W are multiples of 4, at least 8. Paper, section 7.2, which is skip=False and
    paper_upsampling=True. No layer couples the images of a batch. Biases before a norm change
    nothing; the paper's networks have them, and so its counts.
    """

    def __init__(self, channels=3, n_blocks=3, width=16, paper_upsampling=False, skip=True):
        super().__init__()
        self.skip = skip
        up = dict(kernel_size=4, stride=2, padding=1)
        if paper_upsampling:
            up = dict(kernel_size=3, stride=2, padding=1, output_padding=1)
        dims = [width, 2 * width, 4 * width]
        layers = [nn.Conv2d(channels, width, 7, padding=3, padding_mode="reflect")]
        for d_in, d_out in zip(dims, dims[1:]):
            layers += [nn.InstanceNorm2d(d_in), nn.ReLU(), nn.Conv2d(d_in, d_out, 3, 2, 1)]
        layers += [nn.InstanceNorm2d(dims[-1]), nn.ReLU()]
        layers += [ResidualBlock(dims[-1]) for _ in range(n_blocks)]
        for d_in, d_out in zip(dims[::-1], dims[-2::-1]):
            layers += [nn.ConvTranspose2d(d_in, d_out, **up), nn.InstanceNorm2d(d_out), nn.ReLU()]
        layers += [nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect")]
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        h = self.body(x).to(x.dtype)
        return F.hardtanh(x + h) if self.skip else h.tanh()


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
    """Half the least-squares loss of one D. Scores [N, 1, h, w], float32; each mean over all."""
    return 0.5 * ((d_real - 1).square().mean() + d_fake.square().mean())


def generator_adv_loss(d_fake):
    """Least-squares loss of one generator. Scores [N, 1, h, w], float32; mean over all."""
    return (d_fake - 1).square().mean()


def cycle_loss(rec, real):
    """Mean |rec - real|, eq. 2, unweighted. Images [N, C, H, W]; rec has been there and back."""
    return (rec - real).abs().mean()


def identity_loss(idt, real):
    """Mean |idt - real|, section 5.2, unweighted. Images [N, C, H, W]; idt is G(b) or F(a)."""
    return (idt - real).abs().mean()


# ---- assembly --------------------------------------------------------------------------------


class ImagePool:
    """Generated images of the past, some of which D sees instead of the newest.

    Shrivastava et al. 2016, arXiv:1612.07828, section 2.3. The first `size` images are stored and
    returned. After them an image is, with probability 1/2, returned and not stored; else it takes
    the place of a stored one, uniformly drawn, which is returned.
    """

    def __init__(self, size):
        self.size = size
        self.images = torch.empty(0)
        self.filled = torch.zeros((), dtype=torch.int64)

    def query(self, images):
        """[N, C, H, W] -> as many images without graph, as if they had come one by one."""
        images = images.detach()
        if not self.size:
            return images
        if not len(self.images):
            self.images = images.new_zeros(self.size, *images.shape[1:])
        self.images, self.filled = self.images.to(images.device), self.filled.to(images.device)
        drawn = torch.randint(2 * self.size, (len(images),), device=images.device)
        returned = []
        for image, slot in zip(images.split(1), drawn.split(1)):
            filling = self.filled < self.size
            stored = filling | (slot < self.size)  # half of the numbers are those of slots
            slot = torch.where(filling, self.filled, slot % self.size)
            old = self.images.index_select(0, slot)
            returned.append(torch.where(stored & ~filling, old, image))
            self.images.index_copy_(0, slot, torch.where(stored, image, old))
            self.filled += filling
        return torch.cat(returned)

    def state_dict(self):
        return dict(images=self.images, filled=self.filled)

    def load_state_dict(self, state):
        self.images, self.filled = state["images"].clone(), state["filled"].clone()


@torch.no_grad()
def initialise(layer):
    """Weights from N(0, .02^2), BatchNorm's scales from N(1, .02^2), biases 0.

    Isola et al. 2016, arXiv:1611.07004, section 6.2."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
        layer.weight.normal_(1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0, 0.02)
        if layer.bias is not None:
            layer.bias.zero_()


def build(args):
    """Networks on args.device: generator and generator_ema, the one sampled, each with AtoB and

    BtoA; discriminator with A and B, each the judge of images of its own domain."""
    cuda = args.device == "auto" and torch.cuda.is_available()
    device = "cuda" if cuda else args.device.replace("auto", "cpu")
    channels = args.channels or 1

    paper = args.paper_upsampling, args.skip

    def generator():
        return ResnetGenerator(channels, args.n_blocks, args.width, *paper)

    def discriminator():
        return PatchDiscriminator(channels, args.width, args.patch_layers, "instance")

    g = nn.ModuleDict({"AtoB": generator(), "BtoA": generator()})
    d = nn.ModuleDict({"A": discriminator(), "B": discriminator()})
    for net in (g, d):
        net.apply(initialise)
    ema = copy.deepcopy(g).eval().requires_grad_(False)
    nets = dict(generator=g, discriminator=d, generator_ema=ema)
    return {name: net.to(device, memory_format=torch.channels_last) for name, net in nets.items()}


def multiple(args):
    """Height and width of an input are multiples of this."""
    return 4


@torch.no_grad()
def sample(nets, args, x, direction="AtoB"):
    """x [N, channels, H, W] in [-1, 1] -> its translation, by the averaged weights, in float32."""
    g = nets["generator_ema"][direction]
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
    """update(a, b) and state: what a checkpoint needs besides the networks.

    The update steps both generators, then both discriminators on what the generators had made
    before their step, and returns the 0-d tensors to log. a and b are float32 [N, channels, H, W]
    in [-1, 1] on the device of the networks, of domains A and B, and unrelated.
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
    pool_a, pool_b = ImagePool(args.pool_size), ImagePool(args.pool_size)

    def translate(net, x, there):
        """net's x, and of what is there already: in one call, as no layer couples images."""
        if not args.lambda_identity:
            return net(x), None
        return net(torch.cat([x, there])).chunk(2)

    def update(a, b):
        a, b = (jittered(x, args.jitter, args.mirror) for x in (a, b))
        with autocast():
            fake_b, same_b = translate(g["AtoB"], a, b)
            fake_a, same_a = translate(g["BtoA"], b, a)
            terms = [
                (1, "adv_a", generator_adv_loss(d["A"](fake_a))),
                (1, "adv_b", generator_adv_loss(d["B"](fake_b))),
            ]
            if args.lambda_cycle:
                terms += [(args.lambda_cycle, "cycle_a", cycle_loss(g["BtoA"](fake_b), a))]
            if args.lambda_cycle_b:
                terms += [(args.lambda_cycle_b, "cycle_b", cycle_loss(g["AtoB"](fake_a), b))]
            if args.lambda_identity:
                terms += [
                    (args.lambda_identity, "identity_a", identity_loss(same_a, a)),
                    (args.lambda_identity, "identity_b", identity_loss(same_b, b)),
                ]
            loss_g = sum(weight * term for weight, _, term in terms)
        opt_g.zero_grad()
        loss_g.backward(inputs=list(g.parameters()))  # through D, which keeps none
        opt_g.step()

        with autocast():
            d_real_a, d_fake_a = d["A"](torch.cat([a, pool_a.query(fake_a)])).chunk(2)
            d_real_b, d_fake_b = d["B"](torch.cat([b, pool_b.query(fake_b)])).chunk(2)
            loss_d_a = discriminator_loss(d_real_a, d_fake_a)
            loss_d_b = discriminator_loss(d_real_b, d_fake_b)
        opt_d.zero_grad()
        (loss_d_a + loss_d_b).backward()
        opt_d.step()

        t.add_(1)
        update_ema(g_ema, g, ((1 + t) / (10 + t)).clamp(max=args.ema_decay))
        losses = dict(loss_g=loss_g, loss_d_a=loss_d_a, loss_d_b=loss_d_b)
        losses |= {name: term for _, name, term in terms}
        scores = dict(d_real_a=d_real_a, d_fake_a=d_fake_a, d_real_b=d_real_b, d_fake_b=d_fake_b)
        losses |= {name: score.mean() for name, score in scores.items()}
        losses |= dict(lr=opt_g.param_groups[0]["lr"].clone())
        return {name: value.detach() for name, value in losses.items()}

    state = dict(opt_g=opt_g, opt_d=opt_d, t=t, pool_a=pool_a, pool_b=pool_b)
    return update, state


def learning_rate(args, done):
    """Step size when the share done of the run, in [0, 1], is behind: constant, then to 0."""
    return args.lr * min(1, (1 - done) / args.lr_decay) if args.lr_decay else args.lr


def main(args):
    """Train as args say; returns the run folder (pathlib.Path)."""
    from common import data, graphs, processes, run, scores  # borrowed: see lsgan.py

    device = run.setup(args)  # checks, processes, precision, threads, seed
    a, b = data.load_domains(args.dataset, args.data_dir, args.image_size, args.cache_dir)
    if a.test is None or b.test is None:
        raise ValueError(f"{args.dataset} has no testA and testB, which scores are made on")
    if args.channels not in (0, a.channels):
        raise ValueError(f"channels is {args.channels}; {args.dataset} has {a.channels}")
    args.channels = a.channels
    nets = build(args)
    update, state = updates(nets, processes.share(args))  # its share of a batch
    n, seen = args.eval_samples, []
    for domain, images in enumerate((a, b)):  # each in an order of its own
        train = data.subset(images, args.subset)
        batches = data.Batches(train, args.batch_size, args.seed, device, domain)
        state["batches_" + "ab"[domain]] = batches
        seen.insert(0, train.images[:n])  # in the order of ways
    test_a, test_b = (data.to_float(images.test.images[:n]) for images in (a, b))
    ways = ("AtoB", test_b, a.counterpart), ("BtoA", test_a, b.counterpart)
    numbers = {"testA": len(test_a), "testB": len(test_b)}
    numbers |= {"trainA": len(seen[1]), "trainB": len(seen[0])}
    feature_name = scores.checked_features(args.features, args.channels, numbers)
    baselines = {}

    def translate(x, direction):
        return torch.cat([sample(nets, args, part, direction).cpu() for part in x.split(64)])

    def there_and_back(x, direction):
        y = translate(x, direction)
        return y, translate(y, "BtoA" if direction == "AtoB" else "AtoB")

    def draw():
        from_a, from_b = (x[torch.arange(8) % len(x)] for x in (test_a, test_b))
        rows = [from_a, *there_and_back(from_a, "AtoB"), from_b, *there_and_back(from_b, "BtoA")]
        return {"samples": torch.stack(rows, 1)}

    def distances(*images):
        row = {}
        for x, (way, real, _) in zip(images, ways):
            both = data.to_uint8(x), data.to_uint8(real)
            found = scores.distances(*both, feature_name, device)
            row |= {f"{name}_{way}": value for name, value in found.items()}
        return row

    def errors(*images):
        row = {}
        for x, (way, _, true) in zip(images, ways):
            if true is not None:
                row[f"error_{way}"] = (x - data.to_float(true[:n])).abs().mean().item()
        return row

    def score():
        if not baselines:
            known = [data.to_float(images) for images in seen]
            mean = [x.mean(0).expand_as(real) for x, (_, real, _) in zip(known, ways)]
            baselines["input"] = distances(test_a, test_b) | errors(test_a, test_b)
            baselines["mean of training"] = distances(*mean) | errors(*mean)
            baselines["training images"] = distances(*known)
        fake_b, rec_a = there_and_back(test_a, "AtoB")
        fake_a, rec_b = there_and_back(test_b, "BtoA")
        row = {"n": min(len(test_a), len(test_b)), "features": feature_name}
        row |= distances(fake_b, fake_a) | errors(fake_b, fake_a)
        row |= {"cycle_a": cycle_loss(rec_a, test_a).item()}
        row |= {"cycle_b": cycle_loss(rec_b, test_b).item()}
        return row | {"baselines": baselines}

    with run.start(__file__, args, nets, state, draw, score) as r:
        advice = "D has won, its pull on G fades: more images, fewer patch_layers or a lower lr"
        r.warn_below("loss_d_a", 0.01, advice)
        r.warn_below("loss_d_b", 0.01, advice)
        update = graphs.graph(update, device, args.graphs)
        while r.going():
            r.set_lr(learning_rate(args, r.fraction))
            losses = update(next(state["batches_a"]), next(state["batches_b"]))
            r.after_step(losses)  # counts; when due: logs, draws, saves, scores
        return r.finish()  # final metrics and pictures, generator.pt


if __name__ == "__main__":
    from common.cli import cli  # training needs the folder common/; importing this file does not

    cli(main, Args, __doc__)
