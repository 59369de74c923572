"""The dataset inside the package."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from iql_torchrl import load_transitions
from iql_torchrl.data.sources import embedded, hdf5
from iql_torchrl.data.transitions import episode_returns, fingerprint


@pytest.fixture(scope="module")
def transitions():
    return load_transitions("embedded")


@pytest.fixture(scope="module")
def arrays():
    with h5py.File(embedded.PATH, "r") as file:
        return {key: file[key][()] for key in file}


def test_it_has_97777_transitions_of_a_hopper(transitions):
    assert len(transitions) == 97777
    assert transitions["observation"].shape == transitions["next", "observation"].shape == (97777, 11)
    assert transitions["action"].shape == (97777, 3)
    assert hdf5.environment_of(embedded.PATH) == "Hopper-v5"


def test_its_actions_use_the_whole_unit_box_and_nothing_outside(transitions):
    action = transitions["action"]
    assert float(action.abs().max()) <= 1
    assert bool((action.amin(0) < -0.99).all() and (action.amax(0) > 0.99).all())


def test_its_file_says_where_it_comes_from_and_that_it_may_be_passed_on():
    with h5py.File(embedded.PATH, "r") as file:
        provenance = file.attrs["provenance"]
    assert all(word in provenance for word in ("SAC", "Hopper-v5", "seed", "free to redistribute"))


def test_its_file_is_smaller_than_6_mib():
    assert embedded.PATH.stat().st_size < 6 * 2**20


def test_it_consists_of_whole_episodes(arrays):
    ends = arrays["terminals"] | arrays["timeouts"]
    starts = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    lengths = np.diff([*starts, len(ends)])
    assert ends[-1]
    assert len(starts) == 657 and lengths.max() == 1000
    # Hopper-v5 is reset to within 5e-3 of rest at height 1.25, where it never comes back to.
    rest = np.zeros(11)
    rest[0] = 1.25
    at_rest = (np.abs(arrays["observations"] - rest) <= 5e-3 + 1e-6).all(axis=1)
    assert np.flatnonzero(at_rest).tolist() == starts.tolist()


def test_its_episodes_time_out_at_their_thousandth_step_and_only_there(arrays):
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    lengths = np.diff([-1, *ends])
    assert ends[lengths == 1000].tolist() == np.flatnonzero(arrays["timeouts"]).tolist()


def test_its_transitions_equal_the_rule(arrays, transitions, qlearning_dataset, assert_transitions_equal):
    assert_transitions_equal(transitions, qlearning_dataset(arrays))


def test_its_episodes_range_from_failures_to_good_hops(transitions):
    returns = episode_returns(transitions)
    assert len(returns) == 657
    assert returns.min() < 50 and returns.max() > 3000


def test_every_load_gives_the_same_data(transitions):
    again = load_transitions("embedded")
    assert fingerprint(again) == fingerprint(transitions)
    assert bool(torch.isfinite(again["observation"]).all())
