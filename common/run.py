"""A training run: arguments, run folder, log, progress, checkpoints, resume, exit codes."""
import argparse
import contextlib
import csv
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from datetime import datetime
from pathlib import Path

import torch

from common import gpu, terminal

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("lsgan", "cn_lsgan", "icr_gan", "wgan_gp")  # those that `load` may import by the name in a run folder
ANEW = ("steps", "max_minutes", "log_every", "sample_every", "eval_every", "device", "threads", "quiet")
EARLY_GRID = 100  # an extra grid, so that the first picture comes within seconds


class Failed(RuntimeError):
    """Training cannot go on; what was saved before is intact. Exit code 1."""


class Diverged(Failed):
    """A loss or a weight turned NaN or infinite."""


class Stopped(Exception):
    """A signal ended training after a save. Exit code 128 + signum."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


# ---- arguments -------------------------------------------------------------------------------


def _described(cls):
    """(group, field, help) of every field of a dataclass; groups and help are its comments."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    group, rows = "arguments", []
    for line in inspect.getsource(cls).splitlines():
        if m := re.fullmatch(r"\s+# (\w.*)", line):
            group = m[1]
        elif (m := re.match(r"\s+(\w+): .*?  # (.*)", line)) and m[1] in fields:
            rows.append((group, fields.pop(m[1]), m[2]))
    return rows + [(group, f, "") for f in fields.values()]


def _close(word, words):
    """ (did you mean X?) where X is close to word, else nothing."""
    found = difflib.get_close_matches(str(word), [str(w) for w in words], 1)
    return f" (did you mean {found[0]}?)" if found else ""


def _converter(kind, name):
    """A function from the typed text to the annotated type; ValueError names argument and text."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return str
    if isinstance(kind, types.UnionType):
        kind = next(t for t in options if t is not type(None))

    def convert(text):
        try:
            return kind(text)
        except ValueError:
            wanted = {"int": "a whole number", "float": "a number"}[kind.__name__]
            raise ValueError(f"--{name} must be {wanted}, got {text!r}") from None

    return convert


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, for `guard` to show."""

    def error(self, message):
        raise ValueError(message)


def _words(argv):
    """The command line with --lambda_gp as --lambda-gp, and negative numbers tied to their flag."""
    words = []
    for word in argv:
        if re.match(r"-(\d|\.\d|inf|nan)", word) and words and re.fullmatch(r"--[\w-]+", words[-1]):
            words[-1] += "=" + word  # argparse takes -1e-3 for a flag
        else:
            words.append(re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word))
    return words


def parse(cls, argv=None, doc=""):
    """An instance of the dataclass cls from the command line; ValueError for bad input.

    With --resume RUN the values come from RUN's args.json, and only ANEW may be typed beside it.
    """
    argv = _words(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    groups, hints = {}, typing.get_type_hints(cls)
    for group, field, text in _described(cls):
        where = groups.setdefault(group, None) or parser.add_argument_group(group)
        groups[group] = where
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        text = text.replace("%", "%%") + (f" [{field.default}]" if field.default is not None else "")
        if kind is bool:
            where.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else field.name.split("_")[-1].upper()
            where.add_argument(flag, metavar=metavar, help=text)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flags = [f for action in parser._actions for f in action.option_strings]
        raise ValueError(f"unknown argument {word}{_close(word.split('=')[0], flags)}")
    given = vars(known)
    for name, value in given.items():
        if isinstance(value, str):
            given[name] = _converter(hints[name], name.replace("_", "-"))(value)
    if "resume" in given:
        return resume(given.pop("resume"), cls, **given)
    args = cls(**given)
    _check_choices(args)
    return args


def _check_choices(args):
    for name, kind in typing.get_type_hints(type(args)).items():
        if typing.get_origin(kind) is typing.Literal and getattr(args, name) not in (options := typing.get_args(kind)):
            value = getattr(args, name)
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {value}{_close(value, options)}")


def read_args(folder):
    """args.json of a run folder; ValueError where there is none or it cannot be read."""
    path = Path(folder) / "args.json"
    try:
        saved = json.loads(path.read_text())
        saved["script"], saved["args"]
    except FileNotFoundError:
        raise ValueError(f"{folder} is no run folder: it has no args.json") from None
    except (NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read as the arguments of a run: {e!r}") from None
    return saved


def script_of(folder):
    """The imported script that a run folder was made by, found by name beside common/."""
    name = read_args(folder)["script"]
    if name not in SCRIPTS:
        raise ValueError(f"{folder} was made by {name!r}, which is none of {', '.join(SCRIPTS)}")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def resume(folder, cls=None, **changes):
    """Args to go on with a run: `main(resume(RUN, steps=8000))`. Only ANEW may change.

    A new number of steps lifts a time limit of the old arguments, and the other way round.
    """
    saved = read_args(folder)
    if bad := [name for name in changes if name not in ANEW]:
        raise ValueError(f"--{bad[0].replace('_', '-')} cannot change with --resume; only {', '.join(ANEW)} can")
    if cls is None:
        cls = script_of(folder).Args
    mine = Path(inspect.getsourcefile(cls)).stem
    if saved["script"] != mine:
        raise ValueError(f"{folder} was made by {saved['script']}.py, not by {mine}.py")
    values = dict(saved["args"], resume=str(folder))
    if ("steps" in changes) != ("max_minutes" in changes):
        values["steps"] = values["max_minutes"] = None
    try:
        return cls(**dict(values, **changes))
    except TypeError as e:
        raise ValueError(f"{Path(folder) / 'args.json'} holds other arguments than {mine}.py takes: {e}") from None


def device_of(args):
    """The torch.device that args.device means here; ValueError where there is no such device."""
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {args.device}")
    device = torch.device(args.device)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {args.device} is not there: this machine has {count} usable CUDA devices; cpu always works")
    return device


def fused(args):
    """Whether --impl means the package kernels; ValueError where they cannot run.

    auto is torch until a measurement on a GPU says otherwise.
    """
    if args.impl != "triton":
        return False
    if importlib.util.find_spec("triton") is None:
        raise ValueError("impl triton needs the package triton, which is not installed here; use --impl torch")
    if device_of(args).type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("impl triton on the CPU works only in Triton's slow interpreter: set TRITON_INTERPRET=1, or use --impl torch")
    return True


def setup(args):
    """Check what a script cannot check itself, join other processes, set threads, precision and seed."""
    _check_choices(args)
    device = device_of(args)
    if args.resume:
        read_args(args.resume)
    gpu.start(device)
    terminal.quiet = args.quiet or gpu.rank() > 0
    torch.set_num_threads(args.threads)
    # fp32 means fp32: TF32 has 10 bits, and what should run in few is what --precision bf16 names
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(args.seed)


def cli(main, cls, doc):
    """Run a script from the command line; see guard."""
    guard(lambda: main(parse(cls, doc=doc)))


def guard(command):
    """Call command; one `error:` line and an exit code take the place of a traceback."""
    try:
        command()
    except (ValueError, OSError) as e:
        code = 2
        message = f"{e.strerror}: {e.filename}" if isinstance(e, OSError) and e.filename and e.strerror else str(e)
    except (Failed, gpu.Lost) as e:
        code, message = 1, str(e)
    except Stopped as e:
        code, message = 128 + e.signum, ""
        terminal.close()
        if gpu.rank() == 0:
            print(e, file=sys.stderr)
        gpu.stop()
    except KeyboardInterrupt:
        code, message = 130, ""
    else:
        if gpu.stop():  # threads of gloo can outlive the interpreter, whose end then aborts a run that went well
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return
    terminal.close()
    if message and gpu.rank():
        message = f"process {gpu.rank()}: {message}"
    if message:
        print(f"{terminal.color('error:', 31)} {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


# ---- files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(what):
    """Turn a full disk or a vanished folder into Failed, which names what was being written."""
    try:
        yield
    except OSError as e:
        raise Failed(f"could not write {what}: {e.strerror or e}; the last good checkpoint is as it was") from e


def write_atomic(path, data):
    """Bytes to path by way of a temporary file beside it: a reader sees the old or the new, whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def save_tensors(path, values):
    """torch.save, atomic. It goes through memory, so that a failed write is an OSError."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path):
    """torch.load of tensors and plain containers onto the CPU; ValueError names file and reason."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except Exception as e:  # zip, pickle and tensor errors come in many types
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} cannot be loaded, it may be cut short or damaged: {reason}") from None


class Table:
    """A csv file that grows by rows; its columns are those of the first row."""

    def __init__(self, path, writes=True):
        self.path, self.writes = Path(path), writes  # of several processes one writes
        self.rows = []

    def read(self, last_step):
        """Take over the rows up to last_step and cut the file back to them."""
        self.rows = [r for r in read_csv(self.path) if int(r["step"]) <= last_step]
        if self.path.exists():
            self._write(self.rows, "w")

    def add(self, row):
        self._write([row], "a" if self.rows else "w")
        self.rows.append({k: str(v) for k, v in row.items()})

    def _write(self, rows, mode):
        if not self.writes:
            return
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        with writing(self.path), open(self.path, mode, newline="") as f:
            table = csv.DictWriter(f, list((self.rows or rows)[0]))
            if mode == "w":
                table.writeheader()
            table.writerows(rows)


def read_csv(path):
    """Rows of a csv file as dicts of strings; an incomplete last row, left by a kill, is dropped."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole)))


def _versions(device):
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": None}
    with contextlib.suppress(Exception):
        found["triton"] = importlib.metadata.version("triton")
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=5)
        if git.returncode == 0:
            found["git"] = git.stdout.strip()
    return found


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """What start returns. Attributes: folder, device, step, drawn (batches of data), seconds, rank, ranks.

    Of several processes all take every step here, so that they decide alike; rank 0 writes.
    """

    def __init__(self, script, args, images, nets, state, latents, sample):
        from common import features

        self.script, self.args, self.images = Path(script).stem, args, images
        self._features = features.resolve(args.features, images.channels)
        if len(images.images) < 6:
            raise ValueError(f"{args.dataset} has {len(images.images)} images; scores need at least 6")
        self.nets, self.state, self._latents, self._sample = nets, state, latents, sample
        self.device = device_of(args)
        self.step = self.drawn = 0
        self.seconds = 0.0  # of training, without evaluations, grids and saves
        self._since = None  # when the stopwatch was started; None while it stands
        self.rank, self.ranks = gpu.rank(), gpu.ranks()
        self._losses, self._shown = {}, ""
        self._averaged = False  # whether _losses are those of all ranks
        self._limits = {}
        self._signal = None
        self._handlers = {}
        self._reference = None
        if self.ranks > 1:
            gpu.seed(args.seed, 0)
        if args.resume:
            self.folder = Path(args.resume)
            self._load()
        else:
            self.folder = gpu.told(self._new_folder() if self.rank == 0 else None)
        gpu.align(nets)
        for value in state.values():
            if hasattr(value, "param_groups"):
                gpu.average_gradients(value)
        self.log, self.metrics = (Table(self.folder / name, self.rank == 0) for name in ("log.csv", "metrics.csv"))
        for table in (self.log, self.metrics):
            table.read(self.step)
            table.rows = gpu.told(table.rows)
        self._start_seconds, self._start_step = self.seconds, self.step
        self._agreed = self.seconds  # of several processes, the longest elapsed time, as they last compared
        self._catch_signals()
        cores = os.cpu_count()
        on = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{args.threads} of {cores} CPU threads"
        on = f"{self.ranks} processes, the first on {on}" if self.ranks > 1 else on
        terminal.say(f"{self.script} on {on}, {len(images.images)} images of {args.dataset}, into {self.folder}")
        if gpu.told(self.step == 0 and not (self.folder / "checkpoint.pt").exists()):
            with self._aside():
                self.grid()
            self.save()
        else:
            for old in (self.folder / "samples").glob("*.png") if self.rank == 0 else ():
                if old.stem.isdigit() and int(old.stem) > self.step:
                    old.unlink()
            self._when_due()  # a run that was stopped between a save and its evaluation owes it
        self._start_clock()

    # -- folder and checkpoint

    def _new_folder(self):
        args = self.args
        dataset = Path(args.dataset).name or "data"
        name = f"{self.script}-{dataset}-{datetime.now():%Y%m%d-%H%M%S}-s{args.seed}"
        parent = Path(args.out_dir)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for i in itertools.count(1):
                folder = parent / (name if i == 1 else f"{name}-{i}")
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    break
        except OSError as e:
            raise ValueError(f"out_dir {args.out_dir} cannot be written to: {e.strerror}; wanted a folder for run folders") from None
        values = dataclasses.asdict(args)
        del values["resume"]
        saved = {"script": self.script, "args": values, "versions": _versions(self.device)}
        write_atomic(folder / "args.json", (json.dumps(saved, indent=2) + "\n").encode())
        (folder / "samples").mkdir()
        return folder

    def save(self):
        """checkpoint.pt: all that resume needs. Refuses to replace a good one by broken weights."""
        for name, net in self.nets.items():
            for key, value in net.state_dict().items():
                if not torch.isfinite(value).all():
                    self._diverged(f"{key} of the {name}")
        rng = {
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        others = gpu.gathered(rng)
        if self.rank:
            return
        values = {
            "script": self.script,
            "step": self.step,
            "drawn": self.drawn,
            "seconds": self.seconds,
            "nets": {name: net.state_dict() for name, net in self.nets.items()},
            "state": {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in self.state.items()},
            "losses": {k: float(v) for k, v in self._losses.items()},
        } | rng
        if self.ranks > 1:
            values["ranks"] = others
        with writing(self.folder / "checkpoint.pt"):
            save_tensors(self.folder / "checkpoint.pt", values)

    def _load(self):
        """Take over checkpoint.pt; a run that was killed before its first save starts at 0."""
        path = self.folder / "checkpoint.pt"
        saved = None
        if self.rank == 0:
            (self.folder / "samples").mkdir(exist_ok=True)
            saved = load_tensors(path) if path.exists() else None
        saved = gpu.told(saved)
        if saved is None:
            return
        try:
            if saved["script"] != self.script:
                raise ValueError(f"it is of {saved['script']}.py, not of {self.script}.py")
            for name, net in self.nets.items():
                net.load_state_dict(saved["nets"][name])
            for name, value in self.state.items():
                if not hasattr(value, "load_state_dict"):
                    value.copy_(saved["state"][name])
                    continue
                for group in saved["state"][name]["param_groups"]:
                    if "capturable" in group:  # the run may go on on another kind of device
                        group["capturable"] = self.device.type == "cuda"
                value.load_state_dict(saved["state"][name])
                for group in value.param_groups:  # load_state_dict leaves a tensor rate on the CPU
                    group["lr"] = group["lr"].to(self.device)
            self.step, self.drawn, self.seconds = saved["step"], saved["drawn"], saved["seconds"]
            self._losses, self._averaged = saved["losses"], True
            rngs = saved.get("ranks", [saved])
            if self.ranks == 1 or len(rngs) == self.ranks:
                rng = rngs[self.rank]
                torch.set_rng_state(rng["rng"])
                if rng["rng_cuda"] is not None and self.device.type == "cuda":
                    torch.cuda.set_rng_state(rng["rng_cuda"], self.device)
            else:  # saved by another number of processes
                gpu.seed(self.args.seed, self.step)
        except (KeyError, TypeError, RuntimeError, ValueError) as e:
            raise ValueError(f"{path} does not fit this run: {str(e).splitlines()[0]}") from None

    # -- time and signals

    def _start_clock(self):
        self._since = time.perf_counter()

    def _stop_clock(self):
        if self._since is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @contextlib.contextmanager
    def _aside(self):
        """What happens inside is no training: the clock stands, random numbers go on as if it were not."""
        ticking = self._since is not None
        self._stop_clock()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield
        if ticking:
            self._start_clock()

    def _elapsed(self):
        if self.ranks > 1:
            return self._agreed
        return self._own_elapsed()

    def _own_elapsed(self):
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def _catch_signals(self):
        if threading.current_thread() is not threading.main_thread():
            return

        def note(signum, frame):
            self._signal = signum
            if not gpu.launched():  # torchrun passes on what the terminal has sent to all anyway
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once

        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handlers[signum] = signal.signal(signum, note)

    def _release_signals(self):
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _heed_signal(self):
        if self.ranks > 1:
            signum, self._agreed = gpu.highest(self._signal or 0, self._own_elapsed())
            self._signal = int(signum) or None
        if self._signal is None:
            return
        self._stop_clock()
        self._settle()
        self.save()
        self._release_signals()
        name = signal.Signals(self._signal).name
        raise Stopped(
            self._signal, f"{name} after step {self.step}, saved; go on with: python {self.script}.py --resume {self.folder}"
        )

    # -- the loop

    @property
    def fraction(self):
        """Done share of the run in [0, 1], for schedules: of the steps, or of the time without steps."""
        a = self.args
        return min(1.0, self.step / a.steps if a.steps is not None else self._elapsed() / (60 * a.max_minutes))

    def going(self):
        """Whether another step is wanted. Shows the progress line."""
        a = self.args
        elapsed = self._elapsed()
        done = (a.steps is not None and self.step >= a.steps) or (a.max_minutes is not None and elapsed >= 60 * a.max_minutes)
        fresh = elapsed - self._start_seconds
        rate = (self.step - self._start_step) / fresh if fresh > 0 else 0.0
        if rate:
            ends = [(a.steps - self.step) / rate] if a.steps is not None else []
            ends += [60 * a.max_minutes - elapsed] if a.max_minutes is not None else []
            of = f"/{a.steps}" if a.steps is not None else ""
            left = max(0, round(min(ends)))
            terminal.progress(
                f"step {self.step}{of} {100 * self.fraction:3.0f} %  {rate:.1f} it/s  {left // 60}:{left % 60:02d} left  {self._shown}",
                now=done,
            )
        if done:
            self._stop_clock()
        return not done

    def set_lr(self, value):
        """Learning rate of every optimiser in state, in place as a captured update needs it."""
        for optimiser in self.state.values():
            if hasattr(optimiser, "param_groups"):
                optimiser.param_groups[0]["lr"].fill_(value)

    def warn_above(self, name, limit, text):
        """Say text once, when the logged value of that name first exceeds limit."""
        self._limits[name] = (limit, text)

    def after_step(self, losses):
        """Count the step; when due: log, draw the grid, evaluate, save. losses: 0-d tensors by name."""
        self.step += 1
        self.drawn += self.args.n_critic
        self._losses, self._averaged = losses, False
        self._when_due()
        self._heed_signal()

    def _due(self, every):
        return bool(every) and self.step % every == 0

    def _when_due(self):
        a, step = self.args, self.step
        if step == 0:
            return
        if self._due(a.log_every):
            self._log()
        draw = self._due(a.sample_every)
        if draw or step == EARLY_GRID or self._due(a.eval_every):
            with self._aside():
                self._settle()
                if draw or step == EARLY_GRID:
                    self.grid()
                if draw:
                    self.save()
                if self._due(a.eval_every):
                    self.evaluate()

    def _logged(self, table):
        return bool(table.rows) and int(table.rows[-1]["step"]) == self.step

    def _settle(self):
        """Before anything is shown, scored or saved."""
        self._losses_finite()
        gpu.average_buffers(self.nets)

    def _losses_finite(self):
        if not self._averaged:  # over the ranks, so that all see what one has met
            self._losses, self._averaged = gpu.average(self._losses), True
        for name, value in self._losses.items():
            if not math.isfinite(float(value)):
                self._diverged(name)

    def _diverged(self, what):
        self._release_signals()
        last = self.log.rows[-1]["step"] if self.log.rows else 0
        raise Diverged(
            f"{what} turned NaN or infinite between steps {last} and {self.step}; the last checkpoint in {self.folder} is "
            f"intact; try a smaller --lr (now {self.args.lr}), smaller weights of the loss terms, or --precision fp32"
        )

    def _log(self):
        if self._logged(self.log):
            return
        self._losses_finite()
        values = {name: float(v) for name, v in self._losses.items()}  # the one place that waits for the device
        for name, (limit, text) in list(self._limits.items()):
            if values.get(name, 0) > limit:
                terminal.say(f"{terminal.color('warning:', 33)} {name} is {values[name]:.2g} at step {self.step}: {text}")
                del self._limits[name]
        self._shown = "  ".join(f"{name} {v:.3g}" for name, v in values.items())
        row = {"step": self.step, "seconds": round(self._elapsed(), 3), "images": self.drawn * self.args.batch_size}
        self.log.add(row | values)

    def grid(self):
        """samples/STEP.png: the same latents, hence the same places, at every step."""
        from common.sample import COLUMNS, draw, grid

        if self.rank:
            return
        z = self._latents(COLUMNS * COLUMNS, self.args, torch.Generator().manual_seed(self.args.seed))
        with writing(self.folder / "samples"):
            grid(draw(self._sample, self.nets, self.args, z)).save(self.folder / "samples" / f"{self.step:06d}.png")

    def evaluate(self):
        """The row of metrics.csv for this step: EMA samples against the training split."""
        from common import evaluate

        if self._logged(self.metrics):
            return self.metrics.rows[-1]
        a = self.args
        if self._reference is None and self.rank == 0:
            self._reference = evaluate.reference(self.images, self._features, a.eval_samples, a.cache_dir, self.device)
        generator = torch.Generator().manual_seed(a.seed + 1)  # not the latents of the grid

        def check():
            self._heed_signal()

        def chunk(n):
            z = self._latents(n, a, generator)  # all of them on every rank, so the images are those of one process
            return self._sample(self.nets, a, z.tensor_split(self.ranks)[self.rank])

        fake = evaluate.features_of(chunk, a.eval_samples, self._features, self.device, check)
        parts = gpu.gathered(fake)
        row = None
        if self.rank == 0:
            scores = evaluate.score(evaluate.in_order(parts, a.eval_samples), self._reference)
            row = {"step": self.step, "seconds": round(self.seconds, 3)} | scores
        self.metrics.add(gpu.told(row))
        return self.metrics.rows[-1]

    def finish(self):
        """Final metrics, checkpoint, generator.pt and pictures; prints them and returns the folder."""
        from common import report

        self._stop_clock()
        self._settle()
        if self._losses:
            self._log()
        self.grid()
        self.save()
        row = self.evaluate()
        terminal.close()
        if self.rank:
            self._release_signals()
            return self.folder
        with writing(self.folder):
            save_tensors(self.folder / "generator.pt", self.nets["generator_ema"].state_dict())
            on = {
                "dataset": self.args.dataset,
                "split": "train",
                "real_images": len(self.images.images),
                "image_size": self.args.image_size,
                "channels": self.args.channels,
                "sampled_in": "fp32",
            }
            final = {k: _number(v) for k, v in row.items()} | {"measured_on": on}
            write_atomic(self.folder / "metrics.json", (json.dumps(final, indent=2) + "\n").encode())
            report.pictures(self.folder)
        self._release_signals()
        print(report.summary(self.folder))
        return self.folder


def _number(text):
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def start(script, args, images, nets, state, latents, sample):
    """A Run in a new folder under args.out_dir, or the one that args.resume goes on with.

    script: its file or name; images: common.data.Images to score against; state: optimisers and 0-d
    tensors by name; latents and sample: the script's functions. ValueError and OSError for bad
    input, before anything is written.
    """
    return Run(script, args, images, nets, state, latents, sample)


def load(folder, device="cpu"):
    """(nets, args, script) of a trained run: `script.sample(nets, args, script.latents(16, args))`.

    All networks are those of the last checkpoint, or only generator_ema where generator.pt alone
    is left. ValueError for a folder that is no run.
    """
    script = script_of(folder)
    saved = read_args(folder)["args"]
    args = script.Args(**dict(saved, device=device))
    nets = script.build(args)
    checkpoint = Path(folder) / "checkpoint.pt"
    if checkpoint.exists():
        states = load_tensors(checkpoint)["nets"]
    else:
        states = {"generator_ema": load_tensors(Path(folder) / "generator.pt")}
    try:
        for name, values in states.items():
            nets[name].load_state_dict(values)
    except (KeyError, RuntimeError) as e:
        raise ValueError(f"the networks of {folder} do not fit {script.__name__}.py: {str(e).splitlines()[0]}") from None
    return nets, args, script
