"""What test_processes.py has torchrun start: python -m tests.process_helpers FOLDER TASK."""
import copy
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from common import cli, data, processes, run
from tests.helpers import CACHE, script, states, tiny

SHORT = {"steps": 4, "log_every": 1, "sample_every": 2, "eval_every": 0, "lr_decay": 0.0, "cache_dir": CACHE}


def critic_step(net, optimiser, real, fake, eps, penalty_only):
    """One step of a critic with the gradient penalty, on whatever part of the batch it is given."""
    mixed = (eps * real + (1 - eps) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(net(mixed).sum(), mixed, create_graph=True)
    loss = 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    if not penalty_only:
        loss = loss + net(fake).mean() - net(real).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def critic(dtype, penalty_only=False, steps=3):
    """Parameters of rank 0 after steps on the halves of a batch, and after the same on the whole."""
    torch.manual_seed(100 + processes.rank())  # other weights on each rank, until they are aligned
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.Softplus(), nn.Flatten(), nn.Linear(8 * 16, 1)).to(dtype)
    processes.broadcast_weights({"net": net})
    whole = copy.deepcopy(net)
    own = [torch.optim.SGD(n.parameters(), 0.05, momentum=0.5) for n in (net, whole)]
    processes.average_gradients(own[0])
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        batch = [torch.randn(8, 3, 8, 8, generator=draw).to(dtype) for _ in range(2)]
        batch.append(torch.rand(8, 1, 1, 1, generator=draw).to(dtype))
        share = slice(4 * processes.rank(), 4 * processes.rank() + 4)
        critic_step(net, own[0], *(t[share] for t in batch), penalty_only)
        critic_step(whole, own[1], *batch, penalty_only)
    return {"halves": net.state_dict(), "whole": whole.state_dict()}


def pieces():
    """Every helper of common.processes by itself; what rank 0 sees."""
    rank = processes.rank()
    norm = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(1, 1))
    norm.register_buffer("other", torch.tensor(float(rank)))
    norm[0].running_mean.fill_(rank)
    norm[0].num_batches_tracked.fill_(rank)
    before = norm[1].weight.detach().clone()
    processes.average_buffers({"norm": norm})
    pair = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimiser = torch.optim.SGD(pair, 1.0)
    processes.average_gradients(optimiser)
    pair[0].grad = torch.full((2,), 1.0 + rank)
    if rank == 0:
        pair[1].grad = torch.ones(2)  # none on rank 1
    optimiser.step()
    processes.seed(3, 0)
    noise = processes.gather(torch.randn(4))
    pixels = torch.arange(22 * 3 * 4, dtype=torch.uint8).view(22, 3, 2, 2)
    batches = data.Batches(pixels, 4, 0, "cpu")
    return {
        "mean": norm[0].running_mean.clone(),
        "tracked": processes.gather(int(norm[0].num_batches_tracked)),
        "other": processes.gather(float(norm.other)),
        "untouched": torch.equal(before, norm[1].weight),
        "stepped": processes.gather([p.detach().tolist() for p in pair]),
        "noise": noise,
        "average": processes.average({"a": torch.tensor(1.0 + rank), "b": float("nan") if rank else 0.0}),
        "maximum": processes.all_reduce_max(rank, -rank),
        "broadcast": processes.gather(processes.broadcast(rank + 5)),
        "batches": [processes.gather(next(batches)) for _ in range(7)],
        "share": processes.share(tiny("lsgan")).batch_size,
        "world": (processes.gather(rank), processes.ranks()),
    }


def train(folder, **changes):
    """A run of icr_gan, and the networks that each rank ends with."""
    m = script("icr_gan")
    made = {}
    build = m.build
    m.build = lambda args: made.setdefault("nets", build(args))
    try:
        if changes.pop("resume", False):
            where = m.main(m.Args(resume=str(folder), **changes))
        else:
            where = m.main(tiny("icr_gan", out_dir=str(folder), **(SHORT | changes)))
    finally:
        m.build = build
    return where, processes.gather(states(made["nets"]))


def interrupted(folder, spoil):
    """What each rank raises at which step when spoil(rank, Run) has happened after step 3."""
    after, steps = run.Run.after_step, []

    def after_step(self, losses):
        steps.append(self.step + 1)
        after(self, spoil(losses) if self.step == 2 and processes.rank() == 1 else losses)

    run.Run.after_step = after_step
    try:
        train(folder, steps=50)
        raised = "nothing"
    except (cli.Stopped, cli.Diverged) as e:
        raised = type(e).__name__
    finally:
        run.Run.after_step = after
    return processes.gather((raised, steps[-1]))


def signalled(losses):
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


def everything(folder):
    found = {
        "float64": critic(torch.float64),
        "float32": critic(torch.float32),
        "penalty": critic(torch.float64, penalty_only=True),
        "pieces": pieces(),
    }
    whole, found["whole"] = train(folder / "whole")
    part, _ = train(folder / "part", steps=2)
    _, found["resumed"] = train(processes.broadcast(part), steps=4, resume=True)
    found["folders"] = [str(whole), str(part)]
    found["signal"] = interrupted(folder / "signal", signalled)
    found["nan"] = interrupted(folder / "nan", lambda losses: losses | {"loss_d": losses["loss_d"] * float("nan")})
    if processes.rank() == 0:
        torch.save(found, folder / "found.pt")


def death(folder):
    """Rank 1 is killed in the midst of training."""
    after = run.Run.after_step

    def after_step(self, losses):
        if self.step == 3 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        after(self, losses)

    run.Run.after_step = after_step
    train(folder, steps=10**6, log_every=10**6, sample_every=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.start(torch.device("cpu"))
    cli.guard(lambda: {"everything": everything, "death": death}[sys.argv[2]](Path(sys.argv[1])))
