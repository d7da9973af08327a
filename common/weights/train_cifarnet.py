"""Trains cifarnet, the network behind the metrics of colour images, on CIFAR-10.

    python -m common.weights.train_cifarnet

reads DATA_DIR/cifar10-png where that folder is, else the named set cifar10.

15 epochs over 50,000 images, seed 0, one thread of a 2-core x86 CPU with bf16 units, 2193 s beside
other work, 1086 s of CPU time, 2026-11-25. The stored weights, which are rounded to fp16, get
90.61 % of the 10,000 test images.

Seed: as in train_lenet.py.
"""
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import data, features
from common.weights.train_lenet import arguments, finish, train

SHIFT = 4  # pixels


def augment(x, draw):
    """Each image moved by up to SHIFT pixels and, half of the time, mirrored; x [N, 3, 32, 32]."""
    n, _, _, size = x.shape
    x = F.pad(x, (SHIFT,) * 4, mode="reflect")
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=draw) + torch.arange(size)
    mirrored = torch.rand(n, 1, generator=draw) < 0.5
    right = torch.where(mirrored, right.flip(1), right)
    x = x.gather(2, down[:, None, :, None].expand(-1, 3, -1, x.shape[3]))
    return x.gather(3, right[:, None, None, :].expand(-1, 3, size, -1))


def main():
    a = arguments("cifarnet", epochs=15)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    folder = Path(a.data_dir) / "cifar10-png"
    name = folder if folder.is_dir() else "cifar10"
    cifar = data.load_images(name, a.data_dir, 32, 3, a.cache_dir)
    net = features.Cifarnet()
    began = time.monotonic()
    train(net, cifar.images, cifar.labels, augment, a.epochs, a.seed)
    finish("cifarnet", net, a.out, {"CIFAR-10 test images": cifar.test}, began)


if __name__ == "__main__":
    main()
