"""Simulators in a process of their own: the same episodes, and an end to every wait."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest

from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import SimulatorError
from iql_torchrl.evaluation.rollouts import Evaluator


def policy(observations):
    return np.clip(observations[:, 1:2] * 3, -2, 2)


def failing(tmp_path, how, times):
    (tmp_path / "left").write_text(str(times))
    return EnvironmentSpec.of("faults.simulators:Failing-v0").with_kwargs({"how": how, "left": str(tmp_path / "left")})


@pytest.mark.slow
def test_a_process_of_its_own_plays_the_same_episodes_and_is_gone_when_closed():
    here, there = Evaluator("Pendulum-v1", episodes=3), Evaluator("Pendulum-v1", episodes=3, timeout=60)
    found, expected = there.evaluate(policy, seed=5), here.evaluate(policy, seed=5)
    assert np.array_equal(found.returns, expected.returns) and np.array_equal(found.lengths, expected.lengths)
    there.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [("exit", "ended with status 7"), ("hang", "did not answer for 2 s")])
def test_one_that_dies_or_hangs_is_restarted_once_and_said_in_one_line(how, words, tmp_path):
    said = []
    evaluator = Evaluator(failing(tmp_path, how, 1), episodes=2, timeout=2, say=said.append)
    expected = Evaluator(failing(tmp_path, how, 0), episodes=2)
    (tmp_path / "left").write_text("1")
    found = evaluator.evaluate(policy)
    assert (tmp_path / "left").read_text() == "0"
    assert np.array_equal(found.returns, expected.evaluate(policy).returns)
    assert len(said) == 1 and words in said[0] and "begun again" in said[0]
    (tmp_path / "left").write_text("2")
    with pytest.raises(SimulatorError, match=f"{words}, once more after it had been restarted"):
        evaluator.evaluate(policy)
    evaluator.close()


@pytest.mark.slow
def test_what_a_simulator_raises_is_an_error_of_one_line(tmp_path):
    evaluator = Evaluator(failing(tmp_path, "raise", 1), episodes=1, timeout=60)
    with pytest.raises(SimulatorError, match="failed: RuntimeError: the simulator is unstable"):
        evaluator.evaluate(policy)
    evaluator.close()
