"""SIGINT, SIGTERM and SIGHUP as something to be asked for between two updates."""
import signal
import threading

from common import processes


class Interrupted(BaseException):
    """A signal came during interruptible work."""


class Signals:
    """Notes the last signal in .caught from catch() to release(), which puts old handlers back."""

    def __init__(self):
        self.caught, self._interruptible, self._before = None, False, {}

    def catch(self):
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):  # Windows has no SIGHUP
                signum = getattr(signal, name)
                self._before[signum] = signal.signal(signum, self._note)

    def release(self):
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, signum, frame):
        self.caught = signum
        if not processes.launched():  # torchrun passes on what the terminal sends to all anyway
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends at once
        if self._interruptible:
            raise Interrupted

    def interruptible(self, work):
        """work(), or None where a signal came before its end."""
        if self.caught is not None:
            return None
        try:
            self._interruptible = True
            return work()
        except Interrupted:
            return None
        finally:
            self._interruptible = False
