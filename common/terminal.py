"""The progress line on stderr: rewritten in place on a terminal, one line each 10 s elsewhere."""
import os
import sys
import time

EVERY = 10.0  # seconds between lines where a line cannot be rewritten
REDRAW = 0.1  # seconds between redraws where it can

quiet = False  # set once by run.start or a command; silences progress, never errors
_last = 0.0
_open = False  # a rewritten line stands on the terminal without its newline


def color(text, code):
    """text in an ANSI colour, plain where stderr is no terminal or NO_COLOR is set."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{code}m{text}\033[0m"


def progress(text, now=False):
    """Show text as the progress line. Calls may come often; they are thinned out here, except now."""
    global _last, _open
    tty = sys.stderr.isatty()
    t = time.monotonic()
    if quiet or (not now and t - _last < (REDRAW if tty else EVERY)):
        return
    _last = t
    if tty:
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        sys.stderr.write("\r\033[K" + text[:width])
    else:
        sys.stderr.write(text + "\n")
    _open = tty
    sys.stderr.flush()


def say(text):
    """One whole line on stderr, below whatever progress line stands there; silent when quiet."""
    if not quiet:
        close()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def close():
    """End a rewritten progress line, so that what is printed next starts on its own line."""
    global _open
    if _open:
        sys.stderr.write("\n")
        sys.stderr.flush()
    _open = False


def track(items, what, total=None):
    """Iterate over items and show "what 12/64 (19 %)" meanwhile."""
    total = len(items) if total is None else total
    for i, item in enumerate(items):
        yield item
        progress(f"{what} {i + 1}/{total} ({100 * (i + 1) // max(total, 1)} %)")
