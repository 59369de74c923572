"""The comparison of the evaluator with a loop."""

import gymnasium
import pytest
import torch

from iql_torchrl.benchmark.evaluation import evaluation_rates
from iql_torchrl.errors import SimulatorError


@pytest.mark.parametrize(("name", "steps"), [("Pendulum-v1", {15}), ("CartPole-v1", range(3, 16))])
def test_it_compares_the_rates_of_the_same_episodes(name, steps):
    found = evaluation_rates(name, 3, hidden_dims=(16,), rounds=2, kwargs={"max_episode_steps": 5})
    assert found["environment"] == name and found["episodes"] == 3 and found["steps"] in steps
    assert found["threads"] == torch.get_num_threads()
    assert all(found[key] > 0 for key in ("actor_loop", "policy_loop", "evaluator"))
    assert all(found[key] > 0 for key in ("times_actor_loop", "times_policy_loop"))
    assert found["same_returns"] is True


def test_it_says_where_the_returns_differ(register):
    class Counting(gymnasium.Env):
        """Pays as many as there were steps in the whole process."""

        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Discrete(2)
        steps = 0

        def reset(self, *, seed=None, options=None):
            return self.observation_space.low.copy(), {}

        def step(self, action):
            type(self).steps += 1
            return self.observation_space.low.copy(), float(self.steps), True, False, {}

    found = evaluation_rates(register("Counting-v0", Counting), 2, hidden_dims=(8,), rounds=1)
    assert found["same_returns"] is False and found["steps"] == 2


def test_it_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    evaluation_rates("CartPole-v1", 1, hidden_dims=(8,), rounds=1, kwargs={"max_episode_steps": 2})
    assert torch.rand(2).equal(expected)


def test_an_unknown_environment_is_refused():
    with pytest.raises(SimulatorError, match="unknown environment"):
        evaluation_rates("Pendolum-v1", 1)
