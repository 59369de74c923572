"""Networks of plain layers: a ``ProbabilisticActor``, a list of critics Q(s, a), and V(s)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Binary, Bounded, Categorical, MultiOneHot, OneHot, TensorSpec
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator

from iql_torchrl.configuration.declaring import check_argument, check_arguments
from iql_torchrl.configuration.options import ActionSpace, AlgorithmOptions, Sizes
from iql_torchrl.distributions import Bits, Deterministic, MultiOneHotCategorical


class NormalParameters(nn.Module):
    """Observation -> mean and standard deviation of a Normal policy, each ``[*B, A]``.

    Args:
        trunk: observations ``[*B, O]`` -> the unsquashed mean ``[*B, A]``, and behind it, where the standard deviation
            depends on the state, as many numbers for that.
        action_dim: A.
        squash_mean: the mean is the tanh of the trunk's.
        standard_deviation: ``"state_independent"``: a learnt log standard deviation, starting at 0; ``"constant"``: 1;
            ``"state_dependent"``: a log standard deviation from the trunk; ``"biased_softplus"``: TorchRL's, from the
            trunk, softplus(x + log(e^0.99 - 1)) + 0.01, which is 1 at x = 0, and at least 0.1.
        log_std_bounds: the first two are clipped to these.
    """

    def __init__(
        self,
        trunk: nn.Module,
        action_dim: int,
        *,
        squash_mean: bool = True,
        standard_deviation: str = "state_independent",
        log_std_bounds: Sequence[float] = (-5.0, 2.0),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.squash_mean = squash_mean
        self.standard_deviation = standard_deviation
        self.log_std_bounds = tuple(log_std_bounds)
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if standard_deviation == "state_independent" else None

    def reset_parameters(self) -> None:
        """Set a learnt log standard deviation to 0, as at the start."""
        if self.log_std is not None:
            nn.init.zeros_(self.log_std)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        out = self.trunk(observation)
        if self.log_std is not None:
            mean, log_std = out, self.log_std.expand_as(out)
        elif self.standard_deviation == "constant":
            mean, log_std = out, torch.zeros_like(out)
        else:
            mean, log_std = out.chunk(2, -1)
        if self.squash_mean:
            mean = torch.tanh(mean)
        if self.standard_deviation == "biased_softplus":
            # Not tensordict's extractor, whose shift is rounded to float32.
            return mean, (nn.functional.softplus(log_std + _SOFTPLUS_SHIFT) + 0.01).clamp(min=0.1)
        return mean, log_std.clamp(*self.log_std_bounds).exp()


_SOFTPLUS_SHIFT = math.log(math.expm1(0.99))


def build_actor(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    dropout: float | None = None,
    layer_norm: bool = False,
    activation: str = "relu",
    policy: str = "tanh_mean_normal",
    standard_deviation: str = "state_independent",
    log_std_bounds: Sequence[float] = (-5.0, 2.0),
    extra_layer: bool = False,
    initialisation: str = "orthogonal",
) -> ProbabilisticActor:
    """The policy, reading ``observation`` ``[*B, observation_dim]`` and writing ``action`` ``[*B, A]``.

    Args:
        observation_dim: size of an observation.
        action_dim: A, size of an action; the policy acts in [-1, 1], which the training data are rescaled to.
        hidden_dims: widths of the hidden layers.
        dropout: probability, after each hidden layer (the paper's 0.1 on Kitchen and Adroit).
        layer_norm: normalise each hidden layer before its activation.
        activation: of the hidden layers: ``"relu"`` (the paper's), ``"tanh"``, ``"gelu"``, ``"silu"`` or ``"elu"``.
        policy: ``"tanh_mean_normal"`` (paper, CORL: the mean is squashed, the sample is not, so the log-probability
            has no Jacobian), ``"tanh_normal"`` (RLinf, TorchRL: the sample is squashed), ``"normal"`` (nothing is), or
            ``"deterministic"`` (CORL's option: tanh, trained by squared error).
        standard_deviation: ``"state_independent"`` (paper, RLinf, CORL), ``"state_dependent"``, ``"constant"``
            (OGBench's GCIQL), or ``"biased_softplus"`` (TorchRL); see :class:`NormalParameters`.
        log_std_bounds: the log standard deviation is clipped to these; (-5, 2) in the paper's code and RLinf, (-20, 2)
            in CORL.
        extra_layer: one more hidden layer of the last width, without dropout (RLinf).
        initialisation: ``"orthogonal"`` (gain sqrt(2) whatever the activation, 1e-3 for a state-dependent log standard
            deviation, biases 0: paper) or ``"default"`` (PyTorch's).

    The log-density of ``tanh_normal`` is infinite on the bounds themselves; there it is that of the action clipped to
    1 - ``torch.finfo(dtype).resolution``: 1 - 1e-6 in float32, 1 - 1e-15 in float64 (TorchRL's clip; RLinf's is 1e-6).
    The other policies' are finite everywhere.

    Raises:
        ValueError: an unknown policy, standard deviation, activation or initialisation, sizes below 1, log_std_bounds
            that are not two ordered numbers, or a dropout outside [0, 1).
    """
    check_arguments(Sizes, observation_dim=observation_dim, action_dim=action_dim)
    check_arguments(
        AlgorithmOptions, policy=policy, standard_deviation=standard_deviation, log_std_bounds=log_std_bounds
    )
    from_state = policy != "deterministic" and standard_deviation in ("state_dependent", "biased_softplus")
    trunk = mlp(
        observation_dim,
        (1 + from_state) * action_dim,
        hidden_dims,
        dropout,
        layer_norm,
        activation,
        initialisation,
        extra_layer=extra_layer,
    )
    if from_state and standard_deviation == "state_dependent" and initialisation == "orthogonal":
        # Two layers in the original code, each orthogonal by itself.
        last = trunk[-1]
        assert isinstance(last, nn.Linear)
        nn.init.orthogonal_(last.weight[:action_dim].data, gain=math.sqrt(2))
        nn.init.orthogonal_(last.weight[action_dim:].data, gain=1e-3)
    if policy == "deterministic":
        network: nn.Module = nn.Sequential(trunk, nn.Tanh())
        distribution, options, keys = Deterministic, {}, ["loc"]
    else:
        network = NormalParameters(
            trunk,
            action_dim,
            squash_mean=policy == "tanh_mean_normal",
            standard_deviation=standard_deviation,
            log_std_bounds=log_std_bounds,
        )
        keys = ["loc", "scale"]
        if policy == "tanh_normal":
            distribution, options = TanhNormal, {"low": -1.0, "high": 1.0}
        else:
            # Checking every batch for NaN would break the compiled graph.
            distribution, options = IndependentNormal, {"validate_args": False}
    spec = Bounded(low=-1.0, high=1.0, shape=torch.Size([action_dim]), dtype=torch.float32)
    return _probabilistic_actor(network, keys, distribution, options, spec)


def build_discrete_actor(
    observation_dim: int,
    num_actions: int | Sequence[int],
    *,
    action_space: str = "categorical",
    hidden_dims: Sequence[int] = (256, 256),
    dropout: float | None = None,
    layer_norm: bool = False,
    activation: str = "relu",
    initialisation: str = "orthogonal",
) -> ProbabilisticActor:
    """A policy over discrete actions, for :class:`~iql_torchrl.DiscreteIQLLoss`.

    Args:
        observation_dim: size of an observation.
        num_actions: how many actions there are; for ``"mult_one_hot"`` a list, one number a sub-action; for
            ``"binary"`` the number of bits.
        action_space: ``"categorical"`` (``action`` an integer, ``[*B]``), ``"one_hot"``, ``"mult_one_hot"`` or
            ``"binary"`` (``action`` ``[*B, n]``, int64).
        hidden_dims, dropout, layer_norm, activation, initialisation: as in :func:`build_actor`.

    Raises:
        ValueError: an unknown action space, activation or initialisation, sizes below 1, or a dropout outside [0, 1).
    """
    check_arguments(Sizes, observation_dim=observation_dim)
    counts = _action_counts(num_actions, action_space)
    trunk = mlp(observation_dim, sum(counts), hidden_dims, dropout, layer_norm, activation, initialisation)
    options: dict[str, Any] = {"validate_args": False}
    if action_space == "categorical":
        distribution, spec = torch.distributions.Categorical, Categorical(counts[0])
    elif action_space == "binary":
        distribution, spec = Bits, Binary(counts[0], dtype=torch.int64)
    else:
        one_hot = action_space == "one_hot"
        spec = OneHot(counts[0], dtype=torch.int64) if one_hot else MultiOneHot(counts, dtype=torch.int64)
        distribution, options["num_actions"] = MultiOneHotCategorical, counts
    return _probabilistic_actor(trunk, ["logits"], distribution, options, spec)


def _probabilistic_actor(
    network: nn.Module, keys: Sequence[NestedKey], distribution: Any, options: dict[str, Any], spec: TensorSpec
) -> ProbabilisticActor:
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=list(keys)),
        in_keys=list(keys),
        out_keys=["action"],
        spec=spec,
        distribution_class=distribution,
        distribution_kwargs=options,
    )


def build_qvalues(
    observation_dim: int,
    action_dim: int,
    *,
    num_qvalue_nets: int = 2,
    hidden_dims: Sequence[int] = (256, 256),
    layer_norm: bool = False,
    activation: str = "relu",
    initialisation: str = "orthogonal",
) -> list[ValueOperator]:
    """Independent critics: ``observation``, ``action`` -> ``state_action_value`` ``[*B, 1]``.

    A list, because a loss given one network and a count redraws its weights and loses the initialisation.

    Raises:
        ValueError: an unknown activation or initialisation, or sizes or a number of critics below 1.
    """
    check_arguments(Sizes, observation_dim=observation_dim, action_dim=action_dim)
    check_arguments(AlgorithmOptions, num_qvalue_nets=num_qvalue_nets)
    return [
        ValueOperator(
            mlp(observation_dim + action_dim, 1, hidden_dims, None, layer_norm, activation, initialisation),
            in_keys=["observation", "action"],
        )
        for _ in range(num_qvalue_nets)
    ]


def build_discrete_qvalues(
    observation_dim: int,
    num_actions: int | Sequence[int],
    *,
    action_space: str = "categorical",
    num_qvalue_nets: int = 2,
    hidden_dims: Sequence[int] = (256, 256),
    layer_norm: bool = False,
    activation: str = "relu",
    initialisation: str = "orthogonal",
) -> list[ValueOperator]:
    """Independent critics over discrete actions: ``observation`` -> ``state_action_value`` of every action at once.

    Its shape is ``[*B, n]``, with n of :func:`build_discrete_actor`, and one more for ``"binary"``: see the table of
    :class:`~iql_torchrl.DiscreteIQLLoss`.

    Raises:
        ValueError: as :func:`build_discrete_actor`, or a number of critics below 1.
    """
    check_arguments(Sizes, observation_dim=observation_dim)
    check_arguments(AlgorithmOptions, num_qvalue_nets=num_qvalue_nets)
    out_features = sum(_action_counts(num_actions, action_space)) + (action_space == "binary")
    return [
        ValueOperator(
            mlp(observation_dim, out_features, hidden_dims, None, layer_norm, activation, initialisation),
            in_keys=["observation"],
            out_keys=["state_action_value"],
        )
        for _ in range(num_qvalue_nets)
    ]


def build_value(
    observation_dim: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    layer_norm: bool = False,
    activation: str = "relu",
    initialisation: str = "orthogonal",
) -> ValueOperator:
    """V: ``observation`` -> ``state_value`` ``[*B, 1]``.

    Raises:
        ValueError: an unknown activation or initialisation, or sizes below 1.
    """
    check_arguments(Sizes, observation_dim=observation_dim)
    return ValueOperator(
        mlp(observation_dim, 1, hidden_dims, None, layer_norm, activation, initialisation), in_keys=["observation"]
    )


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
}


def mlp(
    in_features: int,
    out_features: int,
    hidden_dims: Sequence[int],
    dropout: float | None,
    layer_norm: bool,
    activation: str,
    initialisation: str,
    *,
    extra_layer: bool = False,
) -> MLP:
    """Linear layers, each hidden one with a layer norm where asked for, an activation and dropout."""
    check_arguments(AlgorithmOptions, hidden_dims=hidden_dims, activation=activation, initialisation=initialisation)
    check_argument(AlgorithmOptions, "dropout_rate", dropout, "dropout")
    widths = [*hidden_dims, *hidden_dims[-1:]] if extra_layer else list(hidden_dims)
    network = MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=widths,
        activation_class=_ACTIVATIONS[activation],
        norm_class=nn.LayerNorm if layer_norm else None,
        norm_kwargs=[{"normalized_shape": width} for width in widths] if layer_norm else None,
    )
    if dropout:
        # After the activation, as in the original code; TorchRL's MLP has it before the normalisation, which undoes it.
        activations = [index for index, layer in enumerate(network) if isinstance(layer, _ACTIVATIONS[activation])]
        for index in reversed(activations[: len(hidden_dims)]):
            network.insert(index + 1, nn.Dropout(dropout))
    if initialisation == "orthogonal":
        for layer in network:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
                nn.init.zeros_(layer.bias)
    return network


def _action_counts(num_actions: int | Sequence[int], action_space: str) -> list[int]:
    known = get_args(ActionSpace)
    if action_space not in known:
        raise ValueError(f"action_space must be one of {', '.join(known)}, got {action_space!r}.")
    several = action_space == "mult_one_hot"
    counts = list(num_actions) if isinstance(num_actions, Sequence) and several else [num_actions]
    if isinstance(num_actions, Sequence) != several or not counts or not all(_is_size(count) for count in counts):
        expected = "a list of integers >= 1" if several else "an integer >= 1"
        raise ValueError(f"num_actions must be {expected} for action_space={action_space!r}, got {num_actions!r}.")
    return counts  # pyright: ignore[reportReturnType]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
