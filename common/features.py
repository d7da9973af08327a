"""Features of images, for Frechet distance, precision and recall.

    found = extract(u8, "auto")    # uint8 [M, C, H, W] -> float32 [M, d], on the CPU

Images come as uint8, real and generated alike, so that a number does not change when samples are
saved as PNG. lenet is for grey images and cifarnet for colour; both see 32 x 32 pixels and have
d = 128. Each is a classifier whose last hidden layer is taken before its ReLU: that is nearer to
the Gaussian that the Frechet distance fits, and no unit is silent. A BatchNorm without scale and
shift stands there, so every feature has mean 0 and variance 1 over the images of its training and
none drowns the others. No label smoothing in training, which would pull each class to a point and
leave recall nothing to see.

    lenet      99.60 % of MNIST's test images, 99.92 % of held-out digits; 10,000 images in 1 to 2 s
    cifarnet   90.61 % of CIFAR-10's test images; 10,000 images in 6 to 10 s

Accuracies are those of the stored weights; seconds, of one thread of an x86 CPU, idle to busy. How
they were trained stands in common/weights/train_lenet.py and train_cifarnet.py.
"""
import functools
import hashlib
import io
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common import terminal

WEIGHTS = Path(__file__).parent / "weights"
SIZE = 32  # pixels that both networks see
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

    channels, dim = 1, 128

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(1, 24), *_conv(24, 48, 2), *_conv(48, 64, 2), *_conv(64, 64), *_conv(64, 64, 2),
            *_projection(64, self.dim, 4),
        )
        self.head = nn.Linear(self.dim, 10)

    def features(self, x):
        return self.body(x).flatten(1)

    def forward(self, x):
        return self.head(F.relu(self.features(x)))


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(*_conv(width, width), *_conv(width, width))

    def forward(self, x):
        return x + self.branch(x)


class Cifarnet(nn.Module):
    """x [N, 3, 32, 32] in [-1, 1] -> logits [N, 10]."""

    channels, dim = 3, 128

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

    def forward(self, x):
        return self.head(F.relu(self.features(x)))


NETWORKS = {  # name: (class, sha256 of its weights); inception and vgg16 have their place here
    "lenet": (Lenet, "8e9b8252874f3288993d486519f2ce69aa3155c8cc8dd251a490a8c1357df797"),
    "cifarnet": (Cifarnet, "2b4e21ec4b7f8e52816be063b67cc7fa9b9ddc6a51ebc9b69aac69719f56d449"),
}
NAMES = ("auto", *NETWORKS)


# ---- names ----


def resolve(features, channels):
    """The network for images of so many channels: features itself, or what "auto" stands for.

    ValueError for an unknown name and for a network that takes other channels.
    """
    if features not in NAMES:
        raise ValueError(f"features is {features!r}; it can be {', '.join(NAMES)}")
    taken = {name: net.channels for name, (net, _) in NETWORKS.items()}
    fit = [name for name in taken if taken[name] == channels]
    if features == "auto" and not fit:
        accepted = " or ".join(str(n) for n in sorted(set(taken.values())))
        raise ValueError(f"no features for images of {channels} channels; wanted {accepted}")
    if features != "auto" and features not in fit:
        n = taken[features]
        raise ValueError(f"{features} takes {n}-channel images, got {channels} channels")
    return fit[0] if features == "auto" else features


def version(name):
    """Short text that changes with the weights of a network and with what comes before it."""
    return f"{NETWORKS[name][1][:16]}-{PIXELS}"


# ---- images -> features ----


def extract(images, features="auto", device="cpu", batch_size=256):
    """Features float32 [M, d], on the CPU, of images uint8 [M, C, H, W].

    Sizes other than 32 x 32 are resized, bicubic and antialiased; grey 28 x 28 is padded. Always
    fp32, and each image by itself: neither its neighbours nor M change its features.
    """
    net = _network(resolve(features, _channels(images)), str(torch.device(device)))
    return _apply(net, net.features, images, net.dim, batch_size)


def classify(images, features="auto", device="cpu", batch_size=256):
    """Logits float32 [M, 10] of what the network was trained on; images as for extract."""
    net = _network(resolve(features, _channels(images)), str(torch.device(device)))
    return _apply(net, net, images, 10, batch_size)


def load(name, path=None, sha256=None):
    """The network with the weights in a file, ready for use; by default those of this project.

    ValueError where the bytes are not those with this sha256, OSError where there is no file.
    """
    net, recorded = NETWORKS[name]
    path = WEIGHTS / f"{name}.pt" if path is None else Path(path)
    try:
        content = path.read_bytes()
    except OSError as e:
        raise OSError(f"{path}, the weights of {name}, cannot be read: {e.strerror}") from e
    found = hashlib.sha256(content).hexdigest()
    if found != (sha256 or recorded):
        raise ValueError(
            f"{path} does not hold the weights of {name}: its sha256 is {found[:16]}..., "
            f"not {(sha256 or recorded)[:16]}..."
        )
    net = net()
    net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return _folded(net.eval().requires_grad_(False)).to(memory_format=torch.channels_last)


@functools.cache
def _network(name, device):
    return load(name).to(device)


def _folded(net):
    """Every BatchNorm multiplied into the convolution before it, which saves a pass over memory."""
    for part in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(part) - 1, 0, -1):
            if isinstance(part[i], nn.BatchNorm2d):
                part[i - 1] = fuse_conv_bn_eval(part[i - 1], part[i])
                del part[i]
    return net


def _channels(images):
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        got = getattr(images, "dtype", type(images).__name__), list(getattr(images, "shape", []))
        raise ValueError(f"wanted images as uint8 [M, C, H, W], got {got[0]} {got[1]}")
    if 0 in images.shape[2:]:
        raise ValueError(f"images have no pixels: {list(images.shape)}")
    return images.shape[1]


def _apply(net, function, images, dim, batch_size):
    device = next(net.parameters()).device
    out = torch.empty(len(images), dim)
    began = time.monotonic()
    # cuDNN would round to TF32 unasked, and its fastest algorithm need not be the same each time
    exact = torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"
    )
    with torch.autocast(device.type, enabled=False), exact:
        for first in range(0, len(images), batch_size):
            x = _floats(images[first : first + batch_size], device)
            n = len(x)
            # a short batch is filled up: other sizes may take other kernels, which round otherwise
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, batch_size - n))
            x = x.contiguous(memory_format=torch.channels_last)
            out[first : first + n] = function(x)[:n].cpu()
            if time.monotonic() - began > QUIET:
                terminal.progress(f"features of {first + n}/{len(images)} images")
    return out


def _floats(images, device):
    """uint8 [N, C, H, W] -> float32 [N, C, 32, 32] in [-1, 1]."""
    size = tuple(images.shape[2:])
    if images.shape[1] == 1 and size == (28, 28):  # as the data do it
        images = F.pad(images, (2, 2, 2, 2))
    elif size != (SIZE, SIZE):
        part = max(1, MOST // images[0].numel())
        return torch.cat([_resized(x.to(device)) for x in images.split(part)]).div_(127.5).sub_(1)
    return images.to(device).float().div_(127.5).sub_(1)


def _resized(images):
    x = F.interpolate(images.float(), (SIZE, SIZE), mode="bicubic", antialias=True)
    return x.clamp_(0, 255)  # beside an edge, bicubic overshoots
