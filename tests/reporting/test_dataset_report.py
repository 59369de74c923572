"""What a dataset's report measures, against independent NumPy, and the faults that it finds."""

from __future__ import annotations

import copy
import json

import gymnasium
import numpy as np
import pytest

from iql_torchrl import load_transitions
from iql_torchrl.configuration.options import EnvironmentOptions
from iql_torchrl.data.log import ROWS_AT_A_TIME, Log
from iql_torchrl.data.sources.arrays import Arrays
from iql_torchrl.data.sources.embedded import Embedded
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError, DatasetError
from iql_torchrl.reporting.dataset_report import as_text, describe_log, draw_report, inspect_dataset

PIECE = 65_536
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def test_a_piece_has_as_many_rows_as_these_tests_take_it_to_have():
    assert ROWS_AT_A_TIME == PIECE


def described(columns, bounds=None, keep_timeouts=False, max_episode_steps=None, score=None, **of_log):
    log = Log("a log", columns, own_next_observations=keep_timeouts, **of_log)
    report = describe_log(log, bounds=bounds, max_episode_steps=max_episode_steps, score=score)
    json.dumps(report, allow_nan=False)  # every report can be written
    return report


def random_log(
    lengths=(7, 12, 1, 20, 5), terminated=(True, False, True, False, False), *, seed=0, last_unfinished=False
):
    """Random rows in episodes of known lengths; the rest are timeouts."""
    random = np.random.default_rng(seed)
    rows = sum(lengths)
    last_rows = np.cumsum(lengths) - 1
    log = {
        "observations": (random.normal(size=(rows, 4)) * [1, 100, 0.01, 5] + [0, 1e4, 3, 0]).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        "rewards": random.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.zeros(rows, bool),
    }
    log["terminals"][last_rows[list(terminated)]] = True
    log["timeouts"][last_rows[[not flag for flag in terminated]]] = True
    if last_unfinished:
        log["terminals"][-1] = log["timeouts"][-1] = False
    return log


def episodes_by_loop(log):
    """Returns and lengths of the episodes, one row after the other."""
    returns, lengths, total, steps = [], [], 0.0, 0
    for reward, terminal, timeout in zip(log["rewards"].reshape(-1), log["terminals"], log["timeouts"], strict=True):
        total, steps = total + float(reward), steps + 1
        if terminal or timeout:
            returns.append(total)
            lengths.append(steps)
            total, steps = 0.0, 0
    if steps:
        returns.append(total)
        lengths.append(steps)
    return returns, lengths


def assert_statistics(found, values):
    values = np.asarray(values, np.float64)
    assert found["minimum"] == pytest.approx(values.min()) and found["maximum"] == pytest.approx(values.max())
    quartiles = [found[f"{name}"] for name in ("lower_quartile", "median", "upper_quartile")]
    np.testing.assert_allclose(quartiles, np.percentile(values, [25, 50, 75]), rtol=1e-12)
    assert found["mean"] == pytest.approx(values.mean(), rel=1e-9, abs=1e-12)
    assert found["std"] == pytest.approx(np.sqrt(np.mean((values - values.mean()) ** 2)), rel=1e-9, abs=1e-12)


# ---- what it measures


@pytest.mark.parametrize("last_unfinished", [False, True])
@pytest.mark.parametrize("rewards_shape", [(-1,), (-1, 1)], ids=["flat", "column"])
def test_returns_and_lengths_are_those_of_whole_episodes(last_unfinished, rewards_shape):
    log = random_log(last_unfinished=last_unfinished)
    log["rewards"] = log["rewards"].reshape(rewards_shape)
    report = described(log)
    returns, lengths = episodes_by_loop(log)
    assert lengths == [7, 12, 1, 20, 5]
    assert_statistics(report["returns"], returns)
    assert_statistics(report["lengths"], lengths)
    assert_statistics({**report["rewards"]}, log["rewards"])
    assert report["rows"] == 45
    expected = {"count": 5, "terminated": 2, "truncated": 3 - last_unfinished, "unfinished": int(last_unfinished)}
    assert report["episodes"] == expected


@pytest.mark.parametrize("keep_timeouts", [False, True])
def test_the_transitions_are_as_many_as_training_gets(keep_timeouts, tmp_path):
    log = random_log()
    log["next_observations"] = np.roll(log["observations"], -1, axis=0)
    np.savez(tmp_path / "log.npz", **log)
    transitions = load_transitions("numpy", path=tmp_path / "log.npz", keep_timeouts=keep_timeouts)
    assert described(log, keep_timeouts=keep_timeouts)["transitions"] == len(transitions)


def test_a_step_limit_cuts_a_log_without_timeouts_and_no_other():
    log = random_log(lengths=(30, 30), terminated=(True, True))
    with_timeouts = described(log, max_episode_steps=10)
    assert with_timeouts["episodes"]["count"] == 2
    del log["timeouts"]
    report = described(log, max_episode_steps=20)
    assert report["episodes"] == {"count": 4, "terminated": 2, "truncated": 2, "unfinished": 0}
    assert report["lengths"]["minimum"] == 10 and report["lengths"]["maximum"] == 20
    sums = log["rewards"].astype(np.float64).reshape(-1, 10).sum(1)
    assert_statistics(report["returns"], [sums[0] + sums[1], sums[2], sums[3] + sums[4], sums[5]])


def test_episode_ids_cut_a_log_as_timeouts_do():
    log = random_log()
    _, lengths = episodes_by_loop(log)
    ids = np.repeat(np.arange(5), lengths)
    report = described(log)
    del log["timeouts"]
    by_ids = described({**log, "episode_ids": ids})
    assert by_ids["columns"] == ["actions", "episode_ids", "observations", "rewards", "terminals"]
    for key in ("episodes", "returns", "lengths"):
        assert by_ids[key] == report[key]


def assert_moments(found, values):
    values = np.asarray(values, np.float64)
    assert found["size"] == values.shape[1]
    np.testing.assert_array_equal(found["minimum"], values.min(0))
    np.testing.assert_array_equal(found["maximum"], values.max(0))
    np.testing.assert_allclose(found["mean"], values.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found["std"], values.std(0), rtol=1e-7, atol=1e-9)
    assert found["constant_dimensions"] == [i for i in range(values.shape[1]) if len(set(values[:, i])) == 1]


@pytest.mark.parametrize("rows", [45, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 7])
def test_every_dimension_is_measured_over_all_rows(rows):
    log = random_log(lengths=(rows - 3, 3), terminated=(True, False))
    log["observations"][:, 2] = 0.1
    log["actions"][-1, 1] = 4
    report = described(log)
    assert_moments(report["observations"], log["observations"])
    assert_moments(report["actions"], log["actions"])
    assert report["observations"]["constant_dimensions"] == [2]
    assert_statistics({**report["rewards"]}, log["rewards"])


def test_a_small_spread_around_a_large_value_is_not_lost():
    log = random_log(lengths=(PIECE + 500,), terminated=(True,))
    log["observations"] = log["observations"].astype(np.float64)
    log["observations"][:, 0] = 1e8 + np.random.default_rng(1).normal(size=PIECE + 500)
    std = described(log)["observations"]["std"][0]
    assert std == pytest.approx(log["observations"][:, 0].std(), rel=1e-6)


def test_integer_columns_are_measured_as_numbers():
    log = random_log()
    log["observations"] = np.random.default_rng(0).integers(0, 256, size=(45, 4)).astype(np.uint8)
    log["rewards"] = np.random.default_rng(0).integers(-3, 3, size=45).astype(np.int8)
    report = described(log)
    assert_moments(report["observations"], log["observations"])
    assert_statistics({**report["rewards"]}, log["rewards"])
    assert report["rewards"]["zero_share"] == np.mean(log["rewards"] == 0)


def test_actions_at_given_bounds_are_counted_by_dimension():
    log = random_log()
    log["actions"] = np.random.default_rng(0).uniform(-0.9, 0.9, size=(45, 2)).astype(np.float32) * [1, 5] + [0, 5]
    log["actions"][[3, 4, 30], 0] = [-1, 1, 1]
    log["actions"][[4, 44], 1] = [0, 10]
    found = described(log, bounds=(np.array([-1.0, 0]), np.array([1.0, 10])))["actions"]
    assert found["clipped_share_by_dimension"] == pytest.approx([3 / 45, 2 / 45])
    assert found["clipped_share"] == pytest.approx(5 / 90)
    assert found["rows_outside_bounds"] == 0 and found["low"] == [-1, 0] and found["high"] == [1, 10]
    assert found["bounds_from"] == "the environment's"


def test_without_bounds_the_range_of_the_data_counts():
    log = random_log()
    found = described(log)["actions"]
    assert found["clipped_share_by_dimension"] == pytest.approx([2 / 45, 2 / 45])  # its minimum and its maximum
    assert found["bounds_from"] == "each dimension's own range" and found["rows_outside_bounds"] == 0


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)], ids=["flat", "column"])
def test_discrete_actions_are_counted(shape):
    log = random_log()
    actions = np.random.default_rng(0).choice([0, 1, 4], size=45)
    log["actions"] = actions.reshape(shape)
    report = described(log)
    assert report["actions"] == {"counts": [int((actions == action).sum()) for action in range(5)]}
    assert f"5 discrete ones, taken {', '.join(map(str, report['actions']['counts']))} times" in as_text(report)


def test_histograms_count_every_row_and_episode_between_their_edges():
    log = random_log(lengths=(9, 8, 7, 6, 5, 4), terminated=(True, False) * 3)
    report = described(log)
    returns, lengths = episodes_by_loop(log)
    for name, values in (("returns", returns), ("lengths", lengths), ("rewards", log["rewards"])):
        found = report["histograms"][name]
        assert sum(found["counts"]) == len(values) and len(found["edges"]) == len(found["counts"]) + 1
        assert np.all(np.diff(found["edges"]) > 0)
        edges = np.array(found["edges"])
        assert edges[0] <= np.min(values) and edges[-1] >= np.max(values)
        np.testing.assert_array_equal(found["counts"], np.histogram(np.asarray(values, np.float64), edges)[0])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30, 3e38, 1e12])
def test_numbers_that_are_nearly_the_same_have_a_histogram(value, tmp_path):
    log = random_log()
    log["rewards"] = np.full(45, value, np.float64)
    log["rewards"][7] = np.nextafter(value, 0)
    report = described(log)
    found = report["histograms"]["rewards"]
    assert sum(found["counts"]) == 45 and np.all(np.diff(found["edges"]) > 0)
    draw_report(report, tmp_path / "report.png")


def test_duplicates_are_rows_that_repeat_an_earlier_row():
    log = random_log(lengths=(50, 50), terminated=(True, True))
    for target, source in ((20, 3), (60, 3), (61, 4), (99, 98)):
        for key in ("observations", "actions", "rewards"):
            log[key][target] = log[key][source]
    for key, row in (("observations", 70), ("actions", 71), ("rewards", 72)):  # all but one the same
        for other in ("observations", "actions", "rewards"):
            log[other][row] = log[other][row - 60]
        log[key][row] += 1
    report = described(log)
    rows = np.column_stack([log["observations"], log["actions"], log["rewards"]])
    assert report["duplicate_rows"] == len(rows) - len(np.unique(rows, axis=0)) == 4


def test_rows_on_a_grid_are_told_apart_and_their_repetitions_counted():
    grid = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 8), axis=-1).reshape(-1, 8)
    rows = np.concatenate([grid, grid[:1000]]).astype(np.float32)
    log = {"observations": rows[:, :5], "actions": rows[:, 5:7], "rewards": rows[:, 7]}
    log["terminals"] = np.zeros(len(rows), bool)
    assert described(log)["duplicate_rows"] == 1000


def test_duplicates_in_other_pieces_are_found():
    log = random_log(lengths=(2 * PIECE + 9,), terminated=(True,))
    for target, source in ((PIECE, 0), (2 * PIECE, PIECE - 1), (2 * PIECE + 8, PIECE + 1)):
        for key in ("observations", "actions", "rewards"):
            log[key][target] = log[key][source]
    assert described(log)["duplicate_rows"] == 3


def test_zeros_of_both_signs_are_the_same_number():
    log = random_log()
    for key in ("observations", "actions", "rewards"):
        log[key][30] = log[key][10] = 0
    log["observations"][30, 0] = -0.0
    report = described(log)
    assert report["duplicate_rows"] == 1


def test_a_log_that_cannot_be_trained_on_is_refused():
    log = random_log()
    log["observations"][13, 1] = np.nan
    with pytest.raises(DatasetError, match=r"a log.*observations.*13"):
        described(log)


@pytest.mark.parametrize("low", [-np.inf, -1.0])
def test_a_report_can_be_written_where_actions_are_unbounded(low):
    log = random_log()
    described(log, bounds=(np.full(2, low), np.full(2, np.inf)))


def test_describing_leaves_the_log_as_it_was():
    log = random_log()
    before = copy.deepcopy(log)
    described(log)
    for key, values in log.items():
        np.testing.assert_array_equal(values, before[key])


@pytest.mark.parametrize("discrete", [False, True])
def test_the_picture_is_a_png(discrete, tmp_path):
    log = random_log()
    if discrete:
        log["actions"] = np.arange(45) % 3
    draw_report(described(log), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize("fault", ["one row", "constant"])
def test_the_picture_is_drawn_of_logs_with_little_in_them(fault, tmp_path):
    log = random_log(lengths=(2,), terminated=(True,))
    if fault == "constant":
        log = random_log()
        for key in ("observations", "actions", "rewards"):
            log[key][:] = 0
    draw_report(described(log), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


# ---- what it finds


def rollout(name, episodes, limit=None):
    """Random episodes of a real environment, without those that happen to terminate at the limit."""
    environment = gymnasium.make(name, **({} if limit is None else {"max_episode_steps": limit}))
    environment.action_space.seed(0)
    found = {key: [] for key in COLUMNS}
    for episode in range(episodes):
        observation, _ = environment.reset(seed=episode)
        steps, over = [], False
        while not over:
            action = environment.action_space.sample()
            following, reward, terminated, truncated, _ = environment.step(action)
            steps.append((observation, action, reward, following, terminated, truncated))
            observation, over = following, terminated or truncated
        if terminated and len(steps) == limit:
            continue
        for key, values in zip(COLUMNS, zip(*steps, strict=True), strict=True):
            found[key].extend(values)
    environment.close()
    return {
        key: np.array(values, bool if key in ("terminals", "timeouts") else np.float32) for key, values in found.items()
    }


@pytest.fixture(scope="module")
def rollouts():
    return {"Pendulum-v1": rollout("Pendulum-v1", 6), "Hopper-v5": rollout("Hopper-v5", 40, 25)}


@pytest.fixture(params=["Pendulum-v1", "Hopper-v5"])
def clean(request, rollouts):
    return copy.deepcopy(rollouts[request.param])


@pytest.fixture
def pendulum(rollouts):
    return copy.deepcopy(rollouts["Pendulum-v1"])


@pytest.fixture
def hopper(rollouts):
    return copy.deepcopy(rollouts["Hopper-v5"])


def findings(columns, **options):
    report = described(columns, **options)
    text = as_text(report)
    for finding in report["findings"]:
        assert finding["meaning"] in text
        assert all(str(row) in text for row in finding["rows"])
    assert ("nothing suspicious found" in text) == (not report["findings"])
    return {finding["kind"]: finding for finding in report["findings"]}


def without(columns, *keys):
    return {key: values for key, values in columns.items() if key not in keys}


def ends_of(columns):
    return np.flatnonzero(columns["terminals"] | columns["timeouts"])


@pytest.mark.parametrize("has_next", [True, False])
def test_nothing_is_found_in_a_clean_log(clean, has_next):
    columns = clean if has_next else without(clean, "next_observations")
    limit = np.abs(clean["actions"]).max(0)
    assert findings(columns) == {}
    assert findings(columns, bounds=(-limit, limit)) == {}


def test_an_end_flag_that_is_missing_is_found_at_its_row(clean):
    for row in ends_of(clean)[:-1]:
        columns = copy.deepcopy(clean)
        columns["terminals"][row] = columns["timeouts"][row] = False
        found = findings(columns)
        assert found["missing_end"]["rows"] == [row] and found["missing_end"]["count"] == 1
        assert "jump" not in found


def jump_sizes(columns):
    """How many times the usual step the observation moves after each row, in the dimension where it moves most."""
    steps = np.abs(np.diff(columns["observations"].astype(np.float64), axis=0))
    ends = columns["terminals"] | columns["timeouts"]
    return (steps / np.quantile(steps[~ends[:-1]], 0.95, axis=0)).max(1)


def test_an_end_flag_that_is_missing_shows_as_a_jump_without_next_observations(hopper):
    sizes = jump_sizes(hopper)
    ends = ends_of(hopper)[:-1]
    wide = [row for row in ends if sizes[row] > 11]
    assert len(wide) >= 3
    for row in wide:
        columns = without(copy.deepcopy(hopper), "next_observations")
        columns["terminals"][row] = columns["timeouts"][row] = False
        found = findings(columns)
        assert found["jump"]["rows"] == [row] and "missing_end" not in found


def test_only_the_first_few_rows_of_many_are_named(hopper):
    rows = ends_of(hopper)[:-1]
    hopper["terminals"][rows] = hopper["timeouts"][rows] = False
    found = findings(hopper)["missing_end"]
    assert found["count"] == len(rows) > 5 and found["rows"] == rows[:5].tolist()
    assert f"{len(rows)} rows" in found["meaning"]


def smooth_log(rows, jumps, breaks, has_next):
    """A slow walk through several pieces that jumps after some rows."""
    steps = np.random.default_rng(0).uniform(-1, 1, size=(rows, 2)).astype(np.float32)
    steps[np.array(jumps, int) + 1] += 30
    observations = np.cumsum(steps, axis=0, dtype=np.float64).astype(np.float32)
    log = {
        "observations": observations,
        "actions": steps,
        "rewards": steps[:, 0].copy(),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.zeros(rows, bool),
    }
    log["terminals"][-1] = True
    if has_next:
        log["next_observations"] = np.concatenate([observations[1:], observations[-1:]])
        log["next_observations"][breaks] += 0.01
    return log


EDGES = [[0], [PIECE - 2, PIECE - 1, PIECE], [2 * PIECE - 1, 2 * PIECE], [5, PIECE - 1, 2 * PIECE - 1]]


@pytest.mark.parametrize("jumps", EDGES, ids=str)
def test_jumps_between_two_pieces_are_found_as_those_inside(jumps):
    found = findings(smooth_log(2 * PIECE + 100, jumps, [], False))
    assert found["jump"]["rows"] == jumps and found["jump"]["count"] == len(jumps)


@pytest.mark.parametrize("breaks", EDGES, ids=str)
def test_next_observations_that_belong_elsewhere_are_found_between_two_pieces(breaks):
    found = findings(smooth_log(2 * PIECE + 100, [], breaks, True))
    assert found["missing_end"]["rows"] == breaks and found["missing_end"]["count"] == len(breaks)


@pytest.mark.parametrize("rows", [PIECE, PIECE + 1, 2 * PIECE])
def test_the_last_row_is_followed_by_none_whatever_the_length(rows):
    log = smooth_log(rows, [], [], True)
    log["next_observations"][-1] += 50
    log["terminals"][-1] = False
    log["timeouts"][PIECE - 2] = True
    assert not {"missing_end", "jump"} & findings(log).keys()


@pytest.mark.parametrize("row", [PIECE - 1, PIECE])
def test_an_end_between_two_pieces_excuses_the_jump_there(row):
    log = smooth_log(2 * PIECE + 100, [row], [], False)
    log["terminals"][row] = True
    assert "jump" not in findings(log)


def test_a_timeout_at_an_odd_length_is_found(pendulum):
    pendulum["timeouts"][449] = True
    found = findings(pendulum)["odd_timeout"]
    assert found["count"] == 2 and found["rows"] == [449, 599] and "200 steps" in found["meaning"]


def test_timeouts_at_lengths_all_different_are_found(pendulum):
    pendulum["timeouts"][:] = False
    pendulum["timeouts"][[99, 299, 599, 1199]] = True  # after 100, 200, 300 and 600 steps
    found = findings(without(pendulum, "next_observations"))["odd_timeout"]
    assert found["count"] == 4 and found["rows"] == [99, 299, 599, 1199] and "all different" in found["meaning"]


def test_a_terminal_where_episodes_time_out_is_found(pendulum):
    pendulum["timeouts"][599], pendulum["terminals"][599] = False, True
    found = findings(pendulum)
    assert found["terminal_at_limit"]["rows"] == [599] and "200 steps" in found["terminal_at_limit"]["meaning"]
    assert "odd_timeout" not in found


def test_a_terminal_before_the_limit_is_none_of_those(hopper):
    assert hopper["terminals"].sum() > 5 and hopper["timeouts"].sum() > 1
    assert "terminal_at_limit" not in findings(hopper)


def test_terminals_that_all_come_at_one_length_are_found(pendulum):
    pendulum["terminals"], pendulum["timeouts"] = pendulum["timeouts"], pendulum["terminals"]
    found = findings(pendulum)["terminal_at_limit"]
    assert found["count"] == 6 and found["rows"] == [199, 399, 599, 799, 999] and "200 steps" in found["meaning"]


@pytest.mark.parametrize("column", ["timeouts", None], ids=["no-column", "all-zero"])
def test_a_log_without_any_end_is_found(clean, column):
    clean["terminals"][:] = clean["timeouts"][:] = False
    columns = without(clean, column)
    found = findings(columns)
    assert found["no_end"]["count"] == 1 and "terminals" in found["no_end"]["meaning"]
    assert "no_end" not in findings(without(columns, "timeouts"), max_episode_steps=25)


@pytest.mark.parametrize("count", [1, 3])
def test_episodes_of_one_step_are_found(pendulum, count):
    pendulum["terminals"][np.array([200, 400, 600][:count])] = True
    assert findings(pendulum)["episodes_of_one_step"]["count"] == count


def test_rows_that_are_there_twice_are_found(clean):
    first = int(ends_of(clean)[0]) + 1
    doubled = {key: np.concatenate([values, values[:first]]) for key, values in clean.items()}
    found = findings(doubled)
    assert found["duplicate_rows"]["count"] == first and set(found) == {"duplicate_rows"}


@pytest.mark.parametrize(("key", "kind"), [("observations", "constant_observations"), ("actions", "constant_actions")])
def test_dimensions_that_never_change_are_found_with_their_numbers(hopper, key, kind):
    hopper[key][:, [0, 2]] = 0.25
    if key == "observations":
        hopper["next_observations"][:, [0, 2]] = 0.25
    found = findings(hopper)
    assert found[kind]["count"] == 2 and found[kind]["meaning"].endswith("0, 2.")
    assert set(found) == {kind}


def test_actions_outside_the_bounds_are_found(clean):
    limit = np.abs(clean["actions"]).max(0).astype(np.float64)
    clean["actions"][[3, 17]] = np.float32(1.5) * limit.max()
    clean["actions"][40, 0] = -1.001 * limit[0]
    found = findings(clean, bounds=(-limit, limit))
    assert found["actions_outside_bounds"]["count"] == 3
    assert "actions_outside_bounds" not in findings(clean)


def test_a_reward_that_never_changes_is_found(clean):
    clean["rewards"][:] = 1
    assert set(findings(clean)) == {"constant_reward"}
    clean["rewards"][-1] = 0
    assert findings(clean) == {}


# ---- numbers far outside all others


@pytest.mark.parametrize("row", [0, 17, PIECE - 1, PIECE, 2 * PIECE + 8])
@pytest.mark.parametrize(
    ("key", "kind"), [("rewards", "reward"), ("observations", "observation"), ("actions", "action")]
)
def test_a_sentinel_is_found_in_whatever_piece_with_row_value_and_share(key, kind, row):
    log = random_log(lengths=(2 * PIECE + 9,), terminated=(True,))
    log[key].reshape(2 * PIECE + 9, -1)[row, -1] = -1e30
    found = findings(log)[f"outlying_{kind}"]
    assert (found["count"], found["rows"]) == (1, [row])
    assert found["meaning"].startswith(f"1 row (0.000763%) has an outlying {kind}: -1e+30 in row {row},")
    assert f"dimension {log[key].shape[-1] - 1}," in found["meaning"] or kind == "reward"
    assert not {"outlying_reward", "outlying_observation", "outlying_action"} - {f"outlying_{kind}"} & set(
        findings(log)
    )


def test_sentinels_in_several_dimensions_are_counted_by_rows_and_named_by_dimensions(hopper):
    hopper["observations"][[3, 3, 8, 90, 100, 110, 120], [0, 4, 4, 2, 4, 4, 4]] = 1e9
    found = findings(without(hopper, "next_observations"))["outlying_observation"]
    assert found["count"] == 6 and found["rows"] == [3, 8, 90, 100, 110]
    assert "in row 3, dimension 0," in found["meaning"] and "(outliers in dimensions 2, 4 too)" in found["meaning"]


def test_discrete_actions_have_no_outliers():
    log = random_log()
    log["actions"] = np.append(np.arange(44) % 3, 900_000)
    assert "outlying_action" not in findings(log)


def test_a_small_jump_is_no_outlier_and_a_rare_reward_is_none(hopper):
    hopper["rewards"][:] = 0
    hopper["rewards"][[50, 400]] = [1, 100]
    hopper["observations"][77, 3] = 30
    assert not [kind for kind in findings(hopper) if kind.startswith("outlying")]


def test_returns_that_no_policy_has_are_found_where_the_episodes_start(hopper):
    score = EnvironmentSpec.of("Hopper-v5").score
    starts = np.append(0, ends_of(hopper)[:-1] + 1)
    assert findings(hopper, score=score) == {}
    hopper["rewards"][starts[[4, 9]] + 2] = [40_000, -9_000]
    found = findings(hopper, score=score)["returns_far_from_references"]
    assert found["count"] == 2 and found["rows"] == starts[[4, 9]].tolist()
    expected = 100 * (hopper["rewards"][starts[4] : starts[5]].astype(np.float64).sum() + 20.272305) / 3254.572305
    assert f"a normalised score of {expected:.4g}, in the one that starts in row {starts[4]};" in found["meaning"]
    assert "returns_far_from_references" not in findings(hopper)
    assert "returns_far_from_references" not in findings(hopper, score=lambda _: None)


# ---- a source


def inspected(source, name="auto"):
    return inspect_dataset(source, EnvironmentOptions(name=name, kwargs=None))


def test_nothing_is_found_in_the_embedded_dataset_that_is_an_outlier():
    kinds = [finding["kind"] for finding in inspected(Embedded())["findings"]]
    assert not [kind for kind in kinds if kind.startswith(("outlying", "returns"))]


def test_returns_are_compared_with_the_references_of_the_environment(hopper):
    hopper["rewards"] *= 1e5
    kinds = [finding["kind"] for finding in inspected(Arrays(arrays=hopper), "Hopper-v5")["findings"]]
    assert kinds == ["returns_far_from_references"]
    assert inspected(Arrays(arrays=hopper), None)["findings"] == []


def test_the_bounds_of_the_options_are_those_of_the_report():
    log = random_log()
    log["actions"] *= 5
    log["actions"][:3, 0] = [-7, 7, 8]
    report = inspected(Arrays(arrays=log, action_low=[-7, -6], action_high=7), None)
    found = report["actions"]
    assert found["low"] == [-7, -6] and found["high"] == [7, 7] and found["rows_outside_bounds"] == 1
    assert found["bounds_from"] == "those of dataset.action_low and dataset.action_high"
    assert found["clipped_share_by_dimension"] == [3 / 45, 0]
    assert "dataset.action_low" in as_text(report)
    unit = inspected(Arrays(arrays=log, action_low=-7, action_high=7, normalised_actions=True), None)["actions"]
    assert unit["low"] == [-1, -1] and unit["high"] == [1, 1]


def test_bounds_that_do_not_suit_the_data_are_refused(pendulum):
    log = random_log()
    with pytest.raises(ConfigurationError, match=r"dataset\.action_low has 3 numbers but the data's actions have 2"):
        inspected(Arrays(arrays=log, action_low=[-1, -1, -1], action_high=1), None)
    with pytest.raises(ConfigurationError, match=r"without a simulator.*those of Pendulum-v1"):
        inspected(Arrays(arrays=pendulum, action_low=-2, action_high=2), "Pendulum-v1")
    log["actions"] = np.arange(45) % 3
    with pytest.raises(ConfigurationError, match="the data's are discrete"):
        inspected(Arrays(arrays=log, action_low=-1, action_high=1), None)


def test_a_terminal_row_without_a_next_observation_is_no_fault(hopper):
    rows = np.flatnonzero(hopper["terminals"])
    hopper["next_observations"][rows] = np.nan
    assert findings(hopper, keep_timeouts=True) == {}
