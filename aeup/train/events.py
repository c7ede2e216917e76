"""TensorBoard's event files, written at once and by this thread.

The package's own writer writes from a thread: a full disk shows as a traceback of that thread, and late.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import time
from pathlib import Path
from typing import Any

from PIL import Image

from aeup.train.config import ConfigError


def event_writer(wanted: bool | None) -> type[EventFile] | None:
    """What writes event files, if they are wanted; None: where the package is installed.

    Raises:
        ConfigError: it cannot be imported.
    """
    if wanted is None:
        wanted = importlib.util.find_spec("tensorboard") is not None
    if not wanted:
        return None
    try:
        _tensorboard()
    except ImportError as e:
        raise ConfigError(f'event files need tensorboard ({e}): pip install "aeup[train]", or --no-tensorboard') from e
    return EventFile


class EventFile:
    """A new event file in `folder`. With `purge`, TensorBoard forgets what older files hold from that step on.

    Raises:
        OSError: it cannot be written; the error names the file.
    """

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        self.Event, self.SessionLog, self.Summary, writer = _tensorboard()
        began = time.time_ns()
        self.path = folder / f"events.out.tfevents.{began // 10**9:010}.{socket.gethostname()}.{os.getpid()}.{began}"
        with self._named():
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "wb")  # noqa: SIM115, until `close`
        self.writer = writer(self.file)
        self._write(file_version="brain.Event:2")
        if purge is not None:
            self._write(step=purge, session_log=self.SessionLog(status=self.SessionLog.START))

    def add(self, step: int, scalars: dict[str, float], images: list[Path]) -> None:
        """Scalars by name, and the PNG files `images`, each under its name."""
        values = [self.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        for path in images:
            with Image.open(path) as image:
                (width, height), depth = image.size, len(image.getbands())
            size = {"width": width, "height": height, "colorspace": depth}
            image = self.Summary.Image(encoded_image_string=path.read_bytes(), **size)
            values.append(self.Summary.Value(tag=path.stem, image=image))
        self._write(step=step, summary=self.Summary(value=values))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # all that was written is in the file, or its error was raised then
            self.file.close()

    def _write(self, **event: Any) -> None:
        with self._named():
            self.writer.write(self.Event(wall_time=time.time(), **event).SerializeToString())
            self.file.flush()

    @contextlib.contextmanager
    def _named(self) -> Any:
        try:
            yield
        except OSError as e:  # a write's error does not name the file
            raise OSError(e.errno, e.strerror, str(self.path)) from e


def _tensorboard() -> tuple[Any, Any, Any, Any]:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    return Event, SessionLog, Summary, RecordWriter
