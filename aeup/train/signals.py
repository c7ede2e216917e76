"""Ctrl-C, SIGTERM and dead loaders during training."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal (``signum``); the last whole checkpoint is on the disk."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Stop:
    """As a context, takes SIGINT and SIGTERM. The first one waits for the next `check`: raised where it comes, it can
    hit a C extension half way through its import, or autograd's engine, and then the process dies of that. A second one
    does not wait.

    The error that torch's handler of SIGCHLD raises when a loader's process dies waits too: raised inside torch, it can
    be taken for another (a look-up of an operator makes "no such operator" of any RuntimeError)."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.before: dict[int, Any] = {}
        self.error: RuntimeError | None = None

    def __enter__(self) -> Stop:
        self.pid = os.getpid()
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            self.before = {s: signal.signal(s, self._take) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _take(self, signum: int, frame: object) -> None:
        first, self.signum = self.signum is None, signum
        if os.getpid() != self.pid or not first:  # a loader's process has the handlers too, and nothing to finish
            self.check()
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    def _take_child(self, signum: int, frame: object) -> None:
        try:
            self.before[signum](signum, frame)
        except RuntimeError as e:
            self.error = e

    def check(self) -> None:
        """Raises Interrupted if a signal came, RuntimeError if a loader's process died."""
        # torch sets its handler with its first loader that has processes: after __enter__.
        if self.before and signal.SIGCHLD not in self.before and callable(handler := signal.getsignal(signal.SIGCHLD)):
            self.before[signal.SIGCHLD] = handler  # first: a signal may come between the two lines
            signal.signal(signal.SIGCHLD, self._take_child)
        if self.error is not None:
            raise self.error
        if self.signum is not None:
            raise Interrupted(signal.Signals(self.signum).name, self.signum)
