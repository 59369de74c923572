"""A file from an address, whole or not at all: retried, and resumed where the server allows it."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from iql_torchrl.atomic import write_text_atomically
from iql_torchrl.errors import first_line

ATTEMPTS = 4
# Seconds before the second attempt; each further one waits twice as long.
BACK_OFF = 1.0
_BLOCK = 1 << 20
# Faults of the disk that the file is written to.
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Downloaded:
    """Size in bytes, and SHA-256, of a file that has arrived."""

    size: int
    sha256: str


class DownloadError(OSError):
    """A file that did not arrive, with the reason as its message."""


def download(url: str, path: Path, *, label: str, timeout: float = 60.0) -> Downloaded:
    """Fetch ``url`` to ``path`` with a progress bar.

    A transfer that breaks off is tried again, after a pause that doubles. Where the server names the version of the
    file (``ETag`` or ``Last-Modified``) and serves ranges, what has arrived is kept beside ``path``, so that the next
    attempt, of this process or of a later one, goes on from there; elsewhere it starts again and leaves nothing.

    Args:
        url: http, https or file.
        path: where the file is put once it is whole.
        label: of the bar.
        timeout: seconds without an answer that end an attempt.

    Raises:
        DownloadError: after the last attempt, or at once where another would not help (an error status that says so, an
            address that cannot be one).
        OSError: ``path`` cannot be written.
    """
    if url.split(":")[0].lower() not in ("http", "https", "file"):
        raise DownloadError("its address must begin with http:, https: or file:")
    partial = _Partial(path.with_name(f"{path.name}.partial"), url)
    pause = BACK_OFF
    if partial.total is not None and partial.size == partial.total:  # whole, but for the process that was killed then
        return partial.finish(path)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(url, partial, label, timeout)
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(getattr(error, "reason", None) or first_line(error))
            if isinstance(error, urllib.error.HTTPError):
                reason = f"status {error.code}, {error.reason}"
            if not partial.resumable:
                partial.discard()
            if getattr(error, "errno", None) in _LOCAL and not isinstance(error, urllib.error.URLError):
                raise  # the disk's fault, not the server's
            if attempt == ATTEMPTS or not _worth_another_attempt(error):
                tries = f" after {attempt} attempts" if attempt > 1 else ""
                raise DownloadError(f"{reason}{tries}") from error
            tqdm.write(f"{label}: {reason}; trying again in {pause:g} s")
            time.sleep(pause)
            pause *= 2
    return partial.finish(path)


@contextmanager
def alone(path: Path, note: str) -> Iterator[None]:
    """Hold the lock of a file, which another process may hold: then print ``note`` and wait.

    Raises:
        OSError: the file cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        tqdm.write(f"{note}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Partial:
    """What has arrived of a file, and of which version of it."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self._description = path.with_name(f"{path.name}.json")
        try:
            known = json.loads(self._description.read_text())
            self.version: str | None = known["version"] if known["url"] == url else None
            self.total: int | None = known["total"]
        except (OSError, ValueError, KeyError, TypeError):
            self.version = self.total = None
        if self.version is None or (self.total is not None and self.size > self.total):
            self.discard()

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def resumable(self) -> bool:
        return self.version is not None

    def begin(self, version: str | None, total: int | None) -> None:
        """A first byte is about to arrive, of this version of the file, of so many bytes."""
        self.discard()
        if version is not None:
            text = json.dumps({"url": self.url, "version": version, "total": total})
            write_text_atomically(self._description, text)
        self.version, self.total = version, total

    def finish(self, path: Path) -> Downloaded:
        """The file is whole."""
        with open(self.path, "rb") as file:
            found = Downloaded(self.size, hashlib.file_digest(file, "sha256").hexdigest())
        self.path.replace(path)
        self._description.unlink(missing_ok=True)
        return found

    def discard(self) -> None:
        self.version = self.total = None
        self.path.unlink(missing_ok=True)
        self._description.unlink(missing_ok=True)


def _fetch(url: str, partial: _Partial, label: str, timeout: float) -> None:
    """One attempt, from the byte on that is missing."""
    request = urllib.request.Request(url)
    if partial.size:
        request.add_header("Range", f"bytes={partial.size}-")
        request.add_header("If-Range", partial.version or "")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left of the range: what is here belongs to another file
            partial.discard()
        raise
    with response:
        if response.status == 206:
            _refuse_another_rest(response.headers, partial)
        else:
            length = response.headers.get("Content-Length")
            if length and not length.isdigit():
                raise OSError(f"the server announced a length of {length!r}")
            partial.begin(_version(response.headers), int(length) if length else None)
        total = partial.total
        with (
            open(partial.path, "ab") as file,
            tqdm(total=total, initial=partial.size, unit="B", unit_scale=True, desc=f"download {label}") as bar,
        ):
            while block := response.read1(_BLOCK):  # what is there, not a whole block: a stall may follow
                file.write(block)
                bar.update(len(block))
        if total is not None and partial.size != total:
            size = partial.size
            if size > total:
                partial.discard()
            raise OSError(f"got {size} bytes of {total}")


def _version(headers: Any) -> str | None:
    """What tells that the rest of a file belongs to its beginning; ``None`` where the server cannot resume."""
    if headers.get("Accept-Ranges", "").lower() != "bytes":
        return None
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _refuse_another_rest(headers: Any, partial: _Partial) -> None:
    """The rest that a server sends must begin where it was asked to, and be of the same version and length."""
    start, _, total = str(headers.get("Content-Range")).rpartition("/")
    of_same = start.startswith(f"bytes {partial.size}-") and (
        partial.total is None or total in ("*", str(partial.total))
    )
    names = {headers.get("ETag"), headers.get("Last-Modified")} - {None}
    if not of_same or (names and partial.version not in names):
        found = f"{headers.get('Content-Range')} of version {headers.get('ETag') or headers.get('Last-Modified')}"
        wanted = f"bytes {partial.size}- of {partial.total} of version {partial.version}"
        partial.discard()
        raise OSError(f"the server sent {found} where {wanted} was asked for")
    if total.isdigit():
        partial.total = int(total)


def _worth_another_attempt(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 416, 429)
    if isinstance(error, urllib.error.URLError):
        # A refused connection, a name that is not found now; but no unknown kind of address, no missing local file.
        missing = FileNotFoundError | IsADirectoryError | PermissionError
        return isinstance(error.reason, OSError) and not isinstance(error.reason, missing)
    return not isinstance(error, ValueError | http.client.InvalidURL)
