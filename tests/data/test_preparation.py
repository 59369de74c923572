"""What is said of data before a training, and the bounds of their actions where no simulator tells them."""

from __future__ import annotations

import gymnasium
import h5py
import numpy as np
import pytest

from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.running.options import OfflineOptions


def prepared(source, *overrides, environment="null"):
    """``source``: an object, or overrides that name one."""
    overrides = [f"env.name={environment}", "dataset.validation_fraction=0", *overrides]
    if not isinstance(source, list):
        overrides = ["~dataset", overrides[0], *overrides[2:]]
        with initialised():
            options = compose("iql_offline", overrides, OfflineOptions, dataset=source, quiet=True)
    else:
        with initialised():
            options = compose("iql_offline", [*source, *overrides], OfflineOptions, quiet=True)
    return prepare_data(options.dataset, options.algorithm, options.env)


def held(arrays, **options):
    return Arrays(arrays=arrays, validation_fraction=0, **options)


@pytest.fixture
def arrays(log_arrays):
    """Five episodes with actions in [-1.5, 1.5] and [-0.5, 0.5]."""
    arrays = log_arrays(3000, terminals=[500, 900, 1800], timeouts=[2500])
    arrays["actions"] *= np.float32([1.5, 0.5])
    return arrays


def shown(data):
    return "\n".join(data.warnings)


# ---- bounds


def test_the_bounds_of_the_options_are_those_of_the_policy_and_of_the_rescaling(arrays):
    data = prepared(held(arrays, action_low=[-3, -1], action_high=2.0))
    assert data.spaces.action_low.tolist() == [-3, -1] and data.spaces.action_high.tolist() == [2, 2]
    kept = arrays["actions"][:-1][~arrays["timeouts"][:-1]].astype(np.float64)
    expected = 2 * (kept - [-3, -1]) / [5, 3] - 1
    np.testing.assert_allclose(data.training["action"].numpy(), expected, atol=1e-6)
    assert data.warnings == ()


@pytest.mark.parametrize("form", ["number", "list"])
def test_the_bounds_are_options_of_the_command_line(form, arrays, write_log):
    low, high = ("-3", "2.5") if form == "number" else ("[-3,-3]", "[2.5,2.5]")
    bounds = [f"dataset.action_low={low}", f"dataset.action_high={high}"]
    data = prepared(["dataset=hdf5", f"dataset.path={write_log(arrays)}", *bounds])
    assert data.spaces.action_low.tolist() == [-3, -3] and data.spaces.action_high.tolist() == [2.5, 2.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["dataset.action_low=-3"], "dataset.action_low is of no use alone; give dataset.action_high too"),
        (["dataset.action_low=3", "dataset.action_high=2"], "dataset.action_low must be below dataset.action_high"),
        (["dataset.action_low=[a]", "dataset.action_high=2"], "dataset.action_low must be null, a finite number, or"),
        (
            ["dataset.action_low=[-3]", "dataset.action_high=2"],
            "dataset.action_low has 1 number but the data's actions",
        ),
    ],
)
def test_bounds_that_make_no_sense_are_refused_on_the_command_line(options, words, arrays, write_log):
    with pytest.raises(ConfigurationError) as error:
        prepared(["dataset=hdf5", f"dataset.path={write_log(arrays)}", *options])
    assert words in str(error.value)


def test_bounds_beside_an_environment_are_refused(arrays):
    with pytest.raises(ConfigurationError, match=r"without a simulator.*those of Pendulum-v1.*env.name=null"):
        prepared(held(arrays, action_low=-3, action_high=3), environment="Pendulum-v1")


def test_bounds_of_discrete_actions_are_refused(arrays):
    arrays["actions"] = np.arange(3000) % 4
    with pytest.raises(ConfigurationError, match=r"dataset\.action_low and dataset\.action_high are for continuous"):
        prepared(held(arrays, action_low=-3, action_high=3))


def test_actions_outside_the_given_bounds_are_refused_with_the_options_names(arrays):
    arrays["actions"][7, 0] = 4
    with pytest.raises(DatasetError, match=r"action 4 in transition 7, dimension 0.*dataset\.action_low"):
        prepared(held(arrays, action_low=-3, action_high=3))


def test_normalised_actions_stay_and_the_policy_acts_in_the_given_bounds(log_arrays):
    arrays = log_arrays(200, terminals=[50])
    data = prepared(held(arrays, action_low=-3, action_high=3, normalised_actions=True))
    np.testing.assert_allclose(data.training["action"].numpy(), arrays["actions"][:-1], atol=2e-5)
    assert data.spaces.action_high.tolist() == [3, 3]


def test_a_run_says_what_it_took_for_the_bounds_that_nothing_tells(arrays):
    low, high = arrays["actions"][:-1].min(0), arrays["actions"][:-1].max(0)
    (line,) = prepared(held(arrays)).warnings
    ranges = f"[{low[0]:.4g}, {high[0]:.4g}], [{low[1]:.4g}, {high[1]:.4g}]"
    assert line == (
        f"action bounds, which no simulator tells: each dimension's range in the data, {ranges}; set "
        "dataset.action_low and dataset.action_high"
    )


def test_an_outlying_action_is_named_beside_the_bounds_that_it_stretches(arrays):
    arrays["actions"][1234, 0] = 500
    outlying, bounds = prepared(held(arrays)).warnings
    assert outlying.startswith("1 transition (0.0334%) has an outlying action: 500 in transition 1234, dimension 0,")
    assert ", 500], [" in bounds and "(500 in transition 1234, dimension 0, is an outlier)" in bounds


def test_of_many_dimensions_the_first_few_bounds_are_named(log_arrays):
    arrays = log_arrays(200, action_dim=9, terminals=[50])
    arrays["actions"] *= 3
    (line,) = prepared(held(arrays)).warnings
    assert line.count("[") == 4 and "], ...; set dataset.action_low" in line


def test_actions_in_the_unit_box_get_a_short_note_and_normalised_or_discrete_ones_none(log_arrays):
    arrays = log_arrays(200, terminals=[50])
    (line,) = prepared(held(arrays)).warnings
    assert line.startswith("action bounds, which no simulator tells: [-1, 1],")
    assert prepared(held(arrays, normalised_actions=True)).warnings == ()
    assert prepared(held(arrays | {"actions": np.arange(200) % 3})).warnings == ()


# ---- warnings


def test_nothing_is_said_of_the_embedded_dataset():
    assert prepared(["dataset=embedded"], environment="auto").warnings == ()


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "Hopper-v5"])
def test_nothing_is_said_of_random_episodes(name):
    environment = gymnasium.make(name)
    environment.action_space.seed(0)
    rows = []
    while len(rows) < 3000:
        observation, _ = environment.reset(seed=len(rows))
        over = False
        while not over:
            action = environment.action_space.sample()
            following, reward, terminated, truncated, _ = environment.step(action)
            rows.append((observation, action, reward, terminated, truncated))
            observation, over = following, terminated or truncated
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    arrays = {key: np.array(values) for key, values in zip(keys, zip(*rows, strict=True), strict=True)}
    assert prepared(held(arrays), environment=name).warnings == ()


@pytest.fixture
def hopper():
    from iql_torchrl.data.sources.embedded import PATH

    with h5py.File(PATH) as file:
        names = ("observations", "actions", "rewards", "terminals", "timeouts")
        return {key: file[key][:30_000] for key in names}


def test_a_sentinel_among_the_rewards_is_said_once_for_the_reward_and_once_for_its_return(hopper):
    hopper["rewards"][1200] = -1e30
    before = prepared(held(hopper), "algorithm.reward_transform=none", environment="null")
    reward, returns = prepared(held(hopper), environment="Hopper-v5").warnings
    assert "has an outlying reward: -1e+30 in transition" in reward
    assert returns.startswith("1 episode has a return far from the environment's reference scores (")
    assert "a normalised score of -3.073e+28" in returns
    assert "outlying reward" in shown(before) and "reference scores" not in shown(before)


def test_rewards_in_another_unit_are_said_by_their_returns(hopper):
    hopper["rewards"] *= 1000
    (line,) = prepared(held(hopper), environment="Hopper-v5").warnings
    assert "reference scores" in line and "another unit" in line


def test_an_outlying_observation_is_said_with_its_dimension(hopper):
    hopper["observations"][77, 5] = 1e20
    (line,) = prepared(held(hopper), environment="Hopper-v5").warnings
    assert "has an outlying observation: 1e+20 in transition 77, dimension 5," in line


def test_the_warnings_look_at_the_data_before_their_transforms(hopper):
    expected = prepared(held(hopper), environment="Hopper-v5").warnings
    hopper["rewards"][1200] = 5e4
    raw = prepared(held(hopper), "algorithm.variant=corl", environment="Hopper-v5").warnings
    assert expected == () and "50000 in transition" in raw[0]
