"""Arguments: from a command line or a run folder, their ranges; errors as one line and a code."""
import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path

from common import processes, terminal
from common.files import NotSaved

MAY_CHANGE = (  # beside --resume
    "steps max_minutes log_every sample_every eval_every eval_samples "
    "device threads quiet out_dir data_dir cache_dir"
).split()
RESOLVED = "precision threads channels channels_a channels_b".split()  # auto or 0 until a run

SIZE = "a power of two from 8 to 512", lambda v: 8 <= v <= 512 and v & (v - 1) == 0
CHANNELS = "0, 1 or 3", lambda v: v in (0, 1, 3)
COUNT = "from 1 to 65536", lambda v: 1 <= v <= 2**16
POSITIVE = "positive", lambda v: v > 0
ZERO_OR_MORE = "zero or positive", lambda v: v >= 0
SHARE = "in [0, 1]", lambda v: 0 <= v <= 1
DECAY = "in [0, 1)", lambda v: 0 <= v < 1
RANGES = {  # of shared arguments; weights, all called lambda_..., are ZERO_OR_MORE
    "image_size": SIZE,
    **dict.fromkeys("channels channels_a channels_b".split(), CHANNELS),
    "eval_samples": ("at least 6", lambda v: v >= 6),
    "seed": ("from 0 to 2^63 - 1", lambda v: 0 <= v < 2**63),
    "lr_decay": SHARE,
    **dict.fromkeys("batch_size z_dim width n_critic".split(), COUNT),
    **dict.fromkeys("steps max_minutes lr log_every".split(), POSITIVE),
    **dict.fromkeys("subset threads eval_every sample_every".split(), ZERO_OR_MORE),
    **dict.fromkeys("sigma shift clip margin gp_target".split(), ZERO_OR_MORE),
    **dict.fromkeys("beta1 beta2 ema_decay".split(), DECAY),
}


class Diverged(RuntimeError):
    """A loss or a weight turned NaN or infinite. Exit code 1."""


class Stopped(Exception):
    """A signal ended training after a save. Exit code 128 + signum."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


class RunFolder(str):
    """The value of resume in arguments that were taken from that folder."""


# ---- checks ----------------------------------------------------------------------------------


def check(args):
    """ValueError for the first argument that is of another type or out of its range."""
    hints = typing.get_type_hints(type(args))
    for field in dataclasses.fields(args):
        name, value, kind = field.name, getattr(args, field.name), hints[field.name]
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            continue
        if typing.get_origin(kind) is typing.Literal:
            if value not in options:
                listed = ", ".join(map(str, options))
                hint = close_to(value, options)
                raise ValueError(f"{name} must be one of {listed}, got {value}{hint}")
            continue
        kind = _bare(kind)
        wanted, fits = RANGES.get(name, ("a finite number", lambda v: True))
        if name.startswith("lambda_"):
            wanted, fits = ZERO_OR_MORE
        if kind in (int, float):
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not fits(value):
                raise ValueError(f"{name} must be {wanted}, got {value}")
            if kind is int and abs(value) >= 2**63:  # what a tensor takes
                raise ValueError(f"{name} must fit 63 bits, got {value}")
        elif not isinstance(value, kind):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")


def _bare(kind):
    """int of int | None."""
    if isinstance(kind, types.UnionType):
        return next(t for t in typing.get_args(kind) if t is not type(None))
    return kind


def close_to(word, words):
    """Text " (did you mean X?)" where X is close to word, else nothing."""
    found = difflib.get_close_matches(str(word), [str(w) for w in words], 1)
    return f" (did you mean {found[0]}?)" if found else ""


# ---- a command line --------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, for `guard` to show."""

    def __init__(self, **settings):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **settings)

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, argv=None):
        """As argparse does, but an unknown flag is named with the closest known one."""
        found, unknown = self.parse_known_args(argv)
        for word in unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise ValueError(f"unknown argument {word}{close_to(word.split('=')[0], flags)}")
        return found


def parse(cls, argv=None, doc=""):
    """An instance of the dataclass cls from the command line; ValueError for bad input.

    With --resume RUN the values come from RUN's args.json; see `resume`.
    """
    parser = Parser(description=doc, argument_default=argparse.SUPPRESS)
    groups, hints = {}, typing.get_type_hints(cls)
    for group, field, text in _described(cls):
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        flag, kind = "--" + field.name.replace("_", "-"), hints[field.name]
        text = text.replace("%", "%%")
        text += f" [{field.default}]" if field.default is not None else ""
        if kind is bool:  # --flag, --no-flag, --flag on, --flag off
            off = {"dest": field.name, "action": "store_const", "const": False}
            groups[group].add_argument("--no-" + flag[2:], **off, help=argparse.SUPPRESS)
            on = {"nargs": "?", "const": True, "type": _switch, "metavar": "on|off"}
            groups[group].add_argument(flag, **on, help=text)
            continue
        metavar = field.name.split("_")[-1].upper()
        if typing.get_origin(kind) is typing.Literal:
            metavar, kind = "|".join(typing.get_args(kind)), str
        groups[group].add_argument(flag, metavar=metavar, help=text, type=_bare(kind))
    given = vars(parser.parse_args(one_spelling(sys.argv[1:] if argv is None else argv)))
    if "resume" in given:
        return resume(given.pop("resume"), cls, **given)
    args = cls(**given)
    check(args)
    return args


def _switch(text):
    """True of on, False of off."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"wanted on or off, got {text}")
    return text == "on"


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


def one_spelling(argv):
    """The command line with --lambda_gp as --lambda-gp, and negative numbers tied to their flag."""
    words = []
    for word in argv:
        if re.match(r"-(\d|\.\d|inf|nan)", word) and words and re.fullmatch(r"--[\w-]+", words[-1]):
            words[-1] += "=" + word  # argparse takes -1e-3 for a flag
        else:
            words.append(re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word))
    return words


# ---- a run folder ----------------------------------------------------------------------------


def read_args(folder):
    """args.json of a run folder; ValueError where there is none or it cannot be read."""
    path = Path(folder) / "args.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))  # editors put a mark before it
        if not isinstance(saved["script"], str) or not isinstance(saved["args"], dict):
            raise TypeError("it has no script and args")
    except FileNotFoundError:
        raise ValueError(f"{folder} is no run folder: it has no args.json") from None
    except (NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read as the arguments of a run: {e!r}") from None
    return saved


def args_of(folder, cls, **changes):
    """An instance of the dataclass cls with the values of a run folder, but for the changes."""
    values = read_args(folder)["args"] | changes
    try:
        args = cls(**values)
    except TypeError as e:
        path = Path(folder) / "args.json"
        raise ValueError(f"{path} holds other arguments than its script takes: {e}") from None
    check(args)
    return args


def resume(folder, cls, **given):
    """Arguments to go on with a run: those of its folder, but for what is given anew.

    given: by name; an old value typed again is no change, nor is the auto, 0 or None of what the
    run resolved. A new number of steps lifts a time limit of the old arguments, and the other way
    round. ValueError for anything else than MAY_CHANGE or the place of a folder of images.
    """
    saved = read_args(folder)
    mine = Path(inspect.getsourcefile(cls)).stem
    if saved["script"] != mine:
        raise ValueError(f"{folder} was made by {saved['script']}.py, not by {mine}.py")
    old, changes = saved["args"], {}
    for name, value in given.items():
        unset = (name in RESOLVED and value in ("auto", 0)) or value is None
        if unset or value == old.get(name):
            continue
        moved = name == "dataset" and os.path.isdir(value)  # the checkpoint knows its pixels
        if name not in MAY_CHANGE and not moved:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} cannot change with --resume (it was {old.get(name)}, got {value}); only "
                f"{', '.join(MAY_CHANGE)} can, and dataset to where a folder is now"
            )
        changes[name] = value
    if ("steps" in changes) != ("max_minutes" in changes):
        changes = {"steps": None, "max_minutes": None} | changes
    return args_of(folder, cls, resume=RunFolder(folder), **changes)


def take_over(args):
    """In Python, Args(resume=RUN, steps=8000): fill in those of RUN where none was given."""
    if args.resume and not isinstance(args.resume, RunFolder):
        default = vars(type(args)(resume=args.resume))
        given = {k: v for k, v in vars(args).items() if k != "resume" and v != default[k]}
        vars(args).update(vars(resume(args.resume, type(args), **given)))


# ---- exit codes ------------------------------------------------------------------------------


def cli(main, cls, doc):
    """Run a script from the command line; see guard."""
    guard(lambda: main(parse(cls, doc=doc)))


def guard(command):
    """Call command; one `error:` line and an exit code take the place of a traceback."""
    try:
        command()
    except (ValueError, OSError) as e:
        code = 2
        named = isinstance(e, OSError) and e.filename and e.strerror
        message = f"{e.strerror}: {e.filename}" if named else str(e)
    except (NotSaved, Diverged, processes.Lost) as e:
        code, message = 1, str(e)
    except MemoryError as e:
        code, message = 1, f"out of memory: {e}"
    except RuntimeError as e:
        code, message = 1, f"out of memory; try a smaller --batch-size or --width: {e}"
        if processes.is_connection_error(e):  # from a collective in a script's own update
            message = f"another process of this run ended or does not answer: {e}"
        elif "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
    except Stopped as e:
        code, message = 128 + e.signum, ""
        if processes.rank() == 0:
            terminal.close()
            terminal.note(str(e), always=True)
        processes.stop()
    except KeyboardInterrupt:
        code, message = 130, ""
    else:
        if processes.stop():  # threads of gloo can outlive the interpreter, whose end then aborts
            terminal.flush()
            os._exit(0)
        return
    if message and processes.rank():
        message = f"process {processes.rank()}: {message}"
    if message:
        terminal.error(" ".join(message.split()))
    terminal.close()
    raise SystemExit(code)
