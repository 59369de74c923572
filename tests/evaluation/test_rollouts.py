"""Evaluation: every episode runs to its own end, with the policy's own actions in the environment's bounds."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.evaluation.rollouts import Evaluator
from iql_torchrl.networks import build_actor

LOW, HIGH = np.array([-2, 0], np.float32), np.array([2, 10], np.float32)


def length_of(seed):
    return 1 + (7 * seed) % 23


class SeedLength(gymnasium.Env):
    """Reward 1 a step for as many steps as the seed says; odd episodes terminate, even ones are truncated.

    Every observation begins with the seed and the step; ``seen`` collects seed, step and action.
    """

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space = Box(LOW, HIGH, dtype=np.float32)
    seen = []

    def reset(self, *, seed=None, options=None):
        assert seed is not None
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.seed, self.steps, 0], np.float32)

    def step(self, action):
        assert self.steps < length_of(self.seed), "stepped beyond its end"
        type(self).seen.append((self.seed, self.steps, np.array(action)))
        self.steps += 1
        over = self.steps == length_of(self.seed)
        return self.observe(), 1.0, over and self.seed % 2 == 1, over and self.seed % 2 == 0, {}


@pytest.fixture
def environment():
    gymnasium.register("SeedLength-v0", entry_point=SeedLength)
    SeedLength.seen = []
    yield "SeedLength-v0"
    gymnasium.registry.pop("SeedLength-v0")


@pytest.fixture
def evaluate():
    """Evaluate a policy and release the environments."""

    def run(environment, policy, *, episodes, seed=0):
        evaluator = Evaluator(environment, episodes=episodes, seed=seed)
        try:
            return evaluator.evaluate(policy)
        finally:
            evaluator.close()

    return run


def actor_policy(observation_dim=3, low=LOW, high=HIGH, *, seed=0, normaliser=None, **options):
    torch.manual_seed(seed)
    actor = build_actor(observation_dim, len(low), **{"hidden_dims": (16,), **options})
    return Policy(actor, torch.from_numpy(low), torch.from_numpy(high), normaliser)


def mean_policy(mean, normaliser=None):
    """A policy whose distribution has the given mean whatever the observation, or ``mean(observation)``."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, observation):
            loc = mean(observation) if callable(mean) else torch.tensor(mean).expand(*observation.shape[:-1], 2)
            return loc, torch.ones_like(loc)

    actor = ProbabilisticActor(
        TensorDictModule(Mean(), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    return Policy(actor, torch.from_numpy(LOW), torch.from_numpy(HIGH), normaliser)


# ---- episodes


@pytest.mark.parametrize("episodes", [1, 2, 31, 32, 33, 75, 100])
def test_every_episode_runs_to_its_own_end(episodes, environment, evaluate):
    evaluation = evaluate(environment, actor_policy(), episodes=episodes, seed=40)
    expected = [length_of(40 + episode) for episode in range(episodes)]
    assert evaluation.returns.tolist() == evaluation.lengths.tolist() == expected


def test_every_seed_is_played_once(environment, evaluate):
    evaluate(environment, actor_policy(), episodes=75, seed=1000)
    played = sorted(seed for seed, step, _ in SeedLength.seen if step == 0)
    assert played == list(range(1000, 1075))


def test_every_episode_receives_the_actions_for_its_own_observations(environment, evaluate):
    def policy(observations):
        return np.stack([observations[:, 0] / 100 - 1, observations[:, 1] / 10], axis=1)

    evaluate(environment, policy, episodes=75, seed=3)
    assert len(SeedLength.seen) == sum(length_of(3 + episode) for episode in range(75))
    for seed, step, action in SeedLength.seen:
        np.testing.assert_allclose(action, [seed / 100 - 1, step / 10], rtol=1e-6)


def test_one_call_of_the_policy_serves_all_running_episodes(environment, evaluate):
    sizes = []

    def policy(observations):
        sizes.append(len(observations))
        return np.zeros((len(observations), 2), np.float32)

    evaluate(environment, policy, episodes=20)
    longest = max(length_of(seed) for seed in range(20))
    assert sizes == [sum(length_of(seed) > step for seed in range(20)) for step in range(longest)]


def test_an_evaluator_can_be_used_again_and_plays_the_same_episodes(environment):
    evaluator = Evaluator(environment, episodes=40, seed=5)
    first, second = evaluator.evaluate(actor_policy()), evaluator.evaluate(actor_policy(seed=1))
    evaluator.close()
    assert first.returns.tolist() == second.returns.tolist() == [length_of(5 + i) for i in range(40)]


def test_an_evaluation_reports_its_environment_time_and_row(environment, evaluate):
    evaluation = evaluate(environment, actor_policy(), episodes=10)
    lengths = [length_of(seed) for seed in range(10)]
    assert evaluation.environment.name == environment and evaluation.seconds > 0
    assert evaluation.row() == {
        "episode_return_mean": pytest.approx(np.mean(lengths)),
        "episode_return_std": pytest.approx(np.std(lengths)),
        "normalized_score": None,
        "episodes": 10,
        "seconds": evaluation.seconds,
        "success_rate": None,
    }


def swinging(observations):
    """A policy without a network: no batch size rounds it differently."""
    return 2 * np.sin(3 * observations[:, :1] - observations[:, 1:2]).astype(np.float32)


def swaying(observations):
    return (0.02 * np.sin(3 * observations[:, 2:5] + observations[:, 5:8])).astype(np.float32)


@pytest.mark.parametrize(("name", "policy"), [("Pendulum-v1", swinging), ("Hopper-v5", swaying)])
def test_returns_equal_those_of_episodes_played_one_by_one(name, policy, evaluate):
    returns, lengths = [], []
    environment = gymnasium.make(name)
    for seed in range(20, 24):
        observation, _ = environment.reset(seed=seed)
        rewards, over = [], False
        while not over:
            observation, reward, terminated, truncated, _ = environment.step(policy(observation[None])[0])
            rewards.append(float(reward))
            over = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    environment.close()

    evaluation = evaluate(name, policy, episodes=4, seed=20)
    np.testing.assert_allclose(evaluation.returns, returns, rtol=1e-12)
    assert evaluation.lengths.tolist() == lengths
    assert len(set(returns)) == 4


def test_a_networks_returns_are_those_of_episodes_played_one_by_one_with_single_observations(evaluate):
    bounds = np.ones(6, np.float32)
    policy = actor_policy(17, -bounds, bounds, hidden_dims=(256, 256))
    environment = gymnasium.make("HalfCheetah-v5", max_episode_steps=300)  # in which rounding grows to whole numbers
    returns = []
    for seed in range(5):
        observation, _ = environment.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = environment.step(policy(observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    environment.close()
    spec = EnvironmentSpec.of("HalfCheetah-v5", {"max_episode_steps": 300})
    assert evaluate(spec, policy, episodes=5).returns.tolist() == returns


def test_hopper_episodes_that_fall_early_do_not_cut_the_others(evaluate):
    evaluation = evaluate("Hopper-v5", swaying, episodes=8, seed=0)
    assert len(set(evaluation.lengths.tolist())) > 3


@pytest.mark.parametrize("name", ["Pendulum-v1", "Hopper-v5"])
def test_the_same_seed_gives_the_same_returns_and_another_one_others(name, evaluate):
    space, sizes = gymnasium.make(name).action_space, {"Pendulum-v1": 3, "Hopper-v5": 11}
    policy = actor_policy(sizes[name], space.low, space.high)
    first = evaluate(name, policy, episodes=3, seed=11)
    again = evaluate(name, policy, episodes=3, seed=11)
    other = evaluate(name, policy, episodes=3, seed=77)
    assert first.returns.tolist() == again.returns.tolist() and first.lengths.tolist() == again.lengths.tolist()
    assert not set(first.returns.tolist()) & set(other.returns.tolist())


def test_evaluation_neither_follows_nor_moves_the_global_random_numbers(evaluate):
    policy = actor_policy(3, np.array([-2], np.float32), np.array([2], np.float32))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = evaluate("Pendulum-v1", policy, episodes=2)
    assert torch.rand(3).equal(expected)
    np.random.seed(99)
    torch.manual_seed(99)
    assert evaluate("Pendulum-v1", policy, episodes=2).returns.tolist() == first.returns.tolist()


# ---- actions


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        ([0.0, 0.0], [0, 5]),
        ([-1.0, 1.0], [-2, 10]),
        ([0.5, -0.5], [1, 2.5]),
        ([-1.7, 4.0], [-2, 10]),
        ([100.0, -100.0], [2, 0]),
    ],
)
def test_actions_are_rescaled_to_the_environments_bounds_and_clipped_to_them(mean, expected, environment, evaluate):
    evaluate(environment, mean_policy(mean), episodes=3)
    assert {tuple(action.tolist()) for _, _, action in SeedLength.seen} == {tuple(expected)}


@pytest.mark.parametrize("policy", ["tanh_mean_normal", "tanh_normal"])
def test_the_actions_of_an_extreme_actor_stay_within_the_bounds(policy, environment, evaluate):
    extreme = actor_policy(policy=policy)
    with torch.no_grad():
        for parameter in extreme.actor.parameters():
            parameter.mul_(100)
    evaluate(environment, extreme, episodes=40)
    actions = np.stack([action for _, _, action in SeedLength.seen])
    assert (actions >= LOW).all() and (actions <= HIGH).all()
    assert np.isin(actions, [LOW, HIGH]).any()


def test_evaluation_uses_the_mean_and_not_a_sample(environment, evaluate):
    evaluate(environment, mean_policy([0.25, -0.25]), episodes=5)
    assert {tuple(action.tolist()) for _, _, action in SeedLength.seen} == {(0.5, 3.75)}


def test_evaluation_switches_dropout_off(evaluate):
    policy = actor_policy(3, np.array([-2], np.float32), np.array([2], np.float32), dropout=0.5)
    assert len({evaluate("Pendulum-v1", policy, episodes=1).returns[0] for _ in range(3)}) == 1


def test_the_actor_sees_normalised_observations(environment, evaluate):
    normaliser = ObservationNormaliser(torch.tensor([10.0, 5.0, 0.0]), torch.tensor([100.0, 50.0, 1.0]))
    policy = mean_policy(lambda observation: observation[..., :2], normaliser)
    evaluate(environment, policy, episodes=20)
    for seed, step, action in SeedLength.seen:
        np.testing.assert_allclose(action, [2 * (seed - 10) / 100, 5 + 5 * (step - 5) / 50], rtol=1e-5, atol=1e-6)


def test_a_policy_answers_numpy_with_numpy_and_torch_with_torch():
    policy = actor_policy()
    observations = np.random.default_rng(0).normal(size=(4, 3))
    batch = policy(observations)
    assert isinstance(batch, np.ndarray) and batch.dtype == np.float32 and batch.shape == (4, 2)
    as_torch = policy(torch.from_numpy(observations))
    assert isinstance(as_torch, torch.Tensor) and as_torch.dtype == torch.float32
    np.testing.assert_array_equal(as_torch.numpy(), batch)
    np.testing.assert_allclose(policy(observations[2]), batch[2], rtol=1e-6)
    assert policy(observations.reshape(2, 2, 3)).shape == (2, 2, 2)
