"""Several simulators of one environment that are stepped together: in this process, or in one of their own."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import SimulatorError

# For a new process, which imports the simulator, besides what a step may take.
_SECONDS_TO_START = 120.0


class Step(NamedTuple):
    """What follows an action; ``success`` is ``None`` where the environment says nothing of the kind.

    ``over`` is either end of an episode, ``terminated`` the one after which there is no value.
    """

    observation: np.ndarray
    reward: float
    over: bool
    success: bool | None
    terminated: bool


def derived_seed(*numbers: int) -> int:
    """A seed below 2^32 for a purpose that numbers tell, such as an episode of a run."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SimulatorLost(SimulatorError):
    """The process of the simulators has ended, or does not answer."""


class Simulators:
    """``count`` simulators in this process, which they end with them, or hold up, where they do.

    Raises:
        SimulatorError: the environment does not start.
    """

    def __init__(self, environment: EnvironmentSpec, count: int) -> None:
        self._environments = [make_environment(environment) for _ in range(count)]

    def reset(self, index: int, seed: int) -> np.ndarray:
        """The first observation of a seeded episode in the simulator of that index."""
        return self._environments[index].reset(seed=seed)[0]

    def step(self, indices: Sequence[int], actions: np.ndarray) -> list[Step]:
        """An action in each of the simulators of these indices."""
        steps = []
        for index, action in zip(indices, actions, strict=True):
            observation, reward, terminated, truncated, info = self._environments[index].step(action)
            over = bool(terminated or truncated)
            steps.append(Step(observation, float(reward), over, _success(info), bool(terminated)))
        return steps

    def send(self, indices: Sequence[int], actions: np.ndarray) -> None:
        """Begin :meth:`step`, which :meth:`receive` ends: in a process of its own, beside what is done in between."""
        self._sent = (indices, actions)

    def receive(self) -> list[Step]:
        """What follows the actions of :meth:`send`."""
        return self.step(*self._sent)

    def restart(self) -> None:
        """Nothing: what is lost in this process is not survived."""

    def close(self) -> None:
        """Release the environments."""
        for environment in self._environments:
            environment.close()


class SimulatorProcess:
    """The same in a process of its own: its end or its silence is an error here, and :meth:`restart` begins another.

    Args:
        environment: as for :class:`Simulators`; registered where a new process finds it: by an importable module, or at
            the top of the program's own file.
        count: how many simulators.
        timeout: seconds after which an answer to :meth:`reset` or :meth:`step` is no longer waited for.
    """

    def __init__(self, environment: EnvironmentSpec, count: int, timeout: float) -> None:
        self._environment, self._count, self._timeout = environment, count, timeout
        self._start()

    def reset(self, index: int, seed: int) -> np.ndarray:
        """As :meth:`Simulators.reset`.

        Raises:
            SimulatorLost: the process has ended, or does not answer.
            SimulatorError: the environment raised an error.
        """
        self._send("reset", index, seed)
        return self._answer()

    def step(self, indices: Sequence[int], actions: np.ndarray) -> list[Step]:
        """As :meth:`Simulators.step`, with the errors of :meth:`reset`."""
        self.send(indices, actions)
        return self.receive()

    def send(self, indices: Sequence[int], actions: np.ndarray) -> None:
        """As :meth:`Simulators.send`, with the errors of :meth:`reset`."""
        self._send("step", indices, actions)

    def receive(self) -> list[Step]:
        """As :meth:`Simulators.receive`, with the errors of :meth:`reset`."""
        return self._answer()

    def restart(self) -> None:
        """End the process, whatever it does, and begin another, in which no episode is running."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        # Not forked: a fork of a process with threads may hang, and would hold its open files.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._environment, self._count)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        # Before multiprocessing waits for its processes: this one ignores SIGTERM, and may hang.
        atexit.register(self.close)
        theirs.close()
        self._started = False

    def _send(self, name: str, *arguments: Any) -> None:
        with self._as_lost():
            if not self._started:
                self._receive(_SECONDS_TO_START)
                self._started = True
            self._connection.send((name, arguments))

    def _answer(self) -> Any:
        with self._as_lost():
            return self._receive(self._timeout)

    @contextlib.contextmanager
    def _as_lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"with status {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
            raise SimulatorLost(f"the simulator of {self._environment.name} ended {how}") from None

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(seconds):
            raise SimulatorLost(f"the simulator of {self._environment.name} did not answer for {seconds:g} s")
        kind, answer = self._connection.recv()
        if kind == "error":
            raise SimulatorError(answer)
        return answer


def _serve(connection: Connection, environment: EnvironmentSpec, count: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a cluster sends to both: the run decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the run has ended
        try:
            simulators = Simulators(environment, count)
            connection.send(("ready", None))
            while True:
                name, arguments = connection.recv()
                connection.send(("answer", getattr(simulators, name)(*arguments)))
        except (EOFError, OSError):
            raise
        except SimulatorError as error:
            connection.send(("error", str(error)))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            connection.send(("error", f"the simulator of {environment.name} failed: {what}"))


def _end_with_parent() -> None:
    """Also where a simulator hangs: a run that was killed leaves no process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)


def _success(info: Mapping[str, Any]) -> bool | None:
    """What a step's information says of success, ``None`` for nothing: Adroit and the mazes flag it, Kitchen lists."""
    for key in ("success", "is_success"):
        if key in info:
            return bool(info[key])
    if "tasks_to_complete" in info:
        return set(info["tasks_to_complete"]) <= set(info.get("episode_task_completions", ()))
    return None
