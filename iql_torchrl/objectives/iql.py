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
    dispatch_value_estimator,
    distance_loss,
)
from torchrl.objectives.value import (
    TD0Estimator,
    TD1Estimator,
    TDLambdaEstimator,
    ValueEstimatorBase,
)

Parameters = Mapping[str, TensorDictBase]

_NETWORKS = ("actor_network", "value_network", "qvalue_network")
_PARAMETER_NAMES = tuple(f"{prefix}{network}_params" for network in _NETWORKS for prefix in ("", "target_"))


class IQLLoss(LossModule):
    r"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv 2110.06169).

    Three losses, in the order of the paper, for transitions :math:`(s, a, r, s')` of a fixed dataset:

    1. expectile regression of V towards the target critics (equation 5),
       :math:`L_V = E[\,|\tau - 1(u < 0)|\,u^2\,]`, with
       :math:`u = \min_i \hat Q_i(s, a) - V(s)`;
    2. temporal-difference regression of every critic (equation 6),
       :math:`L_Q = \sum_i E[(r + \gamma (1 - \mathrm{terminated}) V(s') - Q_i(s, a))^2]`:
       truncated transitions bootstrap, terminated ones do not;
    3. advantage-weighted behaviour cloning (equation 7),
       :math:`L_\pi = -E[\min(e^{\beta (\min_i \hat Q_i(s, a) - V(s))}, w_{max}) \log \pi(a | s)]`.

    A hat marks target parameters. ``temperature`` is :math:`\beta`, the *inverse* temperature of the paper and of
    every code base; the formula with :math:`e^{(Q - V) / \beta}` is the same thing with the reciprocal. No gradient
    reaches the target critics, the weight of the third loss, or V(s').

    :meth:`forward` is the joint update: every loss sees the same, old, parameters, and one target-Q pass, one V pass
    over s and one over s' serve all three. The paper updates V first and lets the others see the new one: call
    :meth:`value_loss`, :meth:`actor_loss` and :meth:`qvalue_loss` one by one for that order, as
    :class:`~iql_torchrl.training.TrainingStep` does, and hand the result of :meth:`target_qvalue` to the first two so
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

    Raises:
        ValueError: ``expectile``, ``temperature``, ``max_weight`` or ``num_qvalue_nets`` out of range, an unknown
            ``loss_function``, ``reduction`` or ``scalar_output_mode``, or a list of critics whose length is not
            ``num_qvalue_nets``.
        TypeError: ``gamma`` given: it belongs to :meth:`make_value_estimator`.
        RuntimeError: ``priority_key`` given: it belongs to :meth:`set_keys`.

    Inputs are ``action``, the networks' ``in_keys``, and under ``"next"`` the observation, ``reward``, ``done`` and
    ``terminated``, of any batch shape ``[*B]``. :meth:`forward` returns scalars ``loss_actor``, ``loss_qvalue``,
    ``loss_value`` and ``entropy``, and writes ``td_error`` (the largest squared error over the critics, shape
    ``[*B]``) and the log-probability into its input. ``temperature``, ``expectile`` and ``max_weight`` are
    non-persistent buffers: assign a float to schedule one; a compiled step sees it without recompiling.
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

    tensor_keys: _AcceptedKeys  # pyright: ignore[reportIncompatibleMethodOverride]
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = ["loss_actor", "loss_qvalue", "loss_value", "entropy"]  # pyright: ignore

    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )
    _schedulable_buffers = frozenset({"temperature", "expectile", "max_weight"})

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
    ) -> None:
        if gamma is not None:
            raise TypeError(_GAMMA_LMBDA_DEPREC_ERROR)
        _check_range("temperature", temperature, 0 <= temperature < math.inf, "a finite number >= 0")
        _check_range("expectile", expectile, 0 < expectile <= 1, "a number in (0, 1]")
        _check_range("max_weight", max_weight, max_weight > 0, "a number > 0")
        whole = isinstance(num_qvalue_nets, int) and num_qvalue_nets >= 1
        _check_range("num_qvalue_nets", num_qvalue_nets, whole, "an integer >= 1")
        _check_option("loss_function", loss_function, ("l2", "l1", "smooth_l1"))
        _check_option("reduction", reduction, ("mean", "sum", "none", None))
        _check_option("scalar_output_mode", scalar_output_mode, ("exclude", "non_tensor", None))
        self._in_keys = None
        self._out_keys = None
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        # float64 scalars promote with nothing, so a float64 loss keeps 0.7 exactly and a float32 one stays float32;
        # not persistent because TorchRL's state_dict has no such entries.
        for name, value in (("temperature", temperature), ("expectile", expectile), ("max_weight", max_weight)):
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64), persistent=False)
        self.loss_function = loss_function
        self.deactivate_vmap = deactivate_vmap
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.delay_value = delay_value

        shared_with_actor = list(actor_network.parameters()) if separate_losses else None
        self.convert_to_functional(actor_network, "actor_network", create_target_params=False)
        self.convert_to_functional(
            value_network,
            "value_network",
            create_target_params=delay_value,
            compare_against=shared_with_actor,
        )
        shared_with_either = [*shared_with_actor, *value_network.parameters()] if shared_with_actor else None
        if isinstance(qvalue_network, Sequence):
            if len(qvalue_network) != num_qvalue_nets:
                raise ValueError(
                    f"qvalue_network is a list of {len(qvalue_network)} networks but num_qvalue_nets is "
                    f"{num_qvalue_nets}; pass num_qvalue_nets={len(qvalue_network) or 'at least 1'}."
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
        """Expectile regression of V(s) towards the smallest target Q(s, a) (equation 5).

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
        loss = self.loss_value_diff(target_qvalue - value, self.expectile)
        return self._reduce_loss(loss, tensordict=tensordict), {}

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
            the reduced loss, summed over the critics, and ``{"td_error": [num_qvalue_nets, *B]}``, squared errors.
        """
        target = self._qvalue_target(tensordict, parameters)
        prediction = self._qvalues(tensordict, self._get_params("qvalue_network_params", parameters))
        target = target.expand_as(prediction)
        loss = distance_loss(prediction, target, loss_function=self.loss_function).sum(0)
        td_error = (prediction - target).detach().pow(2)
        return self._reduce_loss(loss, tensordict=tensordict), {"td_error": td_error}

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
        log_prob = self._distribution(tensordict, parameters).log_prob(tensordict.get(self.tensor_keys.action))
        if log_prob.shape != weight.shape:
            raise RuntimeError(
                f"the log-probability of {self.tensor_keys.action!r} has shape {tuple(log_prob.shape)} but the "
                f"critics' {self.tensor_keys.state_action_value!r} has shape {tuple(weight.shape)} without its last "
                "dimension; the distribution must sum over the action dimension and Q must end in one of size 1."
            )
        tensordict.set(self.tensor_keys.log_prob, log_prob.detach())
        return self._reduce_loss(-weight * log_prob, tensordict=tensordict), {}

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
        loss_value = self._reduce_loss(
            self.loss_value_diff(target_qvalue - value, self.expectile), tensordict=tensordict
        )
        loss_actor, _ = self.actor_loss(
            tensordict,
            target_qvalue=target_qvalue,
            state_value=None if self.delay_value else value.detach(),
            parameters=parameters,
        )
        loss_qvalue, metadata = self.qvalue_loss(tensordict, parameters=parameters)
        tensordict.set(self.tensor_keys.priority, metadata["td_error"].max(0).values)
        entropy = -tensordict.get(self.tensor_keys.log_prob).mean()
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

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float | Tensor = 0.8) -> Tensor:
        """Elementwise expectile loss :math:`|\\tau - 1(u < 0)| u^2` of ``diff`` = u, any shape."""
        return torch.where(diff > 0, expectile, 1 - expectile).to(diff.dtype) * diff.pow(2)

    @torch.no_grad()
    def target_qvalue(self, tensordict: TensorDictBase, *, parameters: Parameters | None = None) -> Tensor:
        """The smallest target Q(s, a), shape ``[*B]``, without gradient."""
        return self._qvalues(tensordict, self._get_params("target_qvalue_network_params", parameters)).min(0).values

    @torch.no_grad()
    def diagnostics(self, tensordict: TensorDictBase, *, parameters: Parameters | None = None) -> TensorDictBase:
        """What a run should watch, as scalars and without dropout: nothing here is computed unless asked for.

        Args:
            tensordict: transitions of batch shape ``[*B]``; left unmodified.
            parameters: as in :meth:`value_loss`.

        Returns:
            ``advantage_mean`` and ``advantage_std``, ``clipped_fraction`` (weights at ``max_weight``),
            ``effective_sample_size`` of the weights as a fraction of the batch, ``qvalue`` (mean smallest target Q),
            ``value``, ``log_prob``, ``policy_std`` and ``td_error`` (mean squared error over critics and batch).
        """
        with _evaluation_mode(self.actor_network, self.qvalue_network, self.value_network):
            target_qvalue = self.target_qvalue(tensordict, parameters=parameters)
            advantage = self._advantage(tensordict, target_qvalue, None, parameters)
            weight = self._advantage_weight(advantage)
            with set_exploration_type(self.deterministic_sampling_mode):
                distribution = self._distribution(tensordict, parameters)
                log_prob = distribution.log_prob(tensordict.get(self.tensor_keys.action))
            prediction = self._qvalues(tensordict, self._get_params("qvalue_network_params", parameters))
            td_error = prediction - self._qvalue_target(tensordict, parameters)
        return TensorDict(
            {
                "advantage_mean": advantage.mean(),
                "advantage_std": advantage.std(correction=0),
                "clipped_fraction": (weight >= self.max_weight).to(weight.dtype).mean(),
                "effective_sample_size": weight.sum().pow(2) / weight.pow(2).sum() / weight.numel(),
                "qvalue": target_qvalue.mean(),
                "value": (target_qvalue - advantage).mean(),
                "log_prob": log_prob.mean(),
                "policy_std": _standard_deviation(distribution).mean(),
                "td_error": td_error.pow(2).mean(),
            }
        )

    def _distribution(
        self, tensordict: TensorDictBase, parameters: Parameters | None
    ) -> torch.distributions.Distribution:
        inputs = tensordict.select(*self.actor_network.in_keys, strict=False)
        params = self._get_params("actor_network_params", parameters)
        with params.to_module(self.actor_network, preserve_module_state=False):
            return self.actor_network.get_dist(inputs)

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
        return target_qvalue - state_value

    @torch.no_grad()
    def _advantage_weight(self, advantage: Tensor) -> Tensor:
        # exp overflows to inf, which the clip brings back to max_weight: no gradient passes here, so no inf * 0 either.
        temperature, max_weight = self.temperature.to(advantage.dtype), self.max_weight.to(advantage.dtype)
        return torch.exp(temperature * advantage).clamp(max=max_weight)

    def _state_value(self, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """V(s) of shape ``[*B]``."""
        inputs = tensordict.select(*self.value_network.in_keys, strict=False)
        with params.to_module(self.value_network, preserve_module_state=False):
            return self.value_network(inputs).get(self.tensor_keys.value).squeeze(-1)

    def _qvalues(self, tensordict: TensorDictBase, params: TensorDictBase) -> Tensor:
        """Q(s, a) of every critic, shape ``[num_qvalue_nets, *B]``."""
        inputs = tensordict.select(*self.qvalue_network.in_keys, strict=False)

        def one_critic(critic_params: TensorDictBase) -> Tensor:
            with critic_params.to_module(self.qvalue_network, preserve_module_state=False):
                return self.qvalue_network(inputs.copy()).get(self.tensor_keys.state_action_value).squeeze(-1)

        if params.ndim == 0:
            return one_critic(params).unsqueeze(0)
        if self.deactivate_vmap:
            return torch.stack([one_critic(critic_params) for critic_params in params.unbind(0)])
        return torch.vmap(one_critic, randomness=self.vmap_randomness)(params)

    @torch.no_grad()
    def _qvalue_target(self, tensordict: TensorDictBase, parameters: Parameters | None) -> Tensor:
        """The value estimator's target, shape ``[*B]``; r + gamma * (1 - terminated) * V(s') for TD0."""
        params = self._get_params("target_value_network_params", parameters)
        # A shallow copy: estimators may standardise the reward in place.
        tensordict = tensordict.copy()
        estimator = self.value_estimator
        if isinstance(estimator, TD0Estimator | TD1Estimator | TDLambdaEstimator):
            next_value = self._state_value(tensordict.get("next"), params).unsqueeze(-1)
            target = estimator.value_estimate(tensordict, next_value=next_value)
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
            NotImplementedError: for GAE, MAGAE and VTrace, which are on-policy estimators.
        """
        if value_type is None:
            value_type = self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase) or (
            isinstance(value_type, type) and issubclass(value_type, ValueEstimatorBase)
        ):
            return LossModule.make_value_estimator(self, value_type, **hyperparams)  # type: ignore[arg-type]
        dispatch_value_estimator(
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
        return self

    def reset_parameters_recursive(self) -> None:
        """Redraw every network's parameters, each critic by itself, and set the targets equal to them.

        ``LossModule``'s own method draws the targets separately and shows the initialisers a stack of critics as one
        tensor, whose fan-in is wrong.
        """
        for name in _NETWORKS:
            network, params = getattr(self, name), getattr(self, f"{name}_params").data
            for one in params.unbind(0) if params.ndim else (params,):
                with one.to_module(network, preserve_module_state=False):
                    network.reset_parameters_recursive()  # pyright: ignore[reportCallIssue]
            target = self._modules.get(f"target_{name}_params")
            if target is not None:
                target.data.copy_(params)  # pyright: ignore


def _check_range(name: str, value: float, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value}.")


def _check_option(name: str, value: str | None, options: tuple[str | None, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}.")


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


def _standard_deviation(distribution: torch.distributions.Distribution) -> Tensor:
    """Standard deviation of the policy before any squashing, whose own has no closed form."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist  # type: ignore[attr-defined]
    return distribution.stddev
