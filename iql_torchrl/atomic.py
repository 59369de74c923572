"""Files that are written whole or not at all, and paths that lead to a file and to nothing else."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFile(OSError):
    """A path where no regular file is; the message says what is there, to stand after the path."""


def regular_file(path: str | Path) -> Path:
    """The path, if a regular file is there. Nothing is opened: to open a named pipe waits for its other end.

    Raises:
        NotAFile: there is none.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise NotAFile("does not exist") from None
    except (OSError, ValueError) as error:  # a folder that may not be entered, too long a name, a null in it
        raise NotAFile(f"cannot be looked at ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(mode):
        raise NotAFile(f"is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
    return path


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, fsync it and rename it to ``path``.

    What a killed process left of an earlier attempt at the same file is removed.
    """
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _locked(temporary) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # under its lock: unlocked, it would look like a leftover
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """:func:`write_atomically` of a text, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in a folder; those of a live process stay.

    A live process is one of that number on this machine, or, in another container or on another machine, one that
    holds the file's lock.

    Args:
        folder: not those below it; it may be absent.
        name: of the file that they were to become; all where not given.
    """
    try:
        found = [entry.name for entry in os.scandir(folder)]
    except OSError:  # which the writing itself will say, if it is needed
        return
    for leftover in found:
        match = _TEMPORARY.fullmatch(leftover)
        if match and name in (None, match["name"]):
            _remove_abandoned(folder / leftover, int(match["process"]))


def _locked(temporary: Path) -> BinaryIO:
    """The file, open for writing, and locked as long as it is open."""
    while True:
        file = open(temporary, "wb")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, on which nobody can take one
            return file
        try:
            if os.stat(temporary).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()  # between opening and locking it was taken for a leftover


def _remove_abandoned(path: Path, process: int) -> None:
    if process != os.getpid() and _is_alive(process):
        return
    # Locked, gone, no file, another user's, or on a file system that cannot tell: it stays.
    with contextlib.suppress(OSError), open(regular_file(path), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()  # while locked: who waits for the lock must find that the file is gone


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
