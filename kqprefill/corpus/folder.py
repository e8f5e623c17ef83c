"""A folder of results, as whoever scores a block sees it: where files are written, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
import os
from pathlib import Path
import platform
from typing import BinaryIO
from uuid import uuid4

from ..errors import KqprefillError

OWN = "_kqprefill"  # a name that readers of data sets pass over (Arrow, Spark and Ray: those that begin with _)


@dataclass(frozen=True)
class Folder:
    """Where results are written; what can go to another process or machine. path: of the folder."""

    path: str

    @property
    def own(self) -> Path:
        """The folder in it that holds no results."""
        return Path(self.path, OWN)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to write: it has its name once it is whole and on disk, or is gone where the work fails.

        Raises KqprefillError where it cannot be written.
        """
        if not self.own.is_dir():
            raise KqprefillError(f"{self.path} is not there on {platform.node()}: all machines must share the folder")
        path, temporary = os.path.join(self.path, name), self.own / f"{uuid4().hex}.tmp"
        try:
            try:
                with open(temporary, "xb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise KqprefillError(f"{path} cannot be written: {error.strerror or error}") from None
