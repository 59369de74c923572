"""Whether the other processes of a run are alive, where none of them has closed its connections."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

# A machine that is lost stops the others within a minute: torchrun, which may have to kill a process, takes half of it.
_SILENCE = 30.0
_INTERVAL = 2.0


def watch_the_others(rank: int, count: int) -> None:
    """End this process where another gives no sign of life for half a minute, with one line that says so.

    A machine that loses its power or its network, and a process that is stopped, close no connection: what waits for
    them waits for as long as for an evaluation. So each process counts in ``torchrun``'s store, from a thread of its
    own, and looks whether the others do, however long what they are at takes.

    Args:
        rank: of this process.
        count: of processes.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connection = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_SILENCE / 2))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"iql_torchrl/pulse/{attempt}", connection)
    done = threading.Event()

    def leave() -> None:
        done.set()
        thread.join(_SILENCE)
        with contextlib.suppress(RuntimeError):  # where torchrun has ended before
            store.set(f"left-{rank}", "")

    def look() -> None:
        others = [one for one in range(count) if one != rank]
        reached = looked = time.monotonic()
        seen: dict[int, tuple[int, float]] = dict.fromkeys(others, (0, reached))
        while not done.wait(_INTERVAL):
            now = time.monotonic()
            if now - looked > _SILENCE / 2:  # stopped itself, it is no judge of the others
                reached, seen = now, {other: (beats, now) for other, (beats, _) in seen.items()}
            try:
                store.add(f"beat-{rank}", 1)
                for other in others:
                    beats = store.add(f"beat-{other}", 0)
                    if beats != seen[other][0] or store.check([f"left-{other}"]):
                        seen[other] = (beats, now)
                reached = now
            except RuntimeError:
                if time.monotonic() - reached > _SILENCE:
                    _end(f"torchrun on the machine of the first of the {count} processes of this run does not answer")
            looked = time.monotonic()
            for other, (_, last) in seen.items():
                if reached == now and now - last > _SILENCE:
                    _end(f"process {other} of the {count} of this run gives no sign of life")

    thread = threading.Thread(target=look, name="pulse", daemon=True)
    thread.start()
    atexit.register(leave)


def _end(what: str) -> None:
    # From a thread, while the other waits in the middle of an exchange: there is no error that it could raise.
    print(
        f"error: {what} for {_SILENCE:g} s, so that this one stops too: start them again with resume=auto, which goes "
        "on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
