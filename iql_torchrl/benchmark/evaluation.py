"""Episodes a second of the evaluator, and of the loop that one would write without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iql_torchrl.environments.simulators import make_environment
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.networks import build_actor, build_discrete_actor


def evaluation_rates(
    environment: str,
    episodes: int,
    *,
    hidden_dims: Sequence[int] = (256, 256),
    rounds: int = 3,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Play the same seeded episodes in a loop over one environment and with :class:`Evaluator`, in turn.

    An untrained policy plays. The loop, ``while not done: action = policy(observation)``, is there twice: with
    TorchRL's actor called on a ``TensorDict`` of one observation, as one writes it without this package, and with
    :class:`Policy`. They and the evaluator are timed in interleaved rounds, after a warm-up, in this process and with
    the number of threads that torch has been given.

    Args:
        environment: Gymnasium id of an environment with a flat box of actions, or discrete ones from 0.
        episodes: of each round; episode i is reset with ``seed + i``.
        hidden_dims: widths of the policy's hidden layers.
        rounds: how often each plays all episodes.
        seed: of the first episode, and of the policy's weights.
        kwargs: of ``gymnasium.make``.

    Returns:
        - ``environment``, ``episodes``, ``steps`` (of all episodes together), ``threads``;
        - ``actor_loop``, ``policy_loop``, ``evaluator``: episodes a second, the median of the rounds;
        - ``times_actor_loop``, ``times_policy_loop``: the evaluator's rate over each loop's, the median of the rounds'
          ratios;
        - ``same_returns``: whether the policy's loop and the evaluator had the same returns in every round, bit for
          bit. The actor rounds a single observation differently, which is another return where a simulator is chaotic.

    Raises:
        SimulatorError: an environment that does not start, or whose observations are no vector.
    """
    spec = EnvironmentSpec.of(environment, kwargs)
    with closing(make_environment(spec)) as single, closing(Evaluator(spec, episodes=episodes, seed=seed)) as evaluator:
        policy = _untrained_policy(single, hidden_dims, seed)
        actor = _actor_alone(policy)
        seeds = range(seed, seed + episodes)

        players: dict[str, Callable[[], np.ndarray]] = {
            "actor_loop": lambda: _loop(single, actor, seeds),
            "policy_loop": lambda: _loop(single, policy, seeds),
            "evaluator": lambda: evaluator.evaluate(policy).returns,
        }
        for warm_up in (actor, policy):
            _loop(single, warm_up, seeds[:1])
        steps = int(evaluator.evaluate(policy).lengths.sum())
        rates: dict[str, list[float]] = {name: [] for name in players}
        same = True
        for _ in range(rounds):
            returns = {}
            for name, player in players.items():
                start = time.perf_counter()
                returns[name] = player()
                rates[name].append(episodes / (time.perf_counter() - start))
            same &= np.array_equal(returns["policy_loop"], returns["evaluator"])

    def ratio(to: str) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(rates["evaluator"], rates[to], strict=True))

    return {
        "environment": environment,
        "episodes": episodes,
        "steps": steps,
        "threads": torch.get_num_threads(),
        **{name: statistics.median(found) for name, found in rates.items()},
        "times_actor_loop": ratio("actor_loop"),
        "times_policy_loop": ratio("policy_loop"),
        "same_returns": same,
    }


def _untrained_policy(environment: gymnasium.Env, hidden_dims: Sequence[int], seed: int) -> Policy:
    spaces = environment.observation_space, environment.action_space
    (observation_dim,) = spaces[0].shape or (0,)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if isinstance(spaces[1], gymnasium.spaces.Discrete):
            actor = build_discrete_actor(observation_dim, int(spaces[1].n), hidden_dims=hidden_dims)
            return Policy(actor, torch.empty(0), torch.empty(0))
        assert isinstance(spaces[1], gymnasium.spaces.Box)
        low, high = (torch.from_numpy(bound).float() for bound in (spaces[1].low, spaces[1].high))
        return Policy(build_actor(observation_dim, len(low), hidden_dims=hidden_dims), low, high)


def _actor_alone(policy: Policy) -> Callable[[np.ndarray], np.ndarray]:
    """The actor as TorchRL has it called, rescaled to the bounds of the actions."""

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        batch = TensorDict({"observation": torch.as_tensor(observation, dtype=torch.float32)})
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action = policy.actor(batch)["action"]
        if action.is_floating_point():
            action = policy.action_low + (action + 1) / 2 * (policy.action_high - policy.action_low)
        return action.numpy()

    return act


def _loop(environment: gymnasium.Env, policy: Callable[[np.ndarray], np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """The returns of one episode after the other, ``[episodes]``."""
    returns = np.zeros(len(seeds))
    for episode, seed in enumerate(seeds):
        observation, _ = environment.reset(seed=seed)
        done = False
        while not done:
            observation, reward, terminated, truncated, _ = environment.step(policy(observation))
            returns[episode] += float(reward)
            done = terminated or truncated
    return returns
