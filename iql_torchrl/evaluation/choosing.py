"""Decisions of a stochastic policy: several draws, of which one is taken by Q."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, TanhNormal

from iql_torchrl.configuration.declaring import check_arguments
from iql_torchrl.configuration.options import EvaluationOptions
from iql_torchrl.networks import GenerativeActor, build_qvalues, build_value
from iql_torchrl.objectives import IQLLoss

_OF_CRITICS = ("observation_dim", "hidden_dims", "activation")
_NUMBERS = ("expectile", "temperature", "max_weight")


class NormalDraws(nn.Module):
    """Draws of a Normal policy, squashed or not, as a function of standard Normals.

    Args:
        network: observation -> mean and standard deviation.
        distribution: ``IndependentNormal`` or ``TanhNormal``.
        action_dim: A.
    """

    noises = 1

    def __init__(self, network: nn.Module, distribution: type, action_dim: int) -> None:
        super().__init__()
        self.network = network
        self.squashed = distribution is TanhNormal
        self.action_dim = action_dim

    def generate(self, observation: Tensor, noise: Tensor) -> Tensor:
        """As :meth:`iql_torchrl.networks.GenerativeActor.generate`."""
        mean, standard_deviation = self.network(observation)
        action = mean + standard_deviation * noise.squeeze(-2)
        return (action.tanh() if self.squashed else action).clamp(-1, 1)


class Chooser(nn.Module):
    """Draws ``num_samples`` actions of a policy and takes one of them by Q, without anything of TorchRL.

    As IFQL does (Park et al. 2025, arXiv 2502.02538), and IDQL (Hansen-Estruch et al. 2023, arXiv 2304.10573), whose
    rules are the ``selection``:

    - ``"largest"``: the draw with the largest Q;
    - ``"expectile"``: one drawn with weights :math:`|\\tau - 1(Q < V)|`, those of the policy that the expectile of V
      stands for (its theorem 4.1);
    - ``"exponential"``: one drawn with IQL's weights :math:`\\min(e^{\\beta (Q - V)}, w_{max})`.

    Args:
        draws: with ``generate``, ``noises`` and ``action_dim``: a ``GenerativeActor`` or :class:`NormalDraws`.
        critics: observation, action -> Q ``[*B, 1]``.
        value: observation -> V ``[*B, 1]``.
        num_samples: N.
        selection: rule of the choice.
        qvalue_aggregation: of the critics: the smallest, or ``"mean"``.
        expectile, temperature, max_weight: of the weights.

    Raises:
        ValueError: ``num_samples`` below 1, or an unknown ``selection``.
    """

    def __init__(
        self,
        draws: nn.Module,
        critics: Sequence[nn.Module],
        value: nn.Module,
        *,
        num_samples: int,
        selection: str = "largest",
        qvalue_aggregation: str = "min",
        expectile: float = 0.7,
        temperature: float = 3.0,
        max_weight: float = 100.0,
    ) -> None:
        check_arguments(EvaluationOptions, num_samples=num_samples, selection=selection)
        super().__init__()
        self.draws: Any = draws
        self.critics = nn.ModuleList(critics)
        self.value = value
        self.num_samples = num_samples
        self.selection = selection
        self.qvalue_aggregation = qvalue_aggregation
        self.expectile, self.temperature, self.max_weight = expectile, temperature, max_weight
        self.eval()

    @classmethod
    def of_loss(cls, loss: IQLLoss, actor: nn.Module, num_samples: int | None, selection: str) -> Chooser | None:
        """With the networks of a loss, sharing their parameters.

        ``None`` where there is nothing to draw: discrete actions, deterministic policies; and of networks that read
        other entries than the builders' do.
        """
        draws, critic, value = _draws_of(actor), loss.qvalue_network, loss.value_network
        plain = all(isinstance(network, TensorDictModule) for network in (critic, value))
        if draws is None or not plain or critic.in_keys != ["observation", "action"]:
            return None
        stacked: Any = dict(loss.named_children())[loss.choosing_critics]  # without TorchRL's warning
        stacked = stacked.data
        critics = [_shared(critic, params) for params in (stacked.unbind(0) if stacked.ndim else [stacked])]
        numbers = {name: float(getattr(loss, name)) for name in _NUMBERS}
        return cls(
            draws,
            critics,
            _shared(value, loss.value_network_params.data),
            num_samples=loss.default_num_samples if num_samples is None else num_samples,
            selection=selection,
            qvalue_aggregation=loss.qvalue_aggregation,
            **numbers,
        )

    @property
    def chooses(self) -> bool:
        """Whether there is more than the one action of a distribution, which a policy has without this."""
        return self.num_samples > 1 or isinstance(self.draws, GenerativeActor)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of the standard Normals of a decision: draws, Normals for each, and size of an action."""
        return self.num_samples, self.draws.noises, self.draws.action_dim

    def forward(self, observation: Tensor, noise: Tensor, gumbel: Tensor | None = None) -> Tensor:
        """Actions ``[B, A]`` in [-1, 1] for normalised observations ``[B, O]``.

        Args:
            observation: of the decisions.
            noise: standard Normals, ``[B, *noise_shape]``.
            gumbel: standard Gumbels, ``[B, N]``, for a choice that is drawn.
        """
        if self.num_samples == 1:
            return self.draws.generate(observation.unsqueeze(1), noise).squeeze(1)
        actions, score = self.valued(observation, noise)
        if self.selection != "largest":
            assert gumbel is not None
            score = self.log_weight(score - self.value(observation)) + gumbel
        chosen = score.argmax(-1)[:, None, None].expand(-1, 1, actions.shape[-1])
        return actions.gather(1, chosen).squeeze(1)

    def valued(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The draws ``[B, N, A]`` of :meth:`forward`, and their Q ``[B, N]``."""
        rows = observation.unsqueeze(1)
        actions = self.draws.generate(rows, noise)
        rows = rows.expand(-1, self.num_samples, -1)
        qvalues = torch.stack([critic(rows, actions) for critic in self.critics])
        qvalue = qvalues.mean(0) if self.qvalue_aggregation == "mean" else qvalues.amin(0)
        return actions, qvalue.squeeze(-1)

    def log_weight(self, advantage: Tensor) -> Tensor:
        """Logarithm of the unnormalised probability with which a draw of this advantage is taken."""
        if self.selection == "expectile":
            above, below = advantage.new_tensor([self.expectile, 1 - self.expectile]).log()
            return torch.where(advantage > 0, above, below)
        return (self.temperature * advantage).clamp(max=math.log(self.max_weight))

    def noise_for(self, observation: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """What a decision draws, as a function of the observation and a seed: no generator moves.

        Args:
            observation: raw ones, float32, ``[B, O]``.
            seed: of the draws.

        Returns:
            ``noise`` and ``gumbel`` of :meth:`forward`, float32.
        """
        normals = np.empty((len(observation), *self.noise_shape), np.float32)
        gumbels = np.empty((len(observation), self.num_samples), np.float32)
        for row, normal, gumbel in zip(np.ascontiguousarray(observation), normals, gumbels, strict=True):
            digest = hashlib.blake2b(row.tobytes(), digest_size=16, key=seed.to_bytes(8, "little")).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            generator.standard_normal(out=normal, dtype=np.float32)
            gumbel[:] = generator.gumbel(size=self.num_samples)
        return torch.from_numpy(normals), torch.from_numpy(gumbels)

    def stored(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """What :meth:`restored` needs besides the policy; ``architecture`` as of the policy's builder."""
        critics = [_copied(critic) for critic in self.critics]  # stacked as those of a loss are
        return {
            "num_samples": self.num_samples,
            "selection": self.selection,
            "qvalue_aggregation": self.qvalue_aggregation,
            **{name: getattr(self, name) for name in _NUMBERS},
            "architecture": {key: architecture[key] for key in _OF_CRITICS if key in architecture},
            "layer_norm": {"critic": _has_layer_norm(self.critics), "value": _has_layer_norm(self.value)},
            "critics": {name: torch.stack([one[name] for one in critics]) for name in critics[0]},
            "value": _copied(self.value),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], actor: nn.Module, **choice: Any) -> Chooser:
        """From :meth:`stored`, with a ``num_samples`` or ``selection`` in place of those there."""
        draws: Any = _draws_of(actor)
        sizes, layer_norm = state["architecture"], state["layer_norm"]
        critics = TensorDict(state["critics"]).auto_batch_size_(1).unbind(0)
        several = {**sizes, "num_qvalue_nets": len(critics), "layer_norm": layer_norm["critic"]}
        built: list[Any] = build_qvalues(action_dim=draws.action_dim, **several)
        value: Any = build_value(**sizes, layer_norm=layer_norm["value"])
        networks = [one.module for one in (*built, value)]
        for network, found in zip(networks, [*critics, state["value"]], strict=True):
            network.load_state_dict(dict(found.items()))
        options = {name: state[name] for name in ("num_samples", "selection", "qvalue_aggregation", *_NUMBERS)} | choice
        return cls(draws, networks[:-1], networks[-1], **options)


def _draws_of(actor: Any) -> nn.Module | None:
    """Of a stochastic policy with continuous actions; ``None`` for others."""
    if isinstance(actor, GenerativeActor):
        return actor
    parts = getattr(actor, "module", ())
    if len(parts) != 2 or not isinstance(parts[0], TensorDictModule) or parts[0].in_keys != ["observation"]:
        return None
    kind = getattr(parts[1], "distribution_class", None)
    if kind not in (IndependentNormal, TanhNormal):
        return None
    return NormalDraws(parts[0].module, kind, actor.spec["action"].shape[-1])


def _shared(network: Any, params: Any) -> nn.Module:
    """A module of its own with these tensors as parameters."""
    found = copy.deepcopy(network)
    params.apply(lambda tensor: nn.Parameter(tensor, requires_grad=False)).to_module(found)
    return found.module


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def _has_layer_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.LayerNorm) for module in network.modules())
