"""What a person sees: a progress line and notes on stderr, results on stdout.

A terminal that is gone, closed, or cannot show a character never ends a training: what cannot be
written is dropped.
"""
import os
import shutil
import sys
import time

EVERY = 10.0  # seconds between lines where a line cannot be rewritten
REDRAW = 0.1  # seconds between redraws where it can

quiet = False  # set once by run.setup or a command; silences progress and notes, never warnings
_last = 0.0
_open = False  # a rewritten line stands on the terminal without its newline


def _write(stream, text):
    if stream is None:  # closed before Python started
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        stream.flush()
    except (OSError, ValueError):  # its reader has gone, or it was closed
        try:
            gone = os.open(os.devnull, os.O_WRONLY)
            os.dup2(gone, stream.fileno())  # so that Python's own flush at the end finds a reader
            os.close(gone)
        except (OSError, ValueError):
            pass


def _is_terminal():
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def color(text, code):
    """text in an ANSI colour, plain where stderr is no terminal or NO_COLOR is set."""
    if not _is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{code}m{text}\033[0m"


def progress(text, now=False):
    """Show text as the progress line. Calls may come often; they are thinned out, except now."""
    global _last, _open
    rewritten, t = _is_terminal(), time.monotonic()
    if quiet or (not now and t - _last < (REDRAW if rewritten else EVERY)):
        return
    _last = t
    if rewritten:
        width = shutil.get_terminal_size().columns - 1
        _write(sys.stderr, "\r\033[K" + text[:width])
    else:
        _write(sys.stderr, text + "\n")
    _open = rewritten


def note(text, always=False):
    """One whole line on stderr, below the progress line; silent when quiet, unless always."""
    if always or not quiet:
        close()
        _write(sys.stderr, text + "\n")


def warn(text):
    """A warning on a line of its own; also when quiet."""
    close()
    _write(sys.stderr, f"{color('warning:', 33)} {text}\n")


def error(text):
    """The one line that a failed command ends with."""
    close()
    _write(sys.stderr, f"{color('error:', 31)} {text}\n")


def result(text):
    """What a command was called for, on stdout."""
    close()
    _write(sys.stdout, text + "\n")


def close():
    """End a rewritten progress line, so that what is printed next starts on its own line."""
    global _open
    if _open:
        _write(sys.stderr, "\n")
    _open = False


def flush():
    for stream in (sys.stdout, sys.stderr):
        _write(stream, "")


def track(items, what, total=None):
    """Iterate over items and show "what 12/64 (19 %)" meanwhile."""
    total = len(items) if total is None else total
    for i, item in enumerate(items):
        yield item
        progress(f"{what} {i + 1}/{total} ({100 * (i + 1) // max(total, 1)} %)")
