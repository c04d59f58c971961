"""Ctrl-C and SIGTERM as a polite request: noted at once, obeyed between two steps."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers (torchrun, timeout) pass on a signal that the terminal or the scheduler has already sent
# to all processes: what comes within this many seconds is the same request.
_SAME_REQUEST = 1.0


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets ``received``; one a second later kills.

    Attributes:
        received: Number of the signal that asked to stop, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
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
        self.received = number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        # A second signal leaves no chance to bring back a cursor that the progress bar hides.
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        message = "stopping after this step and saving; once more stops at once"
        sys.stderr.write(f"{cursor}\n{message}\n")
        sys.stderr.flush()
        time.sleep(_SAME_REQUEST)
        # Not a handler of our own: that would wait for a step that hangs.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
