"""Trains lenet, the network behind the metrics of grey images, on MNIST and the built-in digits.

    python -m common.weights.train_lenet

8 epochs over 60,000 and 20,000 images, seed 0, one thread of a 2-core x86 CPU with bf16 units,
285 s beside other work, 269 s of CPU time, 2026-11-25. The stored weights, which are
rounded to fp16, get 99.60 % of the 10,000 MNIST test images, 99.92 % of the 4,000 held-out digits.

The seed gives the same bits again only on the same kind of CPU and release of torch, 2.14.1 here.
"""
import argparse
import os
import time

import torch
import torch.nn.functional as F

from common import data, features, files, terminal

BATCH = 128
LR = 0.1  # at the top of its cycle
WEIGHT_DECAY = 5e-4


def train(net, images, labels, augment, epochs, seed):
    """Train in place, in bf16; images uint8 [M, C, 32, 32], augment(x, draw) on float batches."""
    net.train().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), LR, 0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, cycle_momentum=False)
    draw = torch.Generator().manual_seed(seed)
    step = correct = 0
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=draw)
        for chosen in order.split(BATCH)[: len(images) // BATCH]:
            x = augment(data.to_float(images[chosen]), draw)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            terminal.progress(f"epoch {epoch + 1}/{epochs}  step {step}/{steps}  loss {loss:.4f}")


def store(net, path):
    """Write the weights in fp16."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    files.save_tensors(path, state)


def accuracy(net, split):
    """Percent of a data.Images that the network, as features.load returns it, names rightly."""
    found = features.extract_with(net, split.images)
    return 100 * (net.logits(found).argmax(1) == split.labels).double().mean().item()


def arguments(name, epochs):
    p = argparse.ArgumentParser(prog=f"python -m common.weights.train_{name}")
    p.add_argument("--data-dir", default="data", help="where the data sets lie [data]")
    p.add_argument("--cache-dir", default="data/cache", help="of sets once made [data/cache]")
    p.add_argument("--epochs", type=int, default=epochs, help=f"[{epochs}]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument("--threads", type=int, default=1, help="of the CPU [1]")
    p.add_argument("--out", default=str(features.WEIGHTS / f"{name}.pt"), help="the file to write")
    return p.parse_args()


def finish(name, net, path, tests, began):
    """Store, and report on what was stored, not on what it was rounded from."""
    seconds, cpu = time.monotonic() - began, time.process_time()
    store(net, path)
    stored = features.load(name, path)
    terminal.result(f"{path}: {os.path.getsize(path)} bytes, trained in {seconds:.0f} s")
    terminal.result(f"{cpu:.0f} s of CPU time, data included")
    for what, split in tests.items():
        terminal.result(f"{accuracy(stored, split):.2f} % of {len(split)} {what}")


def augment(x, draw):
    """Each image turned, sheared, scaled and moved a little; x [N, 1, 32, 32], background -1."""

    def uniform(limit):
        return (2 * torch.rand(len(x), generator=draw) - 1) * limit

    angle, shear = uniform(0.2), uniform(0.15)
    wide, high = 1 + uniform(0.12), 1 + uniform(0.12)
    right, down = uniform(2 / 16), uniform(2 / 16)  # 2 pixels of the 16 from centre to edge
    cos, sin = angle.cos(), angle.sin()
    rows = [[cos * wide, (shear - sin) * high, right], [sin * wide, cos * high, down]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def main():
    a = arguments("lenet", epochs=8)
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    mnist = data.load_images("mnist", a.data_dir, 32, 1, a.cache_dir)
    digits = data.load_images("digits", a.data_dir, 32, 1, a.cache_dir)
    images = torch.cat([mnist.images, digits.images])
    labels = torch.cat([mnist.labels, digits.labels])
    net = features.Lenet()
    began = time.monotonic()
    train(net, images, labels, augment, a.epochs, a.seed)
    tests = {"MNIST test images": mnist.test, "held-out digits": digits.test}
    finish("lenet", net, a.out, tests, began)


if __name__ == "__main__":
    main()
