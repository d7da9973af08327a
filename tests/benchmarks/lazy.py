"""ICR with its consistency terms at every R-th update alone, R times as heavy: a question, no method.

    python -m tests.benchmarks.lazy 4 --dataset mnist --max-minutes 2     # and whatever icr_gan.py takes

One of the lectures behind this project asks whether the terms are needed at every update. The
updates between are those of LSGAN; all share one optimiser for each network. The run folder is one
of icr_gan.py, whose args.json names the weights of a single update. On a CPU, as graphs of two
kinds of update would not share their optimisers; by one process, and not to be resumed.
"""
import os
import sys
from dataclasses import replace

import icr_gan
from common import cli


def lazy_updates(every, real_updates=icr_gan.updates):
    """updates of icr_gan with the terms on in the last of so many updates of G, which is logged."""

    def updates(nets, args, ops=None):
        names = "lambda_real", "lambda_fake", "lambda_dis", "lambda_gen"
        heavy = replace(args, **{k: every * getattr(args, k) for k in names})
        update_d, update_g, state = real_updates(nets, heavy, ops)
        bare_d, bare_g, bare = real_updates(nets, replace(args, **dict.fromkeys(names, 0.0)), ops)
        for name in ("opt_d", "opt_g"):
            bare[name].state, bare[name].param_groups = state[name].state, state[name].param_groups
        done, t = state["t"], bare["t"]

        def due():
            return (int(done) + 1) % every == 0

        def lazy_d(real):
            if due():
                return update_d(real)
            return bare_d(real)

        def lazy_g():
            if due():
                return update_g()
            t.copy_(done)
            logs = bare_g()
            done.add_(1)
            return logs

        return lazy_d, lazy_g, state

    return updates


def main(argv=None):
    """Train as icr_gan.py does; the first argument is R. Returns the run folder."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or not argv[0].isdigit() or int(argv[0]) < 1:
        raise ValueError(f"give R, at every how many updates, first; got {argv[:1] or 'nothing'}")
    resumed = any(word.startswith("--resume") for word in argv)
    if resumed or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a lazy run is of one process and cannot be resumed")
    args = cli.parse(icr_gan.Args, argv[1:])
    icr_gan.updates = lazy_updates(int(argv[0]))
    return icr_gan.main(replace(args, device="cpu"))


if __name__ == "__main__":
    cli.guard(main)
