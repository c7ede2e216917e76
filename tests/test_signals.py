"""What waits for the next check of a training step (aeup/train/signals.py)."""

import os
import signal

import pytest

from aeup.train.signals import Stop


def test_the_error_of_a_dead_loader_waits_for_the_next_check():
    def fails(signum, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed")

    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader in an earlier test may have set torch's
    try:
        with Stop() as stop:
            stop.check()
            signal.signal(signal.SIGCHLD, fails)  # as torch does with its first loader
            stop.check()
            os.kill(os.getpid(), signal.SIGCHLD)
            with pytest.raises(RuntimeError, match="worker .* is killed"):
                stop.check()
        assert signal.getsignal(signal.SIGCHLD) is fails
    finally:
        signal.signal(signal.SIGCHLD, before)
