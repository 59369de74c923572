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
from iql_torchrl.errors import DatasetError, first_line

# Where TorchRL's collectors, and this package, number the episodes.
_EPISODES = ("episode", ("collector", "traj_ids"))
# False where TorchRL's collectors and split_trajectories fill short episodes up with zeros.
_PADDING = ("collector", "mask")
_SEVERAL_STEPS = "steps_to_next_obs"


class ReplayBufferContent(Source):
    """All transitions of the buffer, its transforms applied, in the order of its storage; they are copied.

    ``observation``, ``action``, and under ``"next"`` ``observation``, ``reward``, ``done``, ``terminated`` and
    ``truncated``, as TorchRL's collectors write them. Every transition has its own next observation, and is kept. Where
    the episodes are numbered (``("collector", "traj_ids")`` or ``episode``), transitions of several environments, which
    a collector interleaves, are brought together. Padding (``("collector", "mask")``) is left out. One-hot actions
    become discrete ones. How the buffer samples does not matter: the training step draws uniformly by itself.
    """

    source: Literal["replay_buffer"] = "replay_buffer"
    buffer: Any = Field(exclude=True, repr=False)

    @property
    def label(self) -> str:
        return "replay buffer"

    @property
    def title(self) -> str:
        return "the given replay buffer" if hasattr(self.buffer, "sample") else "the given transitions"

    @property
    def own_next_observations(self) -> bool:
        return True

    @contextmanager
    def open(self, allocate: Allocate = np.empty) -> Iterator[Log]:
        """The transitions as columns.

        Raises:
            DatasetError: an empty buffer, one that lacks an entry, or what is no log of single steps.
        """
        if not len(self.buffer):
            raise DatasetError(f"{self.title}: it has no rows.")
        try:
            content = self.buffer[self._rows()]
        except Exception as error:  # of its storage or its transforms
            raise DatasetError(f"{self.title} cannot be read ({type(error).__name__}: {first_line(error)}).") from error
        names = set(content.keys(True, True)) if hasattr(content, "keys") else set()
        needed = {"observation", "action", ("next", "observation"), ("next", "reward")}
        if not {("next", "terminated"), ("next", "done")} & names:
            needed.add(("next", "done"))
        if missing := needed - names:
            raise DatasetError(
                f"{self.title}: missing {_listed(missing)}; found {_listed(names) or 'nothing'}. Rename entries with "
                "content.rename_key_."
            )
        content = content.reshape(-1)
        if _PADDING in names:
            content = content[content.get(_PADDING).reshape(len(content))]
        if _SEVERAL_STEPS in names and (content.get(_SEVERAL_STEPS) != 1).any():
            raise DatasetError(
                f"{self.title}: its rewards are of several steps ({_SEVERAL_STEPS}, as MultiStep writes them); give it "
                "without that transform."
            )

        def array(key: Any) -> np.ndarray:
            return content.get(key).detach().cpu().numpy()

        def flags(key: tuple[str, str], otherwise: Any = None) -> np.ndarray:
            return array(key).reshape(len(content)) != 0 if key in names else otherwise

        terminals = flags(("next", "terminated"))
        ends = flags(("next", "done"), terminals)
        terminals = ends if terminals is None else terminals
        timeouts = (flags(("next", "truncated"), ends) | ends) & ~terminals
        observations, following = array("observation"), array(("next", "observation"))
        _refuse_zeros(self.title, observations, following, timeouts)
        order = np.arange(len(content))
        if numbered := [key for key in _EPISODES if key in names]:
            ids = array(numbered[0]).reshape(len(content))
            order = np.argsort(ids, kind="stable")
            last = np.append(ids[order][1:] != ids[order][:-1], True)
            timeouts[order[last & ~terminals[order]]] = True
        columns = {
            "observations": observations[order],
            "next_observations": following[order],
            "actions": _discrete_if_one_hot(array("action"))[order],
            "rewards": array(("next", "reward")).reshape(len(content), -1)[order],
            "terminals": terminals[order],
            "timeouts": timeouts[order],
        }
        yield Log(self.title, columns, own_next_observations=True)

    def _rows(self) -> Any:
        """All rows, as an index of the buffer."""
        if not hasattr(self.buffer, "storage") or not len(self.buffer.transform):
            return slice(None)
        # The slice of a storage that is full is that storage itself, into which the transforms would write.
        return np.arange(len(self.buffer.storage[:]))


def _listed(names: set[Any]) -> str:
    return ", ".join(sorted(map(repr, names)))


def _refuse_zeros(title: str, observations: np.ndarray, following: np.ndarray, timeouts: np.ndarray) -> None:
    """Refuse what two of TorchRL's own datasets write: zeros in place of observations, which look right in shape."""
    if not observations.any():
        raise DatasetError(
            f"{title}: all observations are zero, as those of TorchRL's MinariExperienceReplay are; give "
            "minari.load_dataset(NAME) instead."
        )
    if timeouts.any() and observations[timeouts].any() and not following[timeouts].any():
        raise DatasetError(
            f"{title}: at all {timeouts.sum()} timeouts the next observation is zero, as in TorchRL's "
            "D4RLExperienceReplay, so that their Q would be learnt from V(0); give load_transitions('d4rl', "
            "name=NAME), or leave those transitions out."
        )


def _discrete_if_one_hot(actions: np.ndarray) -> np.ndarray:
    """Integers where every row is one-hot, in a dtype that is not that of continuous actions."""
    if actions.dtype.kind not in "biu" or actions.ndim != 2 or actions.shape[1] == 1:
        return actions
    one_hot = ((actions == 0) | (actions == 1)).all() and (actions.astype(np.int64).sum(1) == 1).all()
    return actions.argmax(1) if one_hot else actions
