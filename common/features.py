"""Features of images, for Frechet distance, precision and recall.

    found = extract(u8, "auto")    # uint8 [M, C, H, W] -> float32 [M, d], on the CPU

Images come as uint8, real and generated alike, so that a number does not change when samples are
saved as PNG. auto is lenet for grey images and cifarnet for colour.

    lenet      grey,   32 px, d = 128; 99.60 % of MNIST's test images, 99.92 % of held-out digits
    cifarnet   colour, 32 px, d = 128; 90.61 % of CIFAR-10's test images
    inception  either, 299 px, d = 2048: the pool3 features of FID and KID, as in pytorch-fid
    vgg16      either, 224 px, d = 4096: torchvision's network, the second hidden layer after ReLU;
               that of Kynkaanniemi et al. is another export, so numbers differ from theirs

lenet and cifarnet are classifiers whose last hidden layer is taken before its ReLU: that is nearer
to the Gaussian that the Frechet distance fits, and no unit is silent. A BatchNorm without scale
and shift stands there, so every feature has mean 0 and variance 1 over the images of its training
and none drowns the others. No label smoothing in training, which would pull each class to a point
and leave recall nothing to see. Their weights come along; common/weights has the training.

inception and vgg16 need a file of weights: at the path in FILES, which --weights of common.evaluate
sets, or in torch's hub cache, else it is downloaded there once. Inception resizes as pytorch-fid
does, bilinear without antialiasing, from any size; vgg16 bilinear, antialiased. inception-bf16 and
vgg16-bf16 compute in bf16: other numbers, so they have other names.
"""
import functools
import hashlib
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common import files, terminal

WEIGHTS = Path(__file__).parent / "weights"
FILES = {}  # name: path of weights in place of the usual ones
MOST = 2**24  # values resized at a time, so that large images do not fill the memory
PIXELS = 1  # version of what happens to an image before the network
QUIET = 1.0  # seconds before there is a progress line


# ---- networks ----


def _conv(inputs, outputs, stride=1):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _projection(inputs, outputs, side):
    # a linear layer written as a convolution, which keeps full precision whatever the process has
    # chosen for its matrix products
    return [nn.Conv2d(inputs, outputs, side, bias=False), nn.BatchNorm2d(outputs, affine=False)]


class Lenet(nn.Module):
    """x [N, 1, 32, 32] in [-1, 1], digits padded to that with -1 -> logits [N, 10]."""

    channels, dim, size, batch = 1, 128, 32, 256
    resize = dict(mode="bicubic", antialias=True)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(1, 24), *_conv(24, 48, 2), *_conv(48, 64, 2), *_conv(64, 64), *_conv(64, 64, 2),
            *_projection(64, self.dim, 4),
        )
        self.head = nn.Linear(self.dim, 10)

    def features(self, x):
        return self.body(x).flatten(1)

    def logits(self, found):
        return self.head(F.relu(found))

    def forward(self, x):
        return self.logits(self.features(x))


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(*_conv(width, width), *_conv(width, width))

    def forward(self, x):
        return x + self.branch(x)


class Cifarnet(nn.Module):
    """x [N, 3, 32, 32] in [-1, 1] -> logits [N, 10]."""

    channels, dim, size, batch = 3, 128, 32, 256
    resize = dict(mode="bicubic", antialias=True)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(3, 32), *_conv(32, 32), *_conv(32, 64, 2), _Residual(64),
            *_conv(64, 128, 2), _Residual(128),
            nn.AvgPool2d(4), *_projection(128, self.dim, 2),  # 2 x 2 places: where still counts
        )
        self.head = nn.Linear(self.dim, 10)

    def features(self, x):
        return self.body(x).flatten(1)

    def logits(self, found):
        return self.head(F.relu(found))

    def forward(self, x):
        return self.logits(self.features(x))


class Inception(nn.Module):
    """x [N, 3, 299, 299] in [-1, 1] -> pool3 features [N, 2048], of the network that FID names.

    torchvision's layers under their names, with the pooling of TensorFlow's graph of 2015-12-05, as
    in pytorch-fid: averages over what is inside the image, and a maximum in the last block.
    """

    channels, dim, size, batch = 0, 2048, 299, 16
    resize = dict(mode="bilinear", align_corners=False)
    url = (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    )

    def __init__(self):
        super().__init__()
        from torchvision.models.inception import inception_v3  # here, as its import takes seconds

        net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        for name, layer in net.named_children():
            self.add_module(name, layer)

    def features(self, x):
        for name, layer in self.named_children():
            if name == "avgpool":
                return x.mean((2, 3))
            mixed = hasattr(layer, "branch_pool")
            x = _branches(layer, x, name == "Mixed_7c") if mixed else layer(x)

    def logits(self, found):
        """Of 1008 classes, without the bias, as the inception score is computed ever since."""
        return F.linear(found, self.fc.weight)


def _branches(block, x, maximum):
    """One of torchvision's blocks A, C or E, whose layers are named branch_place in their order."""
    outputs = []
    for branch, layers in itertools.groupby(block.named_children(), lambda c: c[0].split("_")[0]):
        h, ends = x, []
        for name, layer in layers:
            if name[-1] in "ab":  # two layers that read the same
                ends.append(layer(h))
            elif name != "branch_pool":
                h = layer(h)
            elif maximum:
                h = layer(F.max_pool2d(x, 3, 1, 1))
            else:  # a 1 x 1 convolution and an average may change places; it has fewer outputs
                h = F.relu(F.avg_pool2d(layer.conv(x), 3, 1, 1, count_include_pad=False))
        outputs += ends or [h]
    return torch.cat(outputs, 1)


class Vgg16(nn.Module):
    """x [N, 3, 224, 224] in [-1, 1] -> the second hidden layer [N, 4096] after its ReLU."""

    channels, dim, size, batch = 0, 4096, 224, 16
    resize = dict(mode="bilinear", antialias=True)
    url = "https://download.pytorch.org/models/vgg16-397923af.pth"

    def __init__(self):
        super().__init__()
        from torchvision.models.vgg import vgg16

        self.convolutions, _, self.classifier = vgg16(init_weights=False).children()

    def load_state_dict(self, state):
        renamed = {k.replace("features.", "convolutions."): v for k, v in state.items()}
        return super().load_state_dict(renamed)

    def features(self, x):
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        x = self.convolutions(((x + 1) / 2 - mean) / std)
        return self.classifier[:5](x.flatten(1))

    def logits(self, found):
        return self.classifier[6](found)


NETWORKS = {
    "lenet": Lenet, "cifarnet": Cifarnet, "inception": Inception, "vgg16": Vgg16,
    "inception-bf16": Inception, "vgg16-bf16": Vgg16,
}  # fmt: skip
NAMES = ("auto", *NETWORKS)


# ---- names and weights ----


def resolve(features, channels):
    """The network for images of so many channels: features itself, or what "auto" stands for.

    ValueError for an unknown name and for a network that takes other channels.
    """
    if features not in NAMES:
        raise ValueError(f"features is {features!r}; it can be {', '.join(NAMES)}")
    if channels not in (1, 3):
        raise ValueError(f"no features for images of {channels} channels; wanted 1 or 3")
    if features == "auto":
        return "lenet" if channels == 1 else "cifarnet"
    taken = NETWORKS[features].channels  # 0: either, grey is repeated
    if taken not in (0, channels):
        raise ValueError(f"{features} takes {taken}-channel images, got {channels} channels")
    return features


def weights_file(name):
    """Path of a network's weights, downloaded if absent; OSError where they cannot be."""
    name = name.removesuffix("-bf16")
    if name in FILES:
        return Path(FILES[name])
    url = getattr(NETWORKS[name], "url", None)
    if url is None:
        return WEIGHTS / f"{name}.pt"
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.exists():
        try:
            torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as e:
            raise OSError(
                f"the weights of {name} cannot be downloaded ({files.first_line(e)}): "
                f"put {url} into {path.parent} (common.evaluate takes --weights FILE too)"
            ) from e
    return path


@functools.cache
def _sha256(path):
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except OSError as e:
        raise OSError(f"{path}, weights of a network, cannot be read: {e.strerror}") from e


def version(name):
    """Short text that changes with the weights of a network and with what comes before it."""
    return f"{_sha256(weights_file(name))}-{PIXELS}"


def load(name, path):
    """The network with the weights in a file, ready for use."""
    net, state = NETWORKS[name](), files.load_tensors(path)
    try:
        net.load_state_dict(state)
    except (AttributeError, RuntimeError, TypeError) as e:
        reason = files.first_line(e)
        raise ValueError(f"{path} does not hold the weights of {name}: {reason}") from None
    net = _folded(net.eval().requires_grad_(False)).to(memory_format=torch.channels_last)
    return net.bfloat16() if name.endswith("-bf16") else net


@functools.cache
def _network(name, path, device):
    return load(name, path).to(device)


def _folded(net):
    """Every BatchNorm multiplied into the convolution before it, which saves a pass over memory."""
    for part in list(net.modules()):
        if hasattr(part, "conv") and hasattr(part, "bn"):  # torchvision's
            part.conv, part.bn = fuse_conv_bn_eval(part.conv, part.bn), nn.Identity()
        for i in range(len(part) - 1, 0, -1) if isinstance(part, nn.Sequential) else ():
            if isinstance(part[i], nn.BatchNorm2d):
                part[i - 1] = fuse_conv_bn_eval(part[i - 1], part[i])
                del part[i]
    return net


# ---- images -> features ----


def extract(images, features="auto", device="cpu", batch_size=None):
    """Features float32 [M, d], on the CPU, of images uint8 [M, C, H, W].

    Images of another size are resized; lenet pads those of 28 x 28. In fp32 but for names in -bf16,
    and each image by itself: neither its neighbours nor M change its features.
    """
    name = resolve(features, _channels(images))
    net = _network(name, weights_file(name), str(torch.device(device)))
    return extract_with(net, images, batch_size)


def logits(found, name):
    """Logits float32 [M, classes] of features [M, d] that extract has found with this network."""
    net = _network(name, weights_file(name), "cpu")
    dtype = next(net.parameters()).dtype
    return torch.cat([net.logits(x.to(dtype)).float() for x in found.split(4096)])


def _channels(images):
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        got = getattr(images, "dtype", type(images).__name__), list(getattr(images, "shape", []))
        raise ValueError(f"wanted images as uint8 [M, C, H, W], got {got[0]} {got[1]}")
    if 0 in images.shape[2:]:
        raise ValueError(f"images have no pixels: {list(images.shape)}")
    return images.shape[1]


def extract_with(net, images, batch_size=None):
    """extract with a network that load has returned, on its device; images of its channels."""
    batch_size = batch_size or net.batch
    weight, began = next(net.parameters()), time.monotonic()
    out = torch.empty(len(images), net.dim)
    # cuDNN would round to TF32 unasked, and its fastest algorithm need not be the same each time
    exact = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"
    )
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False), exact:
        for first in range(0, len(images), batch_size):
            x = _floats(images[first : first + batch_size].to(weight.device), net)
            n = len(x)
            # a short batch is filled up: other sizes may take other kernels, which round otherwise
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, batch_size - n))
            x = x.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            out[first : first + n] = net.features(x)[:n].float().cpu()
            if time.monotonic() - began > QUIET:
                terminal.progress(f"features of {first + n}/{len(images)} images")
    return out


def _floats(images, net):
    """uint8 [N, C, H, W] -> float32 in [-1, 1] with the size and the channels that net sees."""
    size = (net.size, net.size)
    if net.channels == 1 and images.shape[2:] == (28, 28):  # as the data do it
        images = F.pad(images, (2, 2, 2, 2))
    if images.shape[2:] != size:
        parts = images.split(max(1, MOST // images[0].numel()))
        # beside an edge, bicubic overshoots
        x = torch.cat([F.interpolate(x.float(), size, **net.resize).clamp_(0, 255) for x in parts])
    else:
        x = images.float()
    x = x.div_(127.5).sub_(1)
    return x.expand(-1, 3, -1, -1) if net.channels == 0 else x
