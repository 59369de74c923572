"""One run by several processes, which ``torchrun`` starts: each has a share of every batch, gradients are averaged.

A process among several is a rank. All of them hold the same parameters, data and samplers, draw the same rows, take
their own share of them, and make the same update of the mean gradient. The first alone evaluates, writes and prints.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from iql_torchrl.configuration.declaring import Options
from iql_torchrl.configuration.launching import launched_count, launched_rank
from iql_torchrl.errors import ConfigurationError, RankError, UserError
from iql_torchrl.training.devices import resolve_device
from iql_torchrl.training.pulse import watch_the_others

Result = TypeVar("Result")

# For which the others wait while the first evaluates, writes and draws. That a process has ended is known at once, and
# that one is silent by its pulse.
_PATIENCE = timedelta(hours=2)
# Of an error that PyTorch raises, or a compiled graph, where another process has ended.
_SIGNS = ("gloo", "c10d_functional", "nccl")
_functional = torch.ops._c10d_functional


def seed_apart(number: int) -> None:
    """Let torch's generators go on elsewhere, from where they are and a number."""
    torch.manual_seed(int(torch.randint(2**62, ())) + number)


class Ranks:
    """The processes of a run, seen from one of them; every method is called by all of them, or by none.

    Args:
        rank: which of them this one is.
        count: how many there are.
        device: on which this one trains.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.count = count
        self.device = device or torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the one that evaluates, writes and prints."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """Transitions of a batch that each has.

        Raises:
            ConfigurationError: a batch that cannot be divided.
        """
        if batch_size % self.count:
            below = batch_size - batch_size % self.count
            nearest = " or ".join(str(size) for size in (below, below + self.count) if size)
            raise ConfigurationError(
                f"algorithm.batch_size={batch_size} cannot be divided among {self.count} processes; give a multiple of "
                f"{self.count}, such as {nearest}, or start another number of them."
            )
        return batch_size // self.count

    def share(self, rows: Tensor) -> Tensor:
        """This one's part of the rows of a batch, ``[..., B]`` to ``[..., B / count]``."""
        return rows if self.count == 1 else rows.chunk(self.count, -1)[self.rank].clone()

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes, of all by one all-reduce. Can be recorded and compiled."""
        if self.count == 1:
            return list(tensors)
        joined = torch.cat([tensor.detach().reshape(-1).to(tensors[0].dtype) for tensor in tensors])
        total = _functional.wait_tensor(_functional.all_reduce(joined, "sum", dist.group.WORLD.group_name))  # type: ignore[union-attr]
        pieces = (total / self.count).split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]

    def largest(self, value: int) -> int:
        """The largest of their values."""
        found = torch.tensor(int(value))
        if self.count > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What the function returns where the first calls it; the others do not.

        Raises:
            UserError: of the function, in the first; SystemExit in the others, as everywhere here.
        """
        if self.count == 1:
            return function()
        answer: list[Any] = [None, ""]
        error: UserError | None = None
        if self.first:
            try:
                answer[0] = function()
            except UserError as raised:
                error, answer[1] = raised, str(raised)
        with self.watching():
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if answer[1]:
            self._stop(error or RankError(answer[1]))
        return answer[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one of them cannot do stops all of them, with its error, which the first raises."""
        if self.count == 1:
            yield
            return
        error: UserError | None = None
        try:
            yield
        except RankError:  # of all of them
            raise
        except UserError as raised:
            error = raised
        self._raise_errors(self._exchange("" if error is None else str(error)), error)

    def compare(self, what_to_do: str, found: Mapping[str, Any]) -> None:
        """Stop where they differ in what must be the same.

        Args:
            what_to_do: in that case, for the message.
            found: in this one, by name.

        Raises:
            RankError: naming the first difference.
        """
        if self.count == 1:
            return
        answers = self._exchange(dict(found))
        self._raise_errors(answers, None)
        for rank, answer in enumerate(answers[1:], start=1):
            different = [name for name in answers[0] if answers[0][name] != answer.get(name)]
            if different:
                values = "; ".join(f"{name} is {answers[0][name]} and {answer.get(name)}" for name in different)
                self._stop(RankError(f"processes 0 and {rank} of this run differ: {values}; {what_to_do}."))

    def seed_apart(self) -> None:
        """Let the others draw other random numbers than the first, for dropout, from its seed or restored state."""
        if not self.first:
            seed_apart(self.rank)

    @contextmanager
    def watching(self, what_to_do: str = "start them again") -> Iterator[None]:
        """What PyTorch raises when another process has ended, as an error that says so.

        Raises:
            RankError: with ``what_to_do``.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in _SIGNS)
            if self.count == 1 or not lost:
                raise
            raise RankError(
                f"another of the {self.count} processes of this run has ended, or cannot be reached, so that this one "
                f"stops too: {what_to_do}."
            ) from error

    def _exchange(self, content: Any) -> list[Any]:
        answers: list[Any] = [None] * self.count
        with self.watching():
            dist.all_gather_object(answers, content)
        return answers

    def _raise_errors(self, answers: Sequence[Any], own: UserError | None) -> None:
        """Texts among the answers are errors; one process may be here while another compares."""
        for rank, answer in enumerate(answers):
            if isinstance(answer, str) and answer:
                self._stop(own if own is not None and rank == self.rank else RankError(f"process {rank}: {answer}"))

    def _stop(self, error: UserError) -> NoReturn:
        """All of them know of the error: one says it."""
        if self.first:
            raise error
        raise SystemExit(2)


def join_ranks(options: Options | None = None, device: str = "auto") -> Ranks:
    """The processes that ``torchrun`` has started, or this one alone, and the device of this one.

    They talk by gloo, between GPUs by NCCL, each with the GPU of its place on its machine.

    Args:
        options: which must be the same in all of them, but for the run folder.
        device: ``train.device``.

    Raises:
        ConfigurationError: a device that is not available.
        RankError: processes with different options, or that do not find each other.
    """
    count = launched_count()
    if count == 1:
        return Ranks(device=resolve_device(device))
    ranks = Ranks(launched_rank(), count)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    with ranks.watching():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
        watch_the_others(ranks.rank, count)
    if options is not None:
        ranks.compare("start all of them with the same command line", dict(_leaves(options.model_dump())))
    with ranks.together():
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigurationError(
                f"train.device must be auto, cpu or cuda with {count} processes, of which each takes a GPU of its own; "
                f"got {device!r}."
            )
        ranks.device = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else device)
    return ranks


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "run_dir":  # its default tells the time
            yield f"{prefix}{name}", value
