"""A policy that follows the gradient of Q, beside behaviour cloning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor

from iql_torchrl.configuration.declaring import check_argument
from iql_torchrl.configuration.options import AlgorithmOptions
from iql_torchrl.objectives.iql import IQLLoss, Parameters


class DDPGBCLoss(IQLLoss):
    r"""Implicit Q-Learning whose policy climbs Q, held at the data by behaviour cloning (DDPG+BC).

    Q and V are those of :class:`IQLLoss`. The policy loss is TD3+BC's (Fujimoto and Gu 2021, arXiv 2106.06860) with a
    log-likelihood, as in OGBench's GCIQL (Park et al. 2025, arXiv 2410.20092, ``actor_loss="ddpgbc"``):

    .. math:: L_\pi = -\frac{E[Q(s, \mu(s))]}{E[|Q(s, \mu(s))|] + 10^{-6}} - \alpha E[\log \pi(a | s)],

    with :math:`\mu(s)` the policy's deterministic action, clipped to [-1, 1], and Q the smallest of the critics that
    are trained, not of their targets. The divisor, which makes :math:`\alpha` the same for any scale of rewards,
    carries no gradient, and the policy's gradient does not reach the critics. Unlike weights on the data's actions, the
    gradient of Q moves the policy to actions that no transition has.

    Args:
        actor_network, qvalue_network, value_network: as of :class:`IQLLoss`, of continuous actions.

    Keyword Args:
        behaviour_cloning_coefficient: :math:`\alpha \ge 0`; OGBench's 0.3 or 1 is of a policy with a standard deviation
            of 1.
        **options: those of :class:`IQLLoss`; ``temperature`` and ``max_weight`` change diagnostics alone.

    Raises:
        ValueError: a coefficient out of range, or an option as in :class:`IQLLoss`.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        behaviour_cloning_coefficient: float = 0.3,
        **options: Any,
    ) -> None:
        check_argument(AlgorithmOptions, "behaviour_cloning_coefficient", behaviour_cloning_coefficient)
        super().__init__(actor_network, qvalue_network, value_network, **options)
        self.behaviour_cloning_coefficient = behaviour_cloning_coefficient

    def actor_loss(
        self,
        tensordict: TensorDictBase,
        *,
        target_qvalue: Tensor | None = None,
        state_value: Tensor | None = None,
        parameters: Parameters | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Minus the normalised Q of the policy's action, and behaviour cloning; writes the log-probability.

        Args:
            tensordict: transitions of batch shape ``[*B]``.
            target_qvalue, state_value: not needed here.
            parameters: as in :meth:`value_loss`.

        Returns:
            the reduced loss and an empty dict.

        Raises:
            RuntimeError: log-probability and Q differ in shape.
        """
        distribution: Any = self._distribution(tensordict, parameters)
        log_prob = self._log_prob(distribution, tensordict)
        action = distribution.deterministic_sample.clamp(-1, 1)
        critics = self._get_params("qvalue_network_params", parameters).detach()
        qvalue = self._qvalues(tensordict.copy().set(self.tensor_keys.action, action), critics).min(0).values
        self._check_shapes(log_prob, qvalue)
        size = self._reduce_loss(qvalue.detach().abs(), tensordict=tensordict, reduction="mean") + 1e-6
        tensordict.set(self.tensor_keys.log_prob, log_prob.detach())
        return self._reduce(-qvalue / size - self.behaviour_cloning_coefficient * log_prob, tensordict), {}
