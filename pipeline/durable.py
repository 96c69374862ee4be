"""Files that are there whole or not at all, whenever the process is killed, the disk is full or the power goes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""Disk full, file larger than this process or this file system may write, quota used up."""


def publish(path: Path, data: bytes) -> None:
    """Write a file: temporary file, fsync, rename, fsync of the folder.

    A reader sees the old file or the new one, and the last of several writers wins.

    Raises:
        OSError: It can't be written; the old file is as it was, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may publish the same file at once
    try:
        with temporary.open("wb") as file:
            write_all(file.fileno(), data)
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (tests make exactly this call fail)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes; the system may take a part at a time, and does when the disk is nearly full."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows can't open a folder; its rename is journalled
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether there was no room to write."""
    return error.errno in NO_ROOM
