"""Ctrl-C and SIGTERM during training."""

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
    does not wait."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.before: dict[int, Any] = {}

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

    def check(self) -> None:
        """Raises Interrupted if a signal came."""
        if self.signum is not None:
            raise Interrupted(signal.Signals(self.signum).name, self.signum)
