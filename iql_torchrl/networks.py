"""Builders of the networks: a ``ProbabilisticActor``, a list of critics Q(s, a), and V(s)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import MLP, IndependentNormal, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator

POLICIES = ("tanh_mean_normal", "tanh_normal")
INITIALISATIONS = ("orthogonal", "default")


class TanhMeanNormal(nn.Module):
    """Observation -> mean in (-1, 1) and a standard deviation that no state changes.

    The policy of the original code: the mean is squashed, the sample is not, so the log-probability has no Jacobian.

    Args:
        trunk: observations ``[*B, O]`` -> unsquashed mean ``[*B, A]``.
        action_dim: A.
        log_std_bounds: the learnt log standard deviation starts at 0 and is clipped to these.
    """

    def __init__(self, trunk: nn.Module, action_dim: int, log_std_bounds: tuple[float, float] = (-5.0, 2.0)) -> None:
        super().__init__()
        self.trunk = trunk
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.log_std_bounds = log_std_bounds

    def reset_parameters(self) -> None:
        """Set the log standard deviation to 0, as at the start."""
        nn.init.zeros_(self.log_std)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        loc = torch.tanh(self.trunk(observation))
        return loc, self.log_std.clamp(*self.log_std_bounds).exp().expand_as(loc)


def build_actor(
    observation_dim: int,
    action_dim: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    dropout: float | None = None,
    layer_norm: bool = False,
    policy: str = "tanh_mean_normal",
    initialisation: str = "orthogonal",
) -> ProbabilisticActor:
    """The policy, reading ``observation`` ``[*B, observation_dim]`` and writing ``action`` ``[*B, A]``.

    Args:
        observation_dim: size of an observation.
        action_dim: A, size of an action; the policy acts in [-1, 1], which the training data are rescaled to.
        hidden_dims: widths of the hidden layers.
        dropout: probability, after each hidden layer (the paper's 0.1 on Kitchen and Adroit).
        layer_norm: normalise each hidden layer before its activation.
        policy: ``"tanh_mean_normal"`` (paper) or ``"tanh_normal"`` (TorchRL: squashed sample with Jacobian,
            state-dependent standard deviation through a biased softplus with lower bound 0.1).
        initialisation: ``"orthogonal"`` (gain sqrt(2), biases 0: paper) or ``"default"`` (PyTorch's).

    Raises:
        ValueError: an unknown policy or initialisation, or a dropout outside [0, 1).
    """
    if policy == "tanh_mean_normal":
        trunk = _mlp(observation_dim, action_dim, hidden_dims, dropout, layer_norm, initialisation)
        network: nn.Module = TanhMeanNormal(trunk, action_dim)
        # Checking every batch for NaN would break the compiled graph.
        distribution, options = IndependentNormal, {"validate_args": False}
    elif policy == "tanh_normal":
        trunk = _mlp(observation_dim, 2 * action_dim, hidden_dims, dropout, layer_norm, initialisation)
        network = nn.Sequential(trunk, NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1))  # type: ignore[arg-type]
        distribution, options = TanhNormal, {"low": -1.0, "high": 1.0}
    else:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=["action"],
        spec=Bounded(low=-1.0, high=1.0, shape=torch.Size([action_dim]), dtype=torch.float32),
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
    initialisation: str = "orthogonal",
) -> list[ValueOperator]:
    """Independent critics: ``observation``, ``action`` -> ``state_action_value`` ``[*B, 1]``.

    A list, because a loss given one network and a count redraws its weights and loses the initialisation.
    """
    return [
        ValueOperator(
            _mlp(observation_dim + action_dim, 1, hidden_dims, None, layer_norm, initialisation),
            in_keys=["observation", "action"],
        )
        for _ in range(num_qvalue_nets)
    ]


def build_value(
    observation_dim: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    layer_norm: bool = False,
    initialisation: str = "orthogonal",
) -> ValueOperator:
    """V: ``observation`` -> ``state_value`` ``[*B, 1]``."""
    return ValueOperator(
        _mlp(observation_dim, 1, hidden_dims, None, layer_norm, initialisation), in_keys=["observation"]
    )


def _mlp(
    in_features: int,
    out_features: int,
    hidden_dims: Sequence[int],
    dropout: float | None,
    layer_norm: bool,
    initialisation: str,
) -> MLP:
    if not hidden_dims or any(width < 1 for width in hidden_dims):
        raise ValueError(f"hidden_dims must hold at least one positive width, got {list(hidden_dims)}.")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
    network = MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(hidden_dims),
        activation_class=nn.ReLU,
        norm_class=nn.LayerNorm if layer_norm else None,
        norm_kwargs=[{"normalized_shape": width} for width in hidden_dims] if layer_norm else None,
    )
    if dropout:
        # After the activation, as in the original code; TorchRL's MLP has it before the normalisation, which undoes it.
        for index in reversed(range(len(network))):
            if isinstance(network[index], nn.ReLU):
                network.insert(index + 1, nn.Dropout(dropout))
    if initialisation == "orthogonal":
        for layer in network:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
                nn.init.zeros_(layer.bias)
    elif initialisation != "default":
        raise ValueError(f"initialisation must be one of {', '.join(INITIALISATIONS)}, got {initialisation!r}.")
    return network
