"""The Implicit Q-Learning loss for discrete actions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.data.utils import _find_action_space

from iql_torchrl.configuration.options import ActionSpace
from iql_torchrl.objectives.iql import IQLLoss

_ACTION_SPACES = get_args(ActionSpace)


class DiscreteIQLLoss(IQLLoss):
    r"""Implicit Q-Learning for discrete actions: :class:`IQLLoss` with critics that value every action at once.

    The three losses and everything said of them in :class:`IQLLoss` hold unchanged; a critic reads the state alone and
    writes one number an action, of which the losses take that of the action in the data:

    ================ =========================== ============================ ==========================================
    ``action_space`` action                      critic's output              Q(s, a)
    ================ =========================== ============================ ==========================================
    ``categorical``  integer, ``[*B]``,          ``[*B, n]``                  output[a]
                     or ``[*B, 1]``
    ``one_hot``      ``[*B, n]``                 ``[*B, n]``                  sum of output * a
    ``mult_one_hot`` ``[*B, n_1 + n_2 + ...]``   ``[*B, n_1 + n_2 + ...]``    sum of output * a: a term each sub-action
    ``binary``       0/1, ``[*B, n]``            ``[*B, n]``                  sum of output * a
    ``binary``       0/1, ``[*B, n]``            ``[*B, n + 1]``              output[n] + sum of output[:n] * a
    ================ =========================== ============================ ==========================================

    The sums over sub-actions are those of TorchRL's ``QValueModule``; where no bit is set they leave Q at 0, which the
    additional output of the last row repairs.

    Args:
        actor_network: stochastic policy whose distribution is over the actions as the data hold them; for
            ``categorical`` ones with a trailing dimension of size 1, that is dropped before ``log_prob``.
        qvalue_network: as in :class:`IQLLoss`, with the output of the table.
        value_network: as in :class:`IQLLoss`.

    Keyword Args:
        action_space: ``"one_hot"`` (or ``"one-hot"``), ``"categorical"``, ``"mult_one_hot"`` or ``"binary"``, or a
            ``OneHot``, ``Categorical``, ``MultiOneHot`` or ``Binary`` spec. Where not given, one-hot is assumed with a
            warning, as TorchRL does.
        **options: those of :class:`IQLLoss`.

    Raises:
        ValueError: an unknown action space, or an option as in :class:`IQLLoss`.
        RuntimeError: when called, actions and critics' output whose sizes do not belong together.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        action_space: str | TensorSpec | None = None,
        **options: Any,
    ) -> None:
        if action_space is None:
            warnings.warn(
                "action_space was not given; one-hot actions are assumed. Pass action_space='one_hot' to silence this, "
                f"or another of {', '.join(_ACTION_SPACES)}.",
                category=UserWarning,
                stacklevel=2,
            )
            action_space = "one_hot"
        try:
            kind = _find_action_space(action_space)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(_unknown(action_space)) from error
        if kind not in _ACTION_SPACES:
            raise ValueError(_unknown(action_space))
        super().__init__(actor_network, qvalue_network, value_network, **options)
        self.action_space = kind

    def _value_of_action(self, values: Tensor, tensordict: TensorDictBase) -> Tensor:
        action = self._action(tensordict)
        if self.action_space == "categorical":
            index = self._index(action, values.shape[:-1])
            if index.shape != values.shape[:-1]:
                raise RuntimeError(self._mismatch(action, values))
            return values.gather(-1, index.long().unsqueeze(-1)).squeeze(-1)
        base = 0.0
        if self.action_space == "binary" and values.shape[-1] == action.shape[-1] + 1:
            values, base = values[..., :-1], values[..., -1]
        if action.shape != values.shape:
            raise RuntimeError(self._mismatch(action, values))
        return base + (values * action.to(values.dtype)).sum(-1)

    def _log_prob(self, distribution: torch.distributions.Distribution, tensordict: TensorDictBase) -> Tensor:
        action = self._action(tensordict)
        if self.action_space == "categorical":
            return distribution.log_prob(self._index(action, distribution.batch_shape))
        # Specs hold bool or int8 by default, with which torch's distributions cannot compute.
        dtypes = {leaf.dtype for leaf in self.actor_network_params.values(True, True)}
        return distribution.log_prob(action.to(next(iter(dtypes)) if len(dtypes) == 1 else torch.get_default_dtype()))

    def _index(self, action: Tensor, batch_shape: torch.Size) -> Tensor:
        """Categorical actions, ``[*B]``."""
        if action.is_floating_point() or action.is_complex() or action.dtype == torch.bool:
            raise RuntimeError(
                f"categorical actions must be integers, but {self.tensor_keys.action!r} holds {action.dtype}; convert "
                "them with .long(), or name the right action_space."
            )
        return action.squeeze(-1) if action.shape == (*batch_shape, 1) else action

    def _mismatch(self, action: Tensor, values: Tensor) -> str:
        return (
            f"{self.tensor_keys.action!r} has shape {tuple(action.shape)} but a critic's "
            f"{self.tensor_keys.state_action_value!r} has shape {tuple(values.shape)}, which do not belong together "
            f"for action_space={self.action_space!r}: see the table of DiscreteIQLLoss."
        )


def _unknown(action_space: Any) -> str:
    return (
        f"action_space must be one of {', '.join(map(repr, _ACTION_SPACES))}, or a OneHot, Categorical, MultiOneHot or "
        f"Binary spec; got {action_space!r}."
    )
