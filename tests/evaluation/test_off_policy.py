"""Fitted Q evaluation, against what policies are worth in closed form."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from iql_torchrl.configuration.options import FittedQOptions
from iql_torchrl.evaluation.off_policy import discounted_returns, fitted_q_evaluation

STATES, ACTIONS, DISCOUNT, END = 4, 2, 0.8, 0.1
RANDOM = np.random.default_rng(0)
# A chain with random transitions, of which each step ends the episode with probability END.
TRANSITION = RANDOM.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
REWARD = RANDOM.normal(size=(STATES, ACTIONS))


def chain(episodes=150, length=15):
    """Transitions of a behaviour policy that chooses at random; observations are one-hot states."""
    random, rows = np.random.default_rng(1), []
    for episode in range(episodes):
        state = 0
        for _ in range(length):
            action = random.integers(ACTIONS)
            following, over = random.choice(STATES, p=TRANSITION[state, action]), random.random() < END
            rows.append((state, action, REWARD[state, action], following, over, episode))
            state = following
            if over:
                break
    state, action, reward, following, over, episode = (np.array(column) for column in zip(*rows, strict=True))
    eye = np.eye(STATES, dtype=np.float32)
    return as_transitions(eye[state], action, reward, eye[following], over, episode)


def as_transitions(observation, action, reward, following, over, episode):
    return TensorDict(
        {
            "observation": torch.from_numpy(observation),
            "action": torch.from_numpy(action),
            "episode": torch.from_numpy(episode),
            "next": {
                "observation": torch.from_numpy(following),
                "reward": torch.from_numpy(reward.astype(np.float32))[:, None],
                "terminated": torch.from_numpy(over)[:, None],
            },
        },
        [len(reward)],
    )


def worth(choices):
    """V of the first state by the Bellman equation of a deterministic policy, a linear system."""
    states = np.arange(STATES)
    going_on = TRANSITION[states, choices] * (1 - END)
    return np.linalg.solve(np.eye(STATES) - DISCOUNT * going_on, REWARD[states, choices])[0]


def policy(choices):
    return lambda observation: torch.as_tensor(choices)[observation.argmax(-1)]


OPTIONS = {"hidden_dims": [32, 32], "learning_rate": 2e-3, "tau": 0.02, "batch_size": 128, "compile": False}


@pytest.mark.slow
def test_policies_of_a_chain_are_worth_what_the_bellman_equation_says():
    all_choices = [np.array([number >> state & 1 for state in range(STATES)]) for number in range(2**STATES)]
    options = FittedQOptions(**OPTIONS, steps=1500, resamples=4)
    found = fitted_q_evaluation(
        chain(), [policy(one) for one in all_choices], options, discount=DISCOUNT, num_actions=ACTIONS, quiet=True
    )
    true, values = np.array([worth(one) for one in all_choices]), np.array([one.value for one in found])
    assert np.ptp(true) > 1  # or this test shows little
    np.testing.assert_allclose(values, true, atol=0.12 * np.ptp(true))
    assert np.corrcoef(values, true)[0, 1] > 0.98
    within = [one.interval[0] <= value <= one.interval[1] for one, value in zip(found, true, strict=True)]
    assert sum(within) >= 13  # of 16; each holds it in 95% of datasets


@pytest.mark.slow
def test_a_policy_of_continuous_actions_that_meets_one_state_for_ever():
    # r = 1 - (a - 0.5)^2 in every state: V of an action a is that over 1 - discount.
    random, count = np.random.default_rng(0), 2000
    action = random.uniform(-1, 1, size=(count, 1)).astype(np.float32)
    observation = random.normal(size=(count, 1)).astype(np.float32)
    reward = 1 - (action[:, 0] - 0.5) ** 2
    data = as_transitions(
        observation, action, reward, np.roll(observation, -1, 0), np.zeros(count, bool), np.arange(count) // 20
    )
    actions = [-0.5, 0.0, 0.5]
    found = fitted_q_evaluation(
        data,
        [lambda observation, action=action: torch.full((len(observation), 1), action) for action in actions],
        FittedQOptions(**OPTIONS, steps=1500, resamples=0),
        discount=0.9,
        quiet=True,
    )
    expected = [10 * (1 - (action - 0.5) ** 2) for action in actions]
    np.testing.assert_allclose([one.value for one in found], expected, rtol=0.05, atol=0.2)
    assert all(one.interval is None for one in found)


def test_values_are_in_the_units_of_the_rewards():
    options = FittedQOptions(**OPTIONS, steps=30, resamples=2)
    found = []
    for scale in (1.0, 1000.0):
        data = chain(20)
        data["next", "reward"].mul_(scale)
        found += fitted_q_evaluation(
            data, [policy(np.zeros(STATES, int))], options, discount=0.9, num_actions=ACTIONS, quiet=True
        )
    one, other = found
    assert other.value == pytest.approx(1000 * one.value, rel=1e-4)
    assert other.error == pytest.approx(1000 * one.error, rel=1e-4)
    assert other.interval == pytest.approx([1000 * end for end in one.interval], rel=1e-3)


def test_many_policies_are_evaluated_in_groups_each_as_by_itself():
    policies = [policy(np.array([number >> state & 1 for state in range(STATES)])) for number in range(15)]
    options = FittedQOptions(**OPTIONS, steps=20, resamples=2)  # 45 critics, two groups
    together, alone = (
        [
            one
            for group in groups
            for one in fitted_q_evaluation(chain(20), group, options, discount=0.9, num_actions=ACTIONS, quiet=True)
        ]
        for groups in ([policies], [policies[:1], policies[-1:]])
    )
    assert together[0].value == pytest.approx(alone[0].value, rel=1e-3)
    assert together[-1].value == pytest.approx(alone[1].value, rel=1e-3)


def test_discounted_returns_are_those_of_each_episode_by_itself():
    data = chain(5)
    rewards, episodes = data["next", "reward"][:, 0].double().numpy(), data["episode"].numpy()
    expected = []
    for episode in range(5):
        own = rewards[episodes == episode]
        expected.append(sum(reward * DISCOUNT**step for step, reward in enumerate(own)))
    np.testing.assert_allclose(discounted_returns(data, DISCOUNT), expected)


def test_values_stay_within_what_the_rewards_allow_where_the_data_say_nothing():
    # The policy's actions and the states that it comes to are far from the data's: critics alone would run away to 1e7.
    random, count = np.random.default_rng(0), 60
    observation = random.normal(size=(count, 2)).astype(np.float32)
    action = random.uniform(-0.05, 0.05, size=(count, 1)).astype(np.float32)
    reward, following = random.uniform(0.5, 1.0, size=count), 3 * np.roll(observation, -1, 0)
    data = as_transitions(observation, action, reward, following, np.zeros(count, bool), np.arange(count) // 20)
    (found,) = fitted_q_evaluation(
        data,
        [lambda observation: torch.ones(len(observation), 1)],
        FittedQOptions(
            hidden_dims=[64, 64], learning_rate=0.01, tau=0.5, batch_size=64, steps=300, resamples=0, compile=False
        ),
        discount=0.99,
        quiet=True,
    )
    assert found.value < 1.5 * 100


def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    options = FittedQOptions(**{**OPTIONS, "compile": "auto"}, steps=2, resamples=0)
    chosen = [policy(np.zeros(STATES, int))] * 40  # two groups, told once
    fitted_q_evaluation(chain(5), chosen, options, discount=0.9, num_actions=ACTIONS)
    assert capsys.readouterr().out.count("no C++ compiler found") == 1
