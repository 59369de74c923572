"""A TorchRL replay buffer that a program holds, or a TensorDict of transitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from pydantic import Field

from iql_torchrl.data.log import Log
from iql_torchrl.data.sources.source import Source
from iql_torchrl.data.storage import Allocate
from iql_torchrl.errors import DatasetError

# Where TorchRL's collectors, and this package, number the episodes.
_EPISODES = ("episode", ("collector", "traj_ids"))


class ReplayBufferContent(Source):
    """All transitions of the buffer, its transforms applied, in the order of its storage; they are copied.

    ``observation``, ``action``, and under ``"next"`` ``observation``, ``reward``, ``done``, ``terminated`` and
    ``truncated``, as TorchRL's collectors write them. Every transition has its own next observation, and is kept. Where
    the episodes are numbered (``("collector", "traj_ids")`` or ``episode``), transitions of several environments, which
    a collector interleaves, are brought together. One-hot actions become discrete ones. How the buffer samples does
    not matter: the training step draws uniformly by itself.
    """

    source: Literal["replay_buffer"] = "replay_buffer"
    buffer: Any = Field(exclude=True, repr=False)

    @property
    def label(self) -> str:
        return "replay buffer"

    @property
    def title(self) -> str:
        return "the given replay buffer"

    @property
    def own_next_observations(self) -> bool:
        return True

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The transitions as columns.

        Raises:
            DatasetError: an empty buffer, or one that lacks an entry.
        """
        if not len(self.buffer):
            raise DatasetError(f"{self.title} is empty; extend it with transitions first.")
        content = self.buffer[:]
        names = set(content.keys(True, True)) if hasattr(content, "keys") else set()
        needed = {"observation", "action", ("next", "observation"), ("next", "reward")}
        if not {("next", "terminated"), ("next", "done")} & names:
            needed.add(("next", "done"))
        if missing := needed - names:
            raise DatasetError(
                f"{self.title}: missing {', '.join(sorted(map(repr, missing)))}; found "
                f"{', '.join(sorted(map(repr, names))) or 'nothing'}. Rename entries with content.rename_key_."
            )
        content = content.reshape(-1)

        def array(key: Any) -> np.ndarray:
            return content.get(key).detach().cpu().numpy()

        def flags(key: tuple[str, str], otherwise: Any = None) -> np.ndarray:
            return array(key).reshape(len(content)) != 0 if key in names else otherwise

        terminals = flags(("next", "terminated"))
        ends = flags(("next", "done"), terminals)
        terminals = ends if terminals is None else terminals
        timeouts = (flags(("next", "truncated"), ends) | ends) & ~terminals
        order = np.arange(len(content))
        if numbered := [key for key in _EPISODES if key in names]:
            ids = array(numbered[0]).reshape(len(content))
            order = np.argsort(ids, kind="stable")
            last = np.append(ids[order][1:] != ids[order][:-1], True)
            timeouts[order[last & ~terminals[order]]] = True
        columns = {
            "observations": array("observation")[order],
            "next_observations": array(("next", "observation"))[order],
            "actions": _discrete_if_one_hot(array("action"))[order],
            "rewards": array(("next", "reward")).reshape(len(content), -1)[order],
            "terminals": terminals[order],
            "timeouts": timeouts[order],
        }
        yield Log(self.title, columns, own_next_observations=True)


def _discrete_if_one_hot(actions: np.ndarray) -> np.ndarray:
    """Integers where every row is one-hot, in a dtype that is not that of continuous actions."""
    if actions.dtype.kind not in "biu" or actions.ndim != 2 or actions.shape[1] == 1:
        return actions
    one_hot = ((actions == 0) | (actions == 1)).all() and (actions.astype(np.int64).sum(1) == 1).all()
    return actions.argmax(1) if one_hot else actions
