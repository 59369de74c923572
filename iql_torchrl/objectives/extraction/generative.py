"""Policies that imitate the data with a generative model; Q chooses among their draws where they act."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.objectives.iql import IQLLoss, Parameters, select_inputs

_DIAGNOSTIC_SEED = 0


class GenerativeLoss(IQLLoss):
    """Implicit Q-Learning whose policy imitates all of the data: what is good among its draws is chosen by Q, later.

    Q and V are those of :class:`IQLLoss`, and so is the contract, but for the policy: it is one with a ``predict`` and
    a ``generate`` method (:class:`~iql_torchrl.networks.GenerativeActor`), which has no density in closed form. Where
    other losses have a log-probability, this one has minus the squared error of its network: ``entropy`` is the mean of
    that error, and ``log_prob`` among the diagnostics minus the mean, with the same noise at every call.
    """

    default_num_samples = 32
    has_likelihood = False

    def draw(self, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Noise ``[*B, A]`` and time ``[*B, 1]`` for actions ``[*B, A]``, by torch's generator or another one."""
        raise NotImplementedError

    def error(
        self, tensordict: TensorDictBase, noise: Tensor, time: Tensor, *, parameters: Parameters | None = None
    ) -> Tensor:
        """Squared error of the network's prediction, ``[*B]``, for noise and time of :meth:`draw`."""
        raise NotImplementedError

    def actor_loss(
        self,
        tensordict: TensorDictBase,
        *,
        target_qvalue: Tensor | None = None,
        state_value: Tensor | None = None,
        parameters: Parameters | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The error with fresh noise; writes minus it where other losses write the log-probability.

        Args:
            tensordict: transitions of batch shape ``[*B]``.
            target_qvalue, state_value: not needed here.
            parameters: as in :meth:`value_loss`.

        Returns:
            the reduced loss and an empty dict.
        """
        noise, time = self.draw(self._action(tensordict))
        error = self.error(tensordict, noise, time, parameters=parameters)
        tensordict.set(self.tensor_keys.log_prob, -error.detach())
        return self._reduce(error, tensordict), {}

    @staticmethod
    def _check_actor(actor_network: Any) -> None:
        if not all(callable(getattr(actor_network, name, None)) for name in ("predict", "generate")):
            raise TypeError(
                "actor_network must be a GenerativeActor, which has the methods predict and generate, such as of "
                f"build_flow_actor; got {type(actor_network).__name__}."
            )

    def _policy_diagnostics(self, tensordict: TensorDictBase, parameters: Parameters | None) -> tuple[Tensor, None]:
        # A generator of its own: what a run learns must not depend on when it is looked at.
        action = self._action(tensordict)
        noise, time = self.draw(action, torch.Generator(action.device).manual_seed(_DIAGNOSTIC_SEED))
        return -self.error(tensordict, noise, time, parameters=parameters), None

    def _predict(
        self, tensordict: TensorDictBase, noisy_action: Tensor, time: Tensor, parameters: Parameters | None
    ) -> Tensor:
        inputs = select_inputs(tensordict, self.actor_network, "actor_network")
        params = self._get_params("actor_network_params", parameters)
        with params.to_module(self.actor_network, preserve_module_state=False):
            return self.actor_network.predict(inputs[self.actor_network.in_keys[0]], noisy_action, time)
