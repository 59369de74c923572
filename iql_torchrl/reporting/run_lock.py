"""A run folder belongs to one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from pathlib import Path
from typing import BinaryIO

from iql_torchrl.errors import ConfigurationError

_NAME = ".lock"
_SECONDS_BETWEEN_LOOKS = 0.1


class RunLock:
    """Holds a run folder for this process, from before its checkpoints are read until its summary is written.

    >>> with RunLock(folder, wait=30):
    ...     run = Run(step, data, options, folder)

    The lock is the kernel's, on the file ``.lock`` in the folder: it ends with the process, also by SIGKILL, so that
    none is ever stale. A file that a killed process left locks nothing. On a file system that has no locks, none is
    taken.

    Args:
        folder: of the run; made on entering where it does not exist, and removed on leaving where it is empty.
        wait: seconds for which a folder in use is waited for, by a job whose predecessor may still be ending.
        option: that names the folder, in errors.
    """

    def __init__(self, folder: Path, *, wait: float = 0.0, option: str = "run_dir") -> None:
        self.folder = folder
        self.wait = wait
        self.option = option
        self._file: BinaryIO | None = None

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            ConfigurationError: another process has it, which is named, or the folder cannot be written.
        """
        path = self.folder / _NAME
        limit, told = time.monotonic() + self.wait, False
        while self._file is None:
            try:
                _make(self.folder)
                with contextlib.suppress(FileNotFoundError):  # the folder, removed since by who had it
                    self._file = _locked(path)
            except BlockingIOError:
                if time.monotonic() >= limit:
                    raise ConfigurationError(self._in_use(path)) from None
                if not told:
                    print(f"{self.option}={self.folder} is in use by {_holder(path)}; waiting up to {self.wait:g} s")
                    told = True
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            except OSError as error:
                raise ConfigurationError(f"{self.option}={self.folder} cannot be written: {error}.") from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            (self.folder / _NAME).unlink()  # while locked: who waits for the lock must find that the file is gone
        self._file.close()
        self._file = None
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # of a run that never began

    def _in_use(self, path: Path) -> str:
        waited = f", still after {self.wait:g} s" if self.wait else ""
        return (
            f"{self.option}={self.folder} is in use by {_holder(path)}{waited}: wait until that run ends, or "
            f"stop it, or name another {self.option}."
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file, or a folder that who had it removed before mkdir asked whether it is one
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise


def _holder(path: Path) -> str:
    holder = ""
    with contextlib.suppress(OSError):
        holder = path.read_text(errors="replace").strip()
    return holder or "another process"


def _locked(path: Path) -> BinaryIO | None:
    """The file, open and locked; ``None`` where it was removed between the two.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be written.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the lock is held)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            return file
        if os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:
            raise FileNotFoundError(path)
        with contextlib.suppress(OSError):  # a full disk: the lock is taken without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except FileNotFoundError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
