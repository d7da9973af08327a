"""The companion of a loop: run folder, log, clock, checkpoints, resume, signals.

    with run.start(__file__, args, nets, state, draw, score) as r:
        while r.going():
            r.set_lr(learning_rate(args, r.fraction))
            r.after_step(update(next(batches)))
        return r.finish()

It knows no method: draw() says what is shown, score() how good it is, state what a checkpoint
needs besides the networks.
"""
import contextlib
import importlib
import math
import shlex
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from common import checkpoint, cli, files, machine, pictures, processes, terminal
from common.cli import Diverged, Stopped
from common.signals import Signals

ROOT = Path(__file__).resolve().parent.parent
EARLY_GRIDS = 0, 100  # steps, so that the first pictures come within seconds
AGREE = 0.5  # seconds after which several processes compare signals and clocks again
LASTING = 5  # rows of the log after which a value that stays low is spoken of


def setup(args):
    """Check the arguments, join other processes, choose precision and threads, seed; -> device.

    args.precision and args.threads are written back, with --resume all that comes from its folder.
    """
    cli.take_over(args)
    cli.check(args)
    device = machine.device_of(args.device)
    processes.start(device)
    terminal.quiet = args.quiet or processes.rank() > 0
    found = machine.fastest(device, args.precision, args.threads) if processes.rank() == 0 else None
    args.precision, args.threads = processes.broadcast(found)
    torch.set_num_threads(args.threads)
    machine.exact()
    warnings.filterwarnings("ignore", message=".*capturable=True")  # of steps before a capture
    torch.manual_seed(args.seed)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def start(script, args, nets, state, draw, score):
    """A Run in a new folder under args.out_dir, or the one that args.resume goes on with.

    script: its file. nets: networks by name, of which generator_ema is saved by itself. state:
    0-d tensors, and objects with state_dict and load_state_dict, by name. draw() -> {name: images},
    float [N, C, H, W] in [-1, 1], or [R, K, C, H, W] for R rows of K. score() -> a row of
    metrics.csv; values that are dicts go into metrics.json alone. ValueError and OSError for bad
    input, before anything is written.
    """
    return Run(script, args, nets, state, draw, score)


def script_of(folder):
    """The module that a run folder was made by, found by name beside common/."""
    name = cli.read_args(folder)["script"]
    if not name.isidentifier() or not (ROOT / f"{name}.py").is_file():
        raise ValueError(f"{folder} was made by {name}.py, which is not beside common/")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def load(folder, device="cpu"):
    """(nets, args, script) of a trained run: `script.sample(nets, args, script.latents(16, args))`.

    The networks of the last checkpoint, or generator_ema alone where generator.pt is all there is.
    """
    script = script_of(folder)
    args = cli.args_of(folder, script.Args, device=device)
    nets = script.build(args)
    path = Path(folder) / "checkpoint.pt"
    try:
        if path.exists():
            states = files.load_tensors(path)["nets"]
        else:
            states = {"generator_ema": files.load_tensors(path.with_name("generator.pt"))}
        nets = {name: nets[name] for name in states}  # what is not saved is not handed out
        for name, values in states.items():
            nets[name].load_state_dict(values)
    except (KeyError, RuntimeError) as e:
        raise ValueError(
            f"the networks of {folder} do not fit {script.__name__}.py: {files.first_line(e)}"
        ) from None
    return nets, args, script


class Run:
    """What start returns: folder, device, step, seconds of training. Of several processes all take
    every step here, so that they decide alike; rank 0 writes."""

    def __init__(self, script, args, nets, state, draw, score):
        self.script, self.args, self.nets, self.state = Path(script).stem, args, nets, state
        self._draw, self._score = draw, score
        self._batches = [v for v in state.values() if hasattr(v, "drawn")]
        self._optimisers = [v for v in state.values() if hasattr(v, "param_groups")]
        self.device = next(next(iter(nets.values())).parameters()).device
        self.step, self.seconds = 0, 0.0
        self._ticking_since = None  # when the clock was started; None while it stands
        self._writes = processes.rank() == 0
        self._losses, self._shown, self._warnings = {}, "", {}
        self._averaged = False  # whether _losses are those of all ranks
        self._signals, self._details = Signals(), None  # of the last score, what is in no table
        if processes.several():
            processes.seed(args.seed, 0)
        if args.resume:
            self.folder = Path(args.resume)
        else:
            new = checkpoint.new_folder(self.script, args, self.device) if self._writes else None
            self.folder = processes.broadcast(new)
        saved = checkpoint.load(self.folder, self.script, nets, state) if args.resume else None
        if saved:
            self.step, self.seconds = saved["step"], saved["seconds"]
            self._losses, self._averaged = saved["losses"], True
        processes.broadcast_weights(nets)
        for optimiser in self._optimisers:
            processes.average_gradients(optimiser)
        self.log = files.Table(self.folder / "log.csv", self.step, self._writes)
        self.metrics = files.Table(self.folder / "metrics.csv", self.step, self._writes)
        self._start_seconds, self._start_step = self.seconds, self.step
        self._agreed_seconds, self._asked, self._next_agreement = self.seconds, 0, 0
        terminal.note(self._first_line())
        if not saved:
            self.save()
        checkpoint.remove_later_grids(self.folder, self.step)
        self._when_due()  # a run that was stopped between a save and its evaluation owes it

    def __enter__(self):
        self._signals.catch()
        return self

    def __exit__(self, *error):
        self._signals.release()

    def _first_line(self):
        a, on = self.args, f"{self.args.threads} of {machine.cores()} CPU threads"
        if self.device.type == "cuda":
            on = torch.cuda.get_device_name(self.device)
        if processes.several():
            on = f"{processes.ranks()} processes, the first on {on}"
        images = f"{' and '.join(str(b.size) for b in self._batches)} images of {a.dataset}"
        return f"{self.script} on {on} in {a.precision}, {images}, into {self.folder}"

    def save(self):
        """checkpoint.pt: all that resume needs. Refuses to replace a good one by broken weights."""
        for name, net in self.nets.items():
            for key, value in net.state_dict().items():
                if not torch.isfinite(value).all():
                    self._diverged(f"{key} of the {name}")
        progress = self.script, self.step, self.seconds
        checkpoint.save(self.folder, *progress, self.nets, self.state, self._losses)

    # -- time and signals

    def _stop_clock(self):
        if self._ticking_since is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - self._ticking_since
            self._ticking_since = None

    @contextlib.contextmanager
    def _paused(self):
        """What happens inside is no training: the clock stands, random numbers are not used up."""
        ticking = self._ticking_since is not None
        self._stop_clock()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield
        if ticking:
            self._ticking_since = time.perf_counter()

    def _own_elapsed(self):
        since = self._ticking_since
        return self.seconds + (time.perf_counter() - since if since is not None else 0.0)

    def _elapsed(self):
        return self._agreed_seconds if processes.several() else self._own_elapsed()

    def _stop_if_signalled(self):
        """Save and raise Stopped after a signal. Several processes agree on it, now and then."""
        signum = self._signals.caught
        if processes.several():
            self._asked += 1
            if self._asked < self._next_agreement:
                return
            found = processes.all_reduce_max(signum or 0, self._own_elapsed())
            signum, self._agreed_seconds = int(found[0]), found[1]
            fresh = found[1] - self._start_seconds
            calls = round(AGREE * self._asked / fresh) if fresh > AGREE else 1
            self._next_agreement = self._asked + max(1, calls)
        if not signum:
            return
        self._stop_clock()
        self._gather_ranks()
        self.save()
        self._signals.release()
        name = signal.Signals(signum).name
        command = f"python {self.script}.py --resume {shlex.quote(str(self.folder))}"
        raise Stopped(signum, f"{name} after step {self.step}, saved; go on with: {command}")

    # -- the loop

    @property
    def fraction(self):
        """Done share of the run in [0, 1], for schedules: of the steps, or else of the time."""
        a = self.args
        return min(1.0, self.step / a.steps if a.steps else self._elapsed() / (60 * a.max_minutes))

    def going(self):
        """Whether another update is wanted. Starts the clock, shows progress, heeds signals."""
        self._stop_if_signalled()
        a, elapsed = self.args, self._elapsed()
        left_s = [60 * a.max_minutes - elapsed] if a.max_minutes is not None else []
        done = any(s <= 0 for s in left_s) or (a.steps is not None and self.step >= a.steps)
        fresh = elapsed - self._start_seconds
        if fresh > 0 and self.step > self._start_step:
            rate = (self.step - self._start_step) / fresh
            left_s += [(a.steps - self.step) / rate] if a.steps is not None else []
            minutes, seconds = divmod(max(0, round(min(left_s))), 60)
            of = f"/{a.steps}" if a.steps is not None else ""
            terminal.progress(
                f"step {self.step}{of} {100 * self.fraction:3.0f} %  {rate:.1f} it/s  "
                f"{minutes}:{seconds:02d} left  {self._shown}",
                now=done,
            )
        if done:
            self._stop_clock()
        elif self._ticking_since is None:
            self._ticking_since = time.perf_counter()
        return not done

    def set_lr(self, value):
        """Rate of all optimisers, a number or 0-d tensor; in place, as captured updates need."""
        for optimiser in self._optimisers:
            optimiser.param_groups[0]["lr"].fill_(value)

    def warn_above(self, name, limit, text):
        """Say text once, when the logged value of that name first exceeds limit."""
        self._warnings[name] = (lambda v: v > limit), 1, text

    def warn_below(self, name, limit, text):
        """Say text once, when the logged value of that name has stayed below limit for a while."""
        self._warnings[name] = (lambda v: v < limit), LASTING, text

    def after_step(self, losses):
        """Count the step; when due: log, draw, score, save. losses: 0-d tensors by name."""
        self.step += 1
        self._losses, self._averaged = losses, False
        self._when_due()

    def _due(self, every):
        return bool(every) and self.step > 0 and self.step % every == 0

    def _when_due(self):
        a, step = self.args, self.step
        saves, scores = self._due(a.sample_every), self._due(a.eval_every)
        if self._due(a.log_every):
            self._log()
        if saves or scores or step in EARLY_GRIDS:
            with self._paused():
                self._gather_ranks()
                if saves:  # first, while the random numbers are those of training
                    self.save()
                if saves or step in EARLY_GRIDS:
                    self.draw()
                if scores:
                    self.score()

    def _logged(self, table):
        return bool(table.rows) and int(table.rows[-1]["step"]) == self.step

    def _gather_ranks(self):
        """Before what is shown, scored or saved: losses are finite, ranks have one BatchNorm."""
        self._check_losses()
        processes.average_buffers(self.nets)

    def _check_losses(self):
        if not self._averaged:  # over the ranks, so that all see what one has met
            self._losses, self._averaged = processes.average(self._losses), True
        for name, value in self._losses.items():
            if not math.isfinite(float(value)):
                self._diverged(name)

    def _diverged(self, what):
        self._signals.release()
        last = self.log.rows[-1]["step"] if self.log.rows else 0
        raise Diverged(
            f"{what} turned NaN or infinite between steps {last} and {self.step}; the last "
            f"checkpoint in {self.folder} is intact; try a smaller --lr (now {self.args.lr}), "
            "smaller weights of the loss terms, or --precision fp32"
        )

    def _log(self):
        if self._logged(self.log):
            return
        self._check_losses()
        values = {k: float(v) for k, v in self._losses.items()}  # here alone waits for the device
        for name, (strange, rows, text) in list(self._warnings.items()):
            recent = [float(r[name]) for r in self.log.rows[-rows + 1 :] if r.get(name)]
            recent = (recent if rows > 1 else []) + [values.get(name, math.nan)]
            if len(recent) >= rows and all(strange(v) for v in recent):
                terminal.warn(f"{name} is {recent[-1]:.2g} at step {self.step}: {text}")
                del self._warnings[name]
        self._shown = "  ".join(f"{name} {v:.3g}" for name, v in values.items())
        images = sum(b.drawn * b.batch_size for b in self._batches)
        row = {"step": self.step, "seconds": round(self._elapsed(), 3), "images": images}
        self.log.add(row | values)

    def draw(self):
        """NAME/STEP.png of every set of images that draw() returns: same places at every step."""
        if not self._writes:
            return
        with files.writing(self.folder):
            for name, images in self._draw().items():
                (self.folder / name).mkdir(exist_ok=True)
                path = self.folder / name / f"{self.step:06d}.png"
                pictures.to_sheet(images).save(path)

    def score(self):
        """The row of metrics.csv for this step; None where a signal came: a resume scores it."""
        if self._logged(self.metrics):
            return self.metrics.rows[-1]
        row = self._signals.interruptible(self._score) if self._writes else None
        row = processes.broadcast(row)
        if row is None:
            self._next_agreement = 0  # at once, but outside, where random numbers are in place
            return None
        self._details = {k: v for k, v in row.items() if isinstance(v, dict)}
        row = {k: v for k, v in row.items() if k not in self._details}
        self.metrics.add({"step": self.step, "seconds": round(self.seconds, 3)} | row)
        return self.metrics.rows[-1]

    def finish(self):
        """Final metrics, checkpoint, generator.pt and pictures; says them, returns the folder."""
        self._stop_clock()
        self._gather_ranks()
        if self._losses:
            self._log()
        with self._paused():
            self.save()
            self.draw()
            row = self.score()
        if row is None:
            self._stop_if_signalled()
        if self._writes:
            with files.writing(self.folder):
                average = self.nets["generator_ema"].state_dict()
                average = {k: v.cpu() for k, v in average.items()}  # loads where there is no GPU
                files.save_tensors(self.folder / "generator.pt", average)
                self._write_final(row)
                pictures.of_run(self.folder)
            terminal.result(pictures.summary(self.folder))
        self._signals.release()
        return self.folder

    def _write_final(self, row):
        path, a = self.folder / "metrics.json", self.args
        if path.exists() and self._details is None:  # a finished run, resumed: it is of this row
            return
        more = self._details or {}
        on = {"dataset": a.dataset, "image_size": a.image_size, "trained_in": a.precision}
        on |= {"sampled_in": "fp32"} | more.pop("measured_on", {})
        final = {k: files.as_number(v) for k, v in row.items()} | more
        files.write_json(path, final | {"measured_on": on})
