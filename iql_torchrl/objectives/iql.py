"""The Implicit Q-Learning loss as a TorchRL ``LossModule``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.envs.utils import set_exploration_type
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import (
    _GAMMA_LMBDA_DEPREC_ERROR,
    default_value_kwargs,
    dispatch_value_estimator,
    distance_loss,
)
from torchrl.objectives.value import (
    GAE,
    MultiAgentGAE,
    TD0Estimator,
    TD1Estimator,
    TDLambdaEstimator,
    ValueEstimatorBase,
    VTrace,
)

from iql_torchrl.configuration.declaring import check_argument, check_arguments
from iql_torchrl.configuration.options import AlgorithmOptions

Parameters = Mapping[str, TensorDictBase]

_NETWORKS = ("actor_network", "value_network", "qvalue_network")
_PARAMETER_NAMES = tuple(f"{prefix}{network}_params" for network in _NETWORKS for prefix in ("", "target_"))


class IQLLoss(LossModule):
    r"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv 2110.06169).

    Transitions :math:`(s, a, r, s')` come from a fixed dataset of batch shape ``[*B]``; every quantity below has one
    element a transition, of shape ``[*B]``. A hat marks target parameters, through which no gradient passes. In the
    order of the paper:

    1. *The value that the data's better actions reach.* Q-learning needs :math:`\max_a Q(s, a)`, but a maximum over
       actions that the data do not hold asks Q for values it never learnt. The expectile :math:`\tau` of Q(s, a) over
       the *data's* actions approaches that maximum as :math:`\tau \to 1` and asks for nothing unseen. An expectile
       minimises an asymmetric squared error (equation 5), with
       :math:`u = \min_i \hat Q_i(s, a) - V(s)`, the minimum guarding against overestimation:

       .. math:: L_V = E[\,|\tau - 1(u < 0)|\,u^2\,].

       ``value_loss="gumbel"`` is the regression of Extreme Q-Learning (Garg et al. 2023, arXiv 2301.02328) in its
       place, in which :math:`\tau` is without meaning. With :math:`z = \min(u / b, c)`, b being
       ``gumbel_temperature`` and c ``gumbel_clip``,

       .. math:: L_V = E[\,e^{z} - z - 1\,] \; / \; e^{m}, \qquad m = \max(\max z, -1),

       the larger maximum over the batch and without gradient: ``gumbel_rescale_loss`` of the paper's offline code,
       which keeps the exponentials finite, as an adaptive learning rate would. Where nothing is clipped, its minimum
       over constants V is :math:`b \log E[e^{Q / b}]`, the soft maximum over the data's actions: their mean for a
       large b, their maximum for a small one. Clipped elements pass no gradient.

    2. *Q from V.* Were :math:`L_V` taken towards :math:`r + \gamma V(s')` directly, lucky outcomes of a random step
       would look like good actions. A mean-squared regression of each critic averages over the outcomes first
       (equation 6):

       .. math:: y = r + \gamma (1 - \mathrm{terminated}) V(s'), \qquad L_Q = \sum_i E[(y - Q_i(s, a))^2].

       Truncated transitions bootstrap, terminated ones do not. The target y carries no gradient.

    3. *The policy.* Maximising the advantage :math:`A = \min_i \hat Q_i(s, a) - V(s)` while staying close to the
       data's policy has the solution :math:`\pi(a | s) \propto \mu(a | s) e^{\beta A}`; projecting it onto the
       parametric policies is maximum likelihood with weights (equation 7):

       .. math:: L_\pi = -E[\min(e^{\beta A}, w_{max}) \log \pi(a | s)].

       The weight carries no gradient; an overflow of its exponential to infinity is clipped like any large weight.

    ``temperature`` is :math:`\beta`, the *inverse* temperature of the paper and of every code base; the formula with
    :math:`e^{(Q - V) / \beta}` is the same thing with the reciprocal.

    The :math:`\min_i` of steps 1 and 3 is over all critics, or, where ``num_sampled_qvalue_nets`` is given, over a
    subset of so many, drawn uniformly for each update as in REDQ (Chen et al. 2021, arXiv 2101.05982) and RLPD (Ball et
    al. 2023, arXiv 2302.02948): the fewer, the less pessimistic. One draw serves V and the policy, in :meth:`forward`
    and where :meth:`target_qvalue` is handed over. ``qvalue_aggregation="mean"`` has their mean for the minimum, which
    is FQL's ``q_agg`` (Park et al. 2025, arXiv 2502.02538).

    With ``delay_value=True`` the V of steps 2 and 3 is :math:`V_{\bar\psi}`, of target parameters that follow those of
    V: the formulas :math:`y = r + \gamma V_{\bar\psi}(s')` and :math:`A = \hat Q(s, a) - V_{\bar\psi}(s)`. Step 1 still
    trains V itself.

    :meth:`forward` is the joint update: every loss sees the same, old, parameters, and one target-Q pass, one V pass
    over s and one over s' serve all three. The paper updates V first and lets the others see the new one: call
    :meth:`value_loss`, :meth:`actor_loss` and :meth:`qvalue_loss` one by one for that order, as
    :class:`~iql_torchrl.TrainingStep` does, and hand the result of :meth:`target_qvalue` to the first two so
    that it is computed once.

    The contract is that of ``torchrl.objectives.IQLLoss`` (keys, dispatch, value estimators, reductions, parameter
    and ``state_dict`` names), so replacing the import is enough. The defaults are the paper's (l2, 3.0, 0.7) where
    TorchRL's are smooth_l1, 1.0 and 0.5.

    Args:
        actor_network: stochastic policy with a ``get_dist`` method.
        qvalue_network: Q(s, a), writing ``state_action_value`` of shape ``[*B, 1]``. A list gives one critic an
            entry and keeps their initial weights; a single network is copied ``num_qvalue_nets`` times with weights
            redrawn uniformly between its minimum and maximum, as every TorchRL loss does.
        value_network: V(s), writing ``state_value`` of shape ``[*B, 1]``.

    Keyword Args:
        num_qvalue_nets: number of critics; with a list, its length. Default 2.
        loss_function: distance of the Q loss, ``"l2"`` (paper), ``"l1"`` or ``"smooth_l1"``.
        temperature: inverse temperature :math:`\beta \ge 0`; 0 is behaviour cloning. Default 3.0.
        expectile: :math:`\tau` in (0, 1]; 0.5 is a mean, 1 regresses from above only. Default 0.7.
        max_weight: upper clip of the exponentiated advantage, > 0. Default 100.
        delay_value: give V target parameters of its own, used for V(s') and in the advantage. Default ``False``.
        separate_losses: parameters shared between networks learn from the first of actor, V and Q that holds them.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.
        deactivate_vmap: loop over the critics instead of vectorising.
        scalar_output_mode: with ``reduction="none"``, ``"exclude"`` or ``"non_tensor"`` for the entropy.
        qvalue_reduction: over the critics, ``"sum"`` (default: paper) or ``"mean"`` (CORL).
        use_prioritized_weights: weigh every loss with the input's ``priority_weight``, the importance weights that a
            prioritised replay buffer gives: ``True``, ``False``, or ``"auto"`` (default) where the input has them, as
            TorchRL's SAC, TD3 and DQN losses do. ``reduction="mean"`` is then a weighted mean.
        num_sampled_qvalue_nets: number of target critics that count in an update, drawn by torch's global generator;
            ``None`` (default): all of them.
        qvalue_aggregation: over the target critics, ``"min"`` (default: paper) or ``"mean"``.
        value_loss: ``"expectile"`` (default: paper) or ``"gumbel"``; kept as ``value_regression``.
        gumbel_temperature: b > 0 of the Gumbel regression. Default 1.0.
        gumbel_clip: c > 0 of the Gumbel regression, ``math.inf`` for none. Default 7.0.

    Raises:
        ValueError: ``expectile``, ``temperature``, ``max_weight``, ``gumbel_temperature``, ``gumbel_clip``,
            ``num_qvalue_nets`` or ``num_sampled_qvalue_nets`` out of range, an unknown ``loss_function``,
            ``reduction``, ``scalar_output_mode``, ``qvalue_reduction``, ``qvalue_aggregation``, ``value_loss`` or
            ``use_prioritized_weights``, a list of critics that is empty or whose length is not ``num_qvalue_nets``, or
            more critics to draw than there are.
        TypeError: an actor without ``get_dist``, or ``gamma`` given: it belongs to :meth:`make_value_estimator`.
        RuntimeError: ``priority_key`` given: it belongs to :meth:`set_keys`.

    Inputs are ``action``, the networks' ``in_keys``, and under ``"next"`` the observation, ``reward``, ``done`` and
    ``terminated``, of any batch shape ``[*B]``. :meth:`forward` returns scalars ``loss_actor``, ``loss_qvalue``,
    ``loss_value`` and ``entropy``, and writes ``td_error`` (the largest squared error over the critics, shape
    ``[*B]``) and the log-probability into its input. ``temperature``, ``expectile``, ``max_weight``,
    ``gumbel_temperature`` and ``gumbel_clip`` are non-persistent buffers: assign a float to schedule one; a compiled
    step sees it without recompiling. Positions that the entry named by ``loss_mask_key`` marks as invalid count
    nowhere; they must hold finite numbers all the same.
    """

    @dataclass
    class _AcceptedKeys:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Default names of every entry that :meth:`set_keys` can rename."""

        value: NestedKey = "state_value"
        action: NestedKey = "action"
        log_prob: NestedKey = "_log_prob"
        priority: NestedKey = "td_error"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys  # pyright: ignore[reportIncompatibleMethodOverride]
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = ["loss_actor", "loss_qvalue", "loss_value", "entropy"]  # pyright: ignore

    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )
    _schedulable_buffers = frozenset({"temperature", "expectile", "max_weight", "gumbel_temperature", "gumbel_clip"})

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    temperature: Tensor
    expectile: Tensor
    max_weight: Tensor
    gumbel_temperature: Tensor
    gumbel_clip: Tensor

    # Draws of which a policy takes the best where nothing else is asked for, and the critics that say which that is.
    default_num_samples = 1
    has_likelihood = True  # of the data's actions; where False, log_prob is something else
    choosing_critics = "target_qvalue_network_params"
    _averages_actor = False

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        value_network: TensorDictModule,
        *,
        num_qvalue_nets: int = 2,
        loss_function: str = "l2",
        temperature: float = 3.0,
        expectile: float = 0.7,
        max_weight: float = 100.0,
        delay_value: bool = False,
        gamma: float | None = None,
        priority_key: str | None = None,
        separate_losses: bool = False,
        reduction: str | None = "mean",
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        qvalue_reduction: str = "sum",
        use_prioritized_weights: bool | str = "auto",
        num_sampled_qvalue_nets: int | None = None,
        qvalue_aggregation: str = "min",
        value_loss: str = "expectile",
        gumbel_temperature: float = 1.0,
        gumbel_clip: float = 7.0,
    ) -> None:
        if gamma is not None:
            raise TypeError(_GAMMA_LMBDA_DEPREC_ERROR)
        self._check_actor(actor_network)
        check_arguments(
            AlgorithmOptions,
            temperature=temperature,
            expectile=expectile,
            max_weight=max_weight,
            num_qvalue_nets=num_qvalue_nets,
            qvalue_reduction=qvalue_reduction,
            num_sampled_qvalue_nets=num_sampled_qvalue_nets,
            qvalue_aggregation=qvalue_aggregation,
            value_loss=value_loss,
            gumbel_temperature=gumbel_temperature,
            gumbel_clip=gumbel_clip,
        )
        if num_sampled_qvalue_nets is not None and num_sampled_qvalue_nets > num_qvalue_nets:
            raise ValueError(
                f"num_sampled_qvalue_nets must be None or at most num_qvalue_nets={num_qvalue_nets}, got "
                f"{num_sampled_qvalue_nets}."
            )
        _check_option("loss_function", loss_function, ("l2", "l1", "smooth_l1"))
        _check_option("reduction", reduction, ("mean", "sum", "none", None))
        _check_option("scalar_output_mode", scalar_output_mode, ("exclude", "non_tensor", None))
        _check_option("use_prioritized_weights", use_prioritized_weights, (True, False, "auto"))
        self._in_keys = None
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        # float64 scalars promote with nothing, so a float64 loss keeps 0.7 exactly and a float32 one stays float32;
        # not persistent because TorchRL's state_dict has no such entries.
        buffers = {"temperature": temperature, "expectile": expectile, "max_weight": max_weight}
        buffers |= {"gumbel_temperature": gumbel_temperature, "gumbel_clip": gumbel_clip}
        for name, value in buffers.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64), persistent=False)
        self.loss_function = loss_function
        self.qvalue_reduction = qvalue_reduction
        self.qvalue_aggregation = qvalue_aggregation
        self.num_sampled_qvalue_nets = num_sampled_qvalue_nets
        self.value_regression = value_loss
        self.use_prioritized_weights = use_prioritized_weights
        self.deactivate_vmap = deactivate_vmap
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.delay_value = delay_value

        shared_with_actor = list(actor_network.parameters()) if separate_losses else None
        self.convert_to_functional(actor_network, "actor_network", create_target_params=self._averages_actor)
        self.convert_to_functional(
            value_network,
            "value_network",
            create_target_params=delay_value,
            compare_against=shared_with_actor,
        )
        shared_with_either = [*shared_with_actor, *value_network.parameters()] if shared_with_actor else None
        if isinstance(qvalue_network, Sequence):
            if not qvalue_network:
                raise ValueError(
                    f"qvalue_network is an empty list; num_qvalue_nets={num_qvalue_nets} needs as many networks in it."
                )
            if len(qvalue_network) != num_qvalue_nets:
                raise ValueError(
                    f"qvalue_network is a list of {len(qvalue_network)} networks but num_qvalue_nets is "
                    f"{num_qvalue_nets}; pass num_qvalue_nets={len(qvalue_network)}."
                )
            qvalue_network = list(qvalue_network) if num_qvalue_nets > 1 else qvalue_network[0]
        self.convert_to_functional(
            qvalue_network,  # type: ignore[arg-type]
            "qvalue_network",
            None if num_qvalue_nets == 1 else num_qvalue_nets,
            create_target_params=True,
            compare_against=shared_with_either,
        )

        self.reduction = "mean" if reduction is None else reduction
        if self.reduction == "none" and scalar_output_mode is None:
            warnings.warn(
                "reduction='none' leaves the scalar entropy out of the output; pass scalar_output_mode='exclude' to "
                "silence this warning or scalar_output_mode='non_tensor' to keep it as non-tensor data.",
                category=UserWarning,
                stacklevel=2,
            )
            scalar_output_mode = "exclude"
        self.scalar_output_mode = scalar_output_mode
        if self.scalar_output_mode == "exclude" and self.reduction == "none":
            self._out_keys = self._out_keys_apparent = ["loss_actor", "loss_qvalue", "loss_value"]
        if num_qvalue_nets == 1:
            self.register_load_state_dict_pre_hook(_drop_legacy_critic_dimension)
        # Filled here and not by the first call, after which a compiled loss would compile again.
        self._set_in_keys()
        self.vmap_randomness

    # ------------------------------------------------------------------ the three losses, in the paper's order

    def value_loss(
        self,
        tensordict: TensorDictBase,
        *,
        target_qvalue: Tensor | None = None,
        parameters: Parameters | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Expectile regression of V(s) towards the smallest target Q(s, a) (equation 5), or Gumbel regression (XQL).

        Args:
            tensordict: transitions of batch shape ``[*B]``.
            target_qvalue: the result of :meth:`target_qvalue`, ``[*B]``; computed here where not given.
            parameters: parameters to evaluate at in place of the module's own, by attribute name
                (``"value_network_params"``, ...). ``torch.func.functional_call`` has no effect on a ``LossModule``.

        Returns:
            the reduced loss and an empty dict.
        """
        if target_qvalue is None:
            target_qvalue = self.target_qvalue(tensordict, parameters=parameters)
        value = self._state_value(tensordict, self._get_params("value_network_params", parameters))
        return self._value_loss(tensordict, target_qvalue, value), {}

    def qvalue_loss(
        self,
        tensordict: TensorDictBase,
        *,
        parameters: Parameters | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Temporal-difference regression of every critic towards the value estimator's target (equation 6).

        Args:
            tensordict: transitions of batch shape ``[*B]``.
            parameters: as in :meth:`value_loss`.

        Returns:
            the reduced loss, over the critics by ``qvalue_reduction``, and ``{"td_error": [num_qvalue_nets, *B]}``,
            squared errors.

        Raises:
            KeyError: the input lacks an entry, or a network does not write its own.
            RuntimeError: target and Q differ in shape.
        """
        target = self._qvalue_target(tensordict, parameters)
        prediction = self._qvalues(tensordict, self._get_params("qvalue_network_params", parameters))
        if target.shape != prediction.shape[1:]:
            raise RuntimeError(
                f"the target r + gamma * V(s') has shape {tuple(target.shape)} without its last dimension but the "
                f"critics' {self.tensor_keys.state_action_value!r} has shape {tuple(prediction.shape[1:])}; "
                f"{self.tensor_keys.reward!r}, {self.tensor_keys.done!r}, {self.tensor_keys.terminated!r} and "
                f"{self.tensor_keys.value!r} must all have the batch shape and a last dimension of size 1."
            )
        target = target.expand_as(prediction)
        distance = distance_loss(prediction, target, loss_function=self.loss_function)
        loss = distance.sum(0) if self.qvalue_reduction == "sum" else distance.mean(0)
        td_error = (prediction - target).detach().pow(2)
        return self._reduce(loss, tensordict), {"td_error": td_error}

    def actor_loss(
        self,
        tensordict: TensorDictBase,
        *,
        target_qvalue: Tensor | None = None,
        state_value: Tensor | None = None,
        parameters: Parameters | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Advantage-weighted behaviour cloning (equation 7); writes the log-probability into ``tensordict``.

        Args:
            tensordict: transitions of batch shape ``[*B]``.
            target_qvalue: as in :meth:`value_loss`.
            state_value: V(s) of the advantage, ``[*B]``; computed here where not given.
            parameters: as in :meth:`value_loss`.

        Returns:
            the reduced loss and an empty dict.

        Raises:
            RuntimeError: log-probability and Q differ in shape.
        """
        if target_qvalue is None:
            target_qvalue = self.target_qvalue(tensordict, parameters=parameters)
        weight = self._advantage_weight(self._advantage(tensordict, target_qvalue, state_value, parameters))
        log_prob = self._log_prob(self._distribution(tensordict, parameters), tensordict)
        self._check_shapes(log_prob, weight)
        tensordict.set(self.tensor_keys.log_prob, log_prob.detach())
        return self._reduce(-weight * log_prob, tensordict), {}

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase, *, parameters: Parameters | None = None) -> TensorDictBase:
        """All three losses at the same parameters: the joint update.

        Args:
            tensordict: transitions of batch shape ``[*B]``; ``td_error`` and the log-probability are written into it.
            parameters: as in :meth:`value_loss`.

        Returns:
            a TensorDict of ``loss_actor``, ``loss_qvalue``, ``loss_value`` and ``entropy``.
        """
        target_qvalue = self.target_qvalue(tensordict, parameters=parameters)
        value = self._state_value(tensordict, self._get_params("value_network_params", parameters))
        loss_value = self._value_loss(tensordict, target_qvalue, value)
        loss_actor, _ = self.actor_loss(
            tensordict,
            target_qvalue=target_qvalue,
            state_value=None if self.delay_value else value.detach(),
            parameters=parameters,
        )
        loss_qvalue, metadata = self.qvalue_loss(tensordict, parameters=parameters)
        tensordict.set(self.tensor_keys.priority, metadata["td_error"].max(0).values)
        entropy = self.entropy(tensordict)
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_value": loss_value}
        if self.reduction == "none":
            out = TensorDict(losses, batch_size=tensordict.batch_size)
            if self.scalar_output_mode == "non_tensor":
                out.set_non_tensor("entropy", entropy)
        else:
            out = TensorDict({**losses, "entropy": entropy})
        self._clear_weakrefs(tensordict, out, *_PARAMETER_NAMES)
        return out

    # ------------------------------------------------------------------ their parts

    def acting_network(self) -> nn.Module:
        """The policy as a module of its own, which shares the parameters that act."""
        return self.get_stateful_net("actor_network")

    def entropy(self, tensordict: TensorDictBase) -> Tensor:
        """Minus the mean log-probability that :meth:`actor_loss` has written: a scalar, without gradient."""
        return self._reduce_loss(-tensordict.get(self.tensor_keys.log_prob), tensordict=tensordict, reduction="mean")

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float | Tensor = 0.8) -> Tensor:
        """Elementwise expectile loss :math:`|\\tau - 1(u < 0)| u^2` of ``diff`` = u, any shape."""
        return torch.where(diff > 0, expectile, 1 - expectile).to(diff.dtype) * diff.pow(2)

    @staticmethod
    def loss_value_gumbel(
        diff: Tensor, temperature: float | Tensor = 1.0, clip: float | Tensor = 7.0, *, mask: Tensor | None = None
    ) -> Tensor:
        """Elementwise Gumbel loss :math:`(e^z - z - 1) / e^m` of ``diff`` = u, any shape, rescaled over all of it.

        Args:
            diff: u; :math:`z = \\min(u / temperature, clip)`, and m is the largest z, or -1 where that is smaller.
            temperature, clip: numbers or scalars.
            mask: which elements count for m, as booleans; ``None``: all.
        """
        temperature, clip = (torch.as_tensor(one, dtype=diff.dtype, device=diff.device) for one in (temperature, clip))
        z = (diff / temperature).clamp(max=clip)
        counted = z.detach() if mask is None else torch.where(mask, z.detach(), -math.inf)
        largest = counted.amax().clamp(min=-1.0)
        scale = torch.exp(-largest)
        return torch.exp(z - largest) - z * scale - scale

    @torch.no_grad()
    def target_qvalue(
        self, tensordict: TensorDictBase, *, parameters: Parameters | None = None, sample: bool = True
    ) -> Tensor:
        """The smallest target Q(s, a), or by ``qvalue_aggregation`` their mean, shape ``[*B]``, without gradient.

        Args:
            tensordict: transitions of batch shape ``[*B]``.
            parameters: as in :meth:`value_loss`.
            sample: draw ``num_sampled_qvalue_nets`` of the critics. ``False``: the mean over all subsets of so many,
                for which no random number is drawn; the same where all critics count.
        """
        params = self._get_params("target_qvalue_network_params", parameters)
        count = self.num_sampled_qvalue_nets or self.num_qvalue_nets
        if sample and count < self.num_qvalue_nets:
            params = self._draw_critics(params, count)
            count = self.num_qvalue_nets
        qvalues = self._qvalues(tensordict, params)
        if self.qvalue_aggregation == "mean":
            return qvalues.mean(0)
        return qvalues.min(0).values if count == self.num_qvalue_nets else _mean_of_minima(qvalues, count)

    @torch.no_grad()
    def diagnostics(self, tensordict: TensorDictBase, *, parameters: Parameters | None = None) -> TensorDictBase:
        """What a run should watch, as scalars, without dropout or a draw: nothing is computed here unless asked for.

        Args:
            tensordict: transitions of batch shape ``[*B]``; left unmodified.
            parameters: as in :meth:`value_loss`.

        Returns:
            ``advantage_mean`` and ``advantage_std``, ``clipped_fraction`` (weights at ``max_weight``),
            ``effective_sample_size`` of the weights as a fraction of the batch, ``qvalue`` and ``qvalue_std`` of
            :meth:`target_qvalue`, ``value``, ``positive_advantages`` (share of the batch whose Q is above V),
            ``log_prob``, ``policy_std`` and ``td_error`` (mean squared error over critics and batch).
        """
        with _evaluation_mode(self.actor_network, self.qvalue_network, self.value_network):
            target_qvalue = self.target_qvalue(tensordict, parameters=parameters, sample=False)
            advantage = self._advantage(tensordict, target_qvalue, None, parameters)
            weight = self._advantage_weight(advantage)
            log_prob, standard_deviation = self._policy_diagnostics(tensordict, parameters)
            prediction = self._qvalues(tensordict, self._get_params("qvalue_network_params", parameters))
            td_error = (prediction - self._qvalue_target(tensordict, parameters)).pow(2).mean(0)

        def mean(elements: Tensor, reduction: str = "mean") -> Tensor:
            return self._reduce_loss(elements, tensordict=tensordict, reduction=reduction)

        # The weights relative to the largest, which unlike their squares cannot all underflow.
        counted = mean(torch.ones_like(weight), "none") > 0
        log_weight = (self.temperature * advantage.double()).clamp(max=self.max_weight.log())
        log_weight = torch.where(counted, log_weight, -math.inf)
        relative = (log_weight - log_weight.amax()).exp().to(weight.dtype)
        out = {
            "advantage_mean": (advantage_mean := mean(advantage)),
            "advantage_std": mean((advantage - advantage_mean).pow(2)).sqrt(),
            "clipped_fraction": mean((weight >= self.max_weight).to(weight.dtype)),
            "effective_sample_size": relative.sum().pow(2) / relative.pow(2).sum() / counted.sum(),
            "qvalue": (qvalue_mean := mean(target_qvalue)),
            "qvalue_std": mean((target_qvalue - qvalue_mean).pow(2)).sqrt(),
            "positive_advantages": mean((advantage > 0).to(advantage.dtype)),
            "value": mean(target_qvalue - advantage),
            "log_prob": mean(log_prob),
            "td_error": mean(td_error),
        }
        if standard_deviation is not None:
            out["policy_std"] = mean(standard_deviation.mean(-1))
        return TensorDict(out)

    @staticmethod
    def _check_actor(actor_network: Any) -> None:
        if not callable(getattr(actor_network, "get_dist", None)):
            raise TypeError(
                "actor_network must be a ProbabilisticActor or another ProbabilisticTensorDictSequential, which have a "
                f"get_dist method; got {type(actor_network).__name__} without one."
            )

    def _policy_diagnostics(
        self, tensordict: TensorDictBase, parameters: Parameters | None
    ) -> tuple[Tensor, Tensor | None]:
        """log pi(a | s) ``[*B]`` and standard deviation ``[*B, A]``."""
        with set_exploration_type(self.deterministic_sampling_mode):
            distribution = self._distribution(tensordict, parameters)
            return self._log_prob(distribution, tensordict), _standard_deviation(distribution)

    def _distribution(
        self, tensordict: TensorDictBase, parameters: Parameters | None
    ) -> torch.distributions.Distribution:
        inputs = select_inputs(tensordict, self.actor_network, "actor_network")
        params = self._get_params("actor_network_params", parameters)
        with params.to_module(self.actor_network, preserve_module_state=False):
            return self.actor_network.get_dist(inputs)

    def _log_prob(self, distribution: torch.distributions.Distribution, tensordict: TensorDictBase) -> Tensor:
        """log pi(a | s) of shape ``[*B]``."""
        return distribution.log_prob(self._action(tensordict))

    def _check_shapes(self, log_prob: Tensor, qvalue: Tensor) -> None:
        if log_prob.shape != qvalue.shape:
            raise RuntimeError(
                f"the log-probability of {self.tensor_keys.action!r} has shape {tuple(log_prob.shape)} but the "
                f"critics' {self.tensor_keys.state_action_value!r} has shape {tuple(qvalue.shape)} without its last "
                "dimension; the distribution must sum over the action dimension and Q must end in one of size 1."
            )

    def _action(self, tensordict: TensorDictBase) -> Tensor:
        return _get(tensordict, self.tensor_keys.action, "the action")

    def _value_loss(self, tensordict: TensorDictBase, target_qvalue: Tensor, value: Tensor) -> Tensor:
        difference = self._difference(target_qvalue, value)
        if self.value_regression == "expectile":
            return self._reduce(self.loss_value_diff(difference, self.expectile), tensordict)
        mask = self._reduce_loss(torch.ones_like(difference), tensordict=tensordict, reduction="none") > 0
        loss = self.loss_value_gumbel(difference, self.gumbel_temperature, self.gumbel_clip, mask=mask)
        return self._reduce(loss, tensordict)

    def _difference(self, target_qvalue: Tensor, value: Tensor) -> Tensor:
        if value.shape != target_qvalue.shape:
            raise RuntimeError(
                f"the value network's {self.tensor_keys.value!r} has shape {tuple(value.shape)} but the critics' "
                f"{self.tensor_keys.state_action_value!r} has shape {tuple(target_qvalue.shape)}, where a last "
                "dimension of size 1 is left out; both must end in one after the batch shape."
            )
        return target_qvalue - value

    def _reduce(self, loss: Tensor, tensordict: TensorDictBase) -> Tensor:
        weights = None
        if self.use_prioritized_weights:
            weights = tensordict.get(self.tensor_keys.priority_weight, None)
        if weights is not None:
            assert isinstance(weights, Tensor)
            if weights.shape not in (loss.shape, (*loss.shape, 1)):
                raise RuntimeError(
                    f"{self.tensor_keys.priority_weight!r} has shape {tuple(weights.shape)}; the losses have "
                    f"{tuple(loss.shape)}, one weight each."
                )
            weights = weights.to(loss.dtype).reshape(loss.shape)
        elif self.use_prioritized_weights is True:
            raise KeyError(
                f"use_prioritized_weights=True but the input has no {self.tensor_keys.priority_weight!r}; sample from "
                "a prioritised replay buffer, or name the entry with set_keys(priority_weight=...)."
            )
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights)

    @torch.no_grad()
    def _advantage(
        self,
        tensordict: TensorDictBase,
        target_qvalue: Tensor,
        state_value: Tensor | None,
        parameters: Parameters | None,
    ) -> Tensor:
        if state_value is None:
            state_value = self._state_value(tensordict, self._get_params("target_value_network_params", parameters))
        return self._difference(target_qvalue, state_value)

    @torch.no_grad()
    def _advantage_weight(self, advantage: Tensor) -> Tensor:
        # exp overflows to inf, which the clip brings back to max_weight: no gradient passes here, so no inf * 0 either.
        temperature, max_weight = self.temperature.to(advantage.dtype), self.max_weight.to(advantage.dtype)
        return torch.exp(temperature * advantage).clamp(max=max_weight)

    def _state_value(self, tensordict: TensorDictBase, params: TensorDictBase, prefix: str = "") -> Tensor:
        """V(s) of shape ``[*B]``."""
        inputs = select_inputs(tensordict, self.value_network, "value_network", prefix)
        with params.to_module(self.value_network, preserve_module_state=False):
            out = self.value_network(inputs)
        return _written(out, self.tensor_keys.value, self.value_network, "value").squeeze(-1)

    def _qvalues(self, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """Q(s, a) of every critic, shape ``[num_qvalue_nets, *B]``."""
        inputs = select_inputs(tensordict, self.qvalue_network, "qvalue_network")

        def one_critic(critic_params: TensorDictBase, inputs: TensorDictBase) -> Tensor:
            with critic_params.to_module(self.qvalue_network, preserve_module_state=False):
                out = self.qvalue_network(inputs.copy())
            values = _written(out, self.tensor_keys.state_action_value, self.qvalue_network, "state_action_value")
            return self._value_of_action(values, tensordict)

        if params.ndim == 0:
            return one_critic(params, inputs).unsqueeze(0)
        if self.deactivate_vmap:
            return torch.stack([one_critic(critic_params, inputs) for critic_params in params.unbind(0)])
        # Given to each critic: of one input for all, PyTorch makes a product whose result lies transposed in memory.
        inputs = inputs.expand(params.batch_size[0], *inputs.batch_size)
        return torch.vmap(one_critic, randomness=self.vmap_randomness)(params, inputs)

    def _draw_critics(self, params: TensorDictBase, count: int) -> TensorDictBase:
        """The parameters of ``count`` of the critics, every subset as likely as any other."""
        device = next(iter(params.values(True, True))).device
        drawn = torch.rand(self.num_qvalue_nets, device=device).argsort()[:count]
        return params[drawn]

    def _value_of_action(self, values: Tensor, tensordict: TensorDictBase) -> Tensor:
        """What one critic says of the action taken, ``[*B]``, from its output ``[*B, 1]``."""
        return values.squeeze(-1)

    @torch.no_grad()
    def _qvalue_target(self, tensordict: TensorDictBase, parameters: Parameters | None) -> Tensor:
        """The value estimator's target, shape ``[*B]``; r + gamma * (1 - terminated) * V(s') for TD0."""
        params = self._get_params("target_value_network_params", parameters)
        # A shallow copy: estimators may standardise the reward in place.
        tensordict = tensordict.copy()
        estimator = self.value_estimator
        if isinstance(estimator, TD0Estimator | TD1Estimator | TDLambdaEstimator):
            reward = _get(tensordict, ("next", self.tensor_keys.reward), "the reward")
            done = _get(tensordict, ("next", self.tensor_keys.done), "the end of an episode")
            terminated = tensordict.get(("next", self.tensor_keys.terminated), done)
            next_value = self._state_value(tensordict.get("next"), params, "next").unsqueeze(-1)
            for name, entry in (("reward", reward), ("done", done), ("terminated", terminated)):
                if entry.shape != next_value.shape:
                    raise RuntimeError(
                        f"('next', {getattr(self.tensor_keys, name)!r}) has shape {tuple(entry.shape)}; expected "
                        f"{tuple(next_value.shape)}, the batch shape and a last dimension of size 1."
                    )
            target = estimator.value_estimate(tensordict, next_value=next_value)
            # The estimators multiply gamma, in float64, by an integer flag first, which promotes what follows.
            target = target.to(torch.promote_types(reward.dtype, next_value.dtype))
        else:
            target = estimator.value_estimate(tensordict, target_params=params)
        return target.squeeze(-1)

    def _get_params(self, name: str, parameters: Parameters | None) -> TensorDictBase:
        if parameters is None:
            return getattr(self, name)
        if name in parameters:
            return parameters[name]
        if name == "target_value_network_params" and not self.delay_value:
            return self._get_params("value_network_params", parameters)
        return getattr(self, name)

    # ------------------------------------------------------------------ TorchRL's contract

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._schedulable_buffers and isinstance(value, int | float):  # a schedule
            check_argument(AlgorithmOptions, name, value)
        super().__setattr__(name, value)  # pyright: ignore[reportArgumentType]

    def _set_in_keys(self) -> None:
        keys = [
            self.tensor_keys.action,
            ("next", self.tensor_keys.reward),
            ("next", self.tensor_keys.done),
            ("next", self.tensor_keys.terminated),
            *self.actor_network.in_keys,
            *[("next", key) for key in self.actor_network.in_keys],
            *self.qvalue_network.in_keys,
            *self.value_network.in_keys,
            *[("next", key) for key in self.value_network.in_keys],
            *([self.tensor_keys.priority_weight] if self.use_prioritized_weights is True else []),
        ]
        self._in_keys = list(dict.fromkeys(keys))

    @property
    def in_keys(self) -> list[NestedKey]:
        if self._in_keys is None:
            self._set_in_keys()
        return self._in_keys  # type: ignore[return-value]

    @in_keys.setter
    def in_keys(self, value: list[NestedKey]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._in_keys = value

    def _make_vmap(self) -> None:
        # set_vmap_randomness asks for the cached vectorised function to be rebuilt; none is cached here, which also
        # keeps the module picklable.
        pass

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None, **hyperparams
    ):
        """Choose the estimator of the Q target: TD0 (default), TD1, TDLambda, an estimator class or an instance.

        Args:
            value_type: a ``ValueEstimators`` member, a ``ValueEstimatorBase`` subclass or instance.
            **hyperparams: of the estimator, such as ``gamma``.

        Raises:
            NotImplementedError: for GAE, MAGAE and VTrace, which are on-policy estimators, by kind, class or instance.
        """
        if value_type is None:
            value_type = self.default_value_estimator
        kind = value_type if isinstance(value_type, type) else type(value_type)
        if issubclass(kind, GAE | MultiAgentGAE | VTrace):
            raise NotImplementedError(
                f"{kind.__name__} is an on-policy estimator, for which {type(self).__name__} has no use; supported are "
                "TD0, TD1, TDLambda, and estimators of your own."
            )
        if issubclass(kind, ValueEstimatorBase):
            return LossModule.make_value_estimator(self, value_type, **hyperparams)  # type: ignore[arg-type]
        estimator = dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={
                "value_target": "value_target",
                "value": self.tensor_keys.value,
                "reward": self.tensor_keys.reward,
                "done": self.tensor_keys.done,
                "terminated": self.tensor_keys.terminated,
            },
            **hyperparams,
        )
        # TorchRL keeps these in float32, whose 0.99 is off by 1e-8.
        kind_of_estimator: Any = self.value_type  # set by the dispatch, from a member or its name
        for name, value in {**default_value_kwargs(kind_of_estimator), **hyperparams}.items():
            if name in dict(estimator.named_buffers(recurse=False)):
                buffer = estimator.get_buffer(name)
                setattr(estimator, name, torch.as_tensor(value, dtype=torch.float64, device=buffer.device))
        return self

    def reset_parameters_recursive(self) -> None:
        """Redraw every network's parameters, each critic by itself, and set the targets equal to them.

        ``LossModule``'s own method draws the targets separately and shows the initialisers a stack of critics as one
        tensor, whose fan-in is wrong. Each layer draws by its own ``reset_parameters``: PyTorch's initialisation, not
        the orthogonal one that :func:`iql_torchrl.build_actor` and its siblings start from.
        """
        for name in _NETWORKS:
            network, params = getattr(self, name), getattr(self, f"{name}_params").data
            for one in params.unbind(0) if params.ndim else (params,):
                with one.to_module(network, preserve_module_state=False):
                    network.reset_parameters_recursive()  # pyright: ignore[reportCallIssue]
            target = self._modules.get(f"target_{name}_params")
            if target is not None:
                target.data.copy_(params)  # pyright: ignore


def _mean_of_minima(qvalues: Tensor, count: int) -> Tensor:
    """The mean, over all subsets of ``count`` of the N critics in ``[N, *B]``, of the smallest in it: ``[*B]``.

    The k-th smallest of N is the smallest of a subset where the others are among the N - k that are larger.
    """
    subsets = [math.comb(len(qvalues) - 1 - smaller, count - 1) for smaller in range(len(qvalues))]
    weights = qvalues.new_tensor(subsets) / sum(subsets)
    return torch.tensordot(weights, qvalues.sort(0).values, dims=1)


def _check_option(name: str, value: Any, options: tuple[Any, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")


def _get(tensordict: TensorDictBase, key: NestedKey, role: str) -> Any:
    entry = tensordict.get(key, None)
    if entry is None:
        raise KeyError(
            f"the input has no entry {key!r}, {role}; it has {_names(tensordict)}. Rename keys with loss.set_keys()."
        )
    return entry


def select_inputs(tensordict: TensorDictBase, network: TensorDictModule, name: str, prefix: str = "") -> TensorDictBase:
    """The inputs of a network; ``prefix`` names where ``tensordict`` itself was found, for the error."""
    inputs = tensordict.select(*network.in_keys, strict=False)
    missing = [key for key in network.in_keys if inputs.get(key, None) is None]
    if missing:
        where = f" under {prefix!r}" if prefix else ""
        raise KeyError(
            f"{name} reads {', '.join(map(repr, missing))}, which the input does not have{where}; it has "
            f"{_names(tensordict)} there."
        )
    return inputs


def _written(out: TensorDictBase, key: NestedKey, network: TensorDictModule, option: str) -> Tensor:
    value = out.get(key, None)
    if value is None:
        raise KeyError(
            f"the loss reads {key!r} but the network writes {', '.join(map(repr, network.out_keys))}; rename that "
            f"network's out_keys, or call loss.set_keys({option}=...)."
        )
    assert isinstance(value, Tensor)
    return value


def _names(tensordict: TensorDictBase) -> str:
    return ", ".join(repr(key) for key in tensordict.keys(True, True)) or "nothing"


def _drop_legacy_critic_dimension(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Earlier TorchRL releases stacked even a single critic: ``[1, ...]`` where it now has no extra dimension."""
    for name, current in module.state_dict().items():
        found = state_dict.get(prefix + name)
        of_critic = name.removeprefix("target_").startswith("qvalue_network_params.")
        if of_critic and isinstance(found, Tensor) and found.shape == (1, *current.shape):
            state_dict[prefix + name] = found.squeeze(0)


@contextmanager
def _evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    training = [module for network in networks for module in network.modules() if module.training]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _standard_deviation(distribution: torch.distributions.Distribution) -> Tensor | None:
    """Standard deviation ``[*B, A]`` of the policy before any squashing, whose own has no closed form.

    ``None`` for discrete actions.
    """
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist  # type: ignore[attr-defined]
    if isinstance(distribution, torch.distributions.Categorical | torch.distributions.Bernoulli):
        return None
    try:
        return distribution.stddev
    except NotImplementedError:
        return None
