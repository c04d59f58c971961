"""Signals that ask to stop, as Ctrl-C does: noted at once, obeyed between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# SIGHUP comes when a terminal's connection is lost, SIGUSR1 is what schedulers are asked to send
# before a job's time is up. Windows has neither.
_HANGUP = 1  # SIGHUP, also where it is not known
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
# Launchers (torchrun, timeout) pass on a signal that the terminal or the scheduler has already sent
# to all processes: what comes within this many seconds is the same request.
_SAME_REQUEST = 1.0


class StopSignals:
    """While entered, the first such signal sets `received`, and one a second later kills.

    A torchrun that is killed leaves its processes behind: that counts as SIGHUP. Entered outside of
    the main thread, which alone may choose what signals do, it leaves them as they are.
    """

    def __init__(self) -> None:
        self._received = 0
        self._launcher = os.getppid() if os.environ.get("TORCHELASTIC_RUN_ID") else None
        self._before: dict[int, Any] = {}

    @property
    def received(self) -> int:
        """Number of the signal that asked to stop, 0 before."""
        if self._launcher is not None and os.getppid() != self._launcher and not self._received:
            self._received = _HANGUP
            _say("torchrun is gone; stopping after this step and saving")
        return self._received

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _SIGNALS:
            if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started by nohup
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)
        # A second signal leaves no chance to bring back a cursor that the progress bar hides.
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        _say(f"{cursor}\nstopping after this step and saving; once more stops at once")
        time.sleep(_SAME_REQUEST)
        # Not a handler of our own: that would wait for a step that hangs.
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # Ctrl-C ends the reader of a pipe, such as tee, as well
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
