"""A trained policy as a function of raw observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, SafeProbabilisticModule

from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.evaluation.choosing import Chooser
from iql_torchrl.networks import GenerativeActor, build_policy
from iql_torchrl.objectives import IQLLoss
from iql_torchrl.training.checkpoints import checkpoint_file, load_checkpoint

Array = TypeVar("Array", np.ndarray, Tensor)

# Matrix products on the CPU round a row differently in batches of other sizes, by a rule of each processor's own, and a
# thousand steps of HalfCheetah make that another return. In batches of one size all rows are rounded alike.
_ROWS = 8


class Policy:
    """Deterministic policy: raw observation -> action in the environment's own bounds, or its discrete action.

    Args:
        actor: a ``ProbabilisticActor`` over normalised observations and actions in [-1, 1], or discrete ones; or a
            ``GenerativeActor``.
        action_low, action_high: bounds of the environment's actions, ``[A]``; empty for discrete ones.
        normaliser: of the observations, or ``None``.
        chooser: takes one of several draws of ``actor``; needed for a ``GenerativeActor``.
    """

    def __init__(
        self,
        actor: nn.Module,
        action_low: Tensor,
        action_high: Tensor,
        normaliser: ObservationNormaliser | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        self.actor = actor.eval()
        self.action_low = action_low
        self.action_high = action_high
        self.normaliser = normaliser
        self.chooser = chooser

    @classmethod
    def from_loss(
        cls,
        loss: IQLLoss,
        action_low: Tensor,
        action_high: Tensor,
        normaliser: ObservationNormaliser | None = None,
        *,
        num_samples: int | None = None,
        selection: str = "largest",
    ) -> Policy:
        """The policy that ``loss`` trains, sharing its parameters: it follows the training.

        Args:
            loss: of a :class:`~iql_torchrl.TrainingStep` that has been built, where there is one.
            action_low, action_high, normaliser: of the policy.
            num_samples: draws of which a decision takes one; ``None``: as many as the loss is made for.
            selection: which of them; see :class:`~iql_torchrl.evaluation.choosing.Chooser`.

        Raises:
            ConfigurationError: several draws of a policy that has no randomness.
        """
        actor = loss.acting_network()
        chooser = Chooser.of_loss(loss, actor, num_samples, selection)
        if chooser is None and num_samples is not None and num_samples > 1:
            raise ConfigurationError(_nothing_to_draw(num_samples))
        return cls(actor, action_low, action_high, normaliser, chooser)

    @property
    def chooses(self) -> bool:
        """Whether a decision is one of several draws, and not the distribution's mean."""
        return self.chooser is not None and self.chooser.chooses

    def __call__(self, observation: Array) -> Array:
        """The distribution's mean, rescaled and clipped to the action bounds; the likeliest of discrete actions.

        Where the policy :attr:`chooses`, one of several draws, which hang on the observation and on no generator.

        On a CPU, an observation has the same action by itself and in a batch of any size, bit for bit.

        Args:
            observation: ``[O]`` or ``[*B, O]``, NumPy or torch.

        Returns:
            actions ``[A]`` or ``[*B, A]`` of the same kind, float32; discrete ones ``[]`` or ``[*B]``, int64.
        """
        return self._act(observation, ExplorationType.DETERMINISTIC)

    def explore(self, observation: Array, seed: int, *, sample: bool = True, noise: float = 0.0) -> Array:
        """An action to learn from, which depends on the observation and the seed alone.

        Args:
            observation: as for a call.
            seed: of the draws; the generator of the process stays as it was.
            sample: draw from the policy's distribution, in place of its mean. A policy without a distribution
                chooses among its draws in either case.
            noise: standard deviation of what is added, of Normals, where actions lie in [-1, 1].

        Returns:
            as a call, clipped to the action bounds.
        """
        kind = ExplorationType.RANDOM if sample else ExplorationType.DETERMINISTIC
        device = next(self.actor.parameters()).device
        # Not torch.manual_seed, which where CUDA has not started notes every call, with its stack, for when it has.
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            return self._act(observation, kind, noise, seed)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def decide(self, observation: np.ndarray, noise: Tensor) -> np.ndarray:
        """As a call, of a policy that :attr:`chooses` the draw with the largest Q, with given draws.

        Args:
            observation: raw ones, ``[B, O]``.
            noise: standard Normals, ``[B, *chooser.noise_shape]``.
        """
        return self._act(observation, ExplorationType.DETERMINISTIC, drawn=[noise])

    @torch.no_grad()
    def _act(
        self, observation: Array, kind: Any, noise: float = 0.0, seed: int = 0, drawn: Sequence[Tensor] = ()
    ) -> Array:
        device = next(self.actor.parameters()).device
        tensor = torch.as_tensor(observation, dtype=torch.float32).cpu()
        batch_shape = tensor.shape[:-1]
        raw = tensor = tensor.reshape(batch_shape.numel(), tensor.shape[-1])
        if self.normaliser is not None:
            tensor = self.normaliser(tensor)
        tensor = tensor.to(device)
        deterministic = kind == ExplorationType.DETERMINISTIC
        if self.chooses if deterministic else isinstance(self.actor, GenerativeActor):
            assert self.chooser is not None
            drawn = [one.to(device) for one in drawn or self.chooser.noise_for(raw.numpy(), seed)]
            action = _chosen(self.chooser, tensor, *drawn).cpu()
        else:
            with set_exploration_type(kind):
                action = _action(self.actor, tensor, kind).cpu()
        if noise:
            action = action + noise * torch.randn_like(action)
        action = action.reshape(batch_shape + action.shape[1:])
        if action.is_floating_point():
            action = self.action_low + (action + 1) / 2 * (self.action_high - self.action_low)
            action = action.clamp(self.action_low, self.action_high)
        if isinstance(observation, Tensor):
            return action.to(observation.device)
        return action.numpy()

    def state_dict(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """What :meth:`from_state_dict` needs; ``architecture`` holds the arguments of the actor's builder."""
        normaliser = self.normaliser
        return {
            "architecture": dict(architecture),
            "actor": {name: value.detach().cpu().clone() for name, value in self.actor.state_dict().items()},
            "action_low": self.action_low,
            "action_high": self.action_high,
            "normaliser": None if normaliser is None else {"mean": normaliser.mean, "std": normaliser.std},
            "chooser": None if self.chooser is None else self.chooser.stored(architecture),
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        device: torch.device | str = "cpu",
        *,
        num_samples: int | None = None,
        selection: str | None = None,
    ) -> Policy:
        """Rebuild a policy from :meth:`state_dict`.

        Args:
            state: of it.
            device: where the networks run.
            num_samples, selection: of :meth:`from_loss`; ``None``: as the policy was.

        Raises:
            ConfigurationError: several draws of a policy that has no randomness, or that was saved without critics.
        """
        actor = build_policy(state["architecture"])
        actor.load_state_dict(state["actor"])
        normaliser = None if state["normaliser"] is None else ObservationNormaliser(**state["normaliser"])
        choice = {"num_samples": num_samples, "selection": selection}
        choice = {name: value for name, value in choice.items() if value is not None}
        chooser = None
        if state.get("chooser") is not None:
            chooser = Chooser.restored(state["chooser"], actor, **choice).to(device)
        elif num_samples is not None and num_samples > 1:
            raise ConfigurationError(_nothing_to_draw(num_samples, "chooser" in state))
        return cls(actor.to(device), state["action_low"], state["action_high"], normaliser, chooser)


def _nothing_to_draw(num_samples: int, has_no_randomness: bool = True) -> str:
    if has_no_randomness:
        why = "needs a stochastic policy of continuous actions, and this one has no randomness"
    else:
        why = "needs critics, without which this checkpoint of an earlier release was saved"
    return f"num_samples={num_samples} {why}; leave it out."


def _action(actor: nn.Module, observation: Tensor, kind: Any) -> Tensor:
    """The ``action`` that ``actor`` writes for ``observation`` ``[B, O]``, bit for bit.

    The TensorDicts that carry a distribution's parameters from the network to the distribution take five times as long
    as both: an actor of these two alone does without.
    """
    if not _is_network_and_distribution(actor):

        def act(rows: Tensor) -> dict[str, Tensor]:
            return {"action": actor(TensorDict({"observation": rows}, batch_size=rows.shape[:-1]))["action"]}

        return _in_batches_of_one_size(act, observation)["action"]
    network, distribution = actor.module

    def parameters(rows: Tensor) -> Mapping[str, Tensor]:
        found = network.module(rows)
        if isinstance(found, dict | TensorDictBase):
            return {key: found[key] for key in network.out_keys}
        return dict(zip(network.out_keys, found if isinstance(found, tuple) else (found,), strict=True))

    found = _in_batches_of_one_size(parameters, observation)
    return distribution._dist_sample(distribution.get_dist(found), interaction_type=kind)


def _in_batches_of_one_size(function: Callable[[Tensor], Mapping[str, Tensor]], rows: Tensor) -> dict[str, Tensor]:
    """What a function makes of ``rows`` ``[B, O]``, each row as it would be by itself on a CPU."""
    if rows.device.type != "cpu":
        return dict(function(rows))
    found = [function(piece) for piece in nn.functional.pad(rows, (0, 0, 0, -len(rows) % _ROWS)).split(_ROWS)]
    joined = found[0] if len(found) == 1 else {key: torch.cat([piece[key] for piece in found]) for key in found[0]}
    return {key: value[: len(rows)] for key, value in joined.items()}


def _chosen(chooser: Chooser, *rows: Tensor) -> Tensor:
    """An action for each normalised observation and what is drawn for it, as it would be by itself on a CPU.

    The draws of one observation are a batch, in which each has its place.
    """
    if rows[0].device.type != "cpu" or not len(rows[0]):
        return chooser(*rows)
    return torch.cat([chooser(*piece) for piece in zip(*(one.split(1) for one in rows), strict=True)])


def _is_network_and_distribution(actor: Any) -> TypeGuard[Any]:
    """Whether an actor does no more than call a network with the observation and build a distribution of its output."""
    if type(actor) is not ProbabilisticActor or len(actor.module) != 2:
        return False
    network: Any = actor.module[0]
    distribution: Any = actor.module[1]
    return (
        type(network) is TensorDictModule
        and type(distribution) is SafeProbabilisticModule
        and network.in_keys == ["observation"]
        and network._kwargs is None
        and network.method is None
        and not network.method_kwargs
        and distribution.out_keys == ["action"]
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (actor, network, distribution))
    )


def load_policy(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    best: bool = False,
    num_samples: int | None = None,
    selection: str | None = None,
) -> Policy:
    """The policy of a run, or of a checkpoint.

    >>> policy = load_policy("runs/hopper")
    >>> action = policy(observation)

    Args:
        path: a run folder, for its newest checkpoint, or a checkpoint file.
        device: where the network runs.
        best: of a run folder, the checkpoint of the best evaluation. That one was the best of many on few episodes:
            evaluate it anew before its score is believed.
        num_samples: draws of the policy of which a decision takes one by Q; ``None``: as in the run.
        selection: which of them; see :class:`~iql_torchrl.evaluation.choosing.Chooser`. ``None``: as in the run.

    Raises:
        CheckpointError: the file is missing, truncated, or no checkpoint of this project; a folder without one.
        ConfigurationError: several draws of a policy that has no randomness, or that was saved without critics.
    """
    state = load_checkpoint(checkpoint_file(path, best=best))["policy"]
    return Policy.from_state_dict(state, device, num_samples=num_samples, selection=selection)
