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
    # When the store answered, and when each of the others had counted on.
    heard = dict.fromkeys(["store", *(one for one in range(count) if one != rank)], time.monotonic())

    def count_on() -> None:
        beats = dict.fromkeys(heard, 0)
        while not done.wait(_INTERVAL):
            with contextlib.suppress(RuntimeError):
                store.add(f"beat-{rank}", 1)
                for other in heard:
                    found = 0 if other == "store" else store.add(f"beat-{other}", 0)
                    if found != beats[other] or other == "store" or store.check([f"left-{other}"]):
                        beats[other], heard[other] = found, time.monotonic()

    def judge() -> None:
        # In a thread of its own, as the store of a machine that is lost may hold the other up.
        looked = time.monotonic()
        while not done.wait(_INTERVAL):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > _SILENCE / 2:  # stopped itself, it is no judge of the others
                heard.update(dict.fromkeys(heard, now))
            if now - heard["store"] > _SILENCE:
                _end(f"torchrun on the machine of the first of the {count} processes of this run does not answer")
            for other, last in heard.items():
                if now - last > _SILENCE:
                    _end(f"process {other} of the {count} of this run gives no sign of life")

    threads = [threading.Thread(target=target, name="pulse", daemon=True) for target in (count_on, judge)]

    def leave() -> None:
        done.set()
        threads[0].join(2 * _INTERVAL)
        with contextlib.suppress(RuntimeError):  # where torchrun has ended before
            store.set(f"left-{rank}", "")

    atexit.register(leave)
    for thread in threads:
        thread.start()


def _end(what: str) -> None:
    # From a thread, while the other waits in the middle of an exchange: there is no error that it could raise.
    print(
        f"error: {what} for {_SILENCE:g} s, so that this one stops too: start them again with resume=auto, which goes "
        "on from the last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
