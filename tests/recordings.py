"""Random episodes of real environments as Minari datasets.

Minari's ``DataCollector`` needs JAX; the buffers that it fills are filled here by hand.
"""

import copy

import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer


def record(dataset, environment, root, episodes):
    """Record into the folder ``root``; returns the buffers."""
    environment.action_space.seed(0)
    buffers = []
    for episode in range(episodes):
        observation, _ = environment.reset(seed=episode)
        found = {key: [] for key in ("actions", "rewards", "terminations", "truncations")}
        observations, over = [observation], False
        while not over:
            action = environment.action_space.sample()
            observation, reward, terminated, truncated, _ = environment.step(action)
            observations.append(copy.deepcopy(observation))
            for values, value in zip(found.values(), (action, float(reward), terminated, truncated), strict=True):
                values.append(value)
            over = terminated or truncated
        actions = np.array(found.pop("actions"))
        buffers.append(EpisodeBuffer(id=episode, observations=_stacked(observations), actions=actions, **found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(
            dataset,
            buffers,
            env=environment,
            algorithm_name="random",
            author="a test",
            author_email="test@example.org",
            code_permalink="https://example.org",
        )
    environment.close()
    return buffers


def _stacked(observations):
    """Elements of a space as one, with a leading dimension in every part."""
    if isinstance(observations[0], dict):
        return {key: _stacked([part[key] for part in observations]) for key in observations[0]}
    return np.array(observations)
