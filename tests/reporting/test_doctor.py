"""The training doctor: each finding by a real run that has its illness, and none by healthy ones."""

import json
import re
import shutil
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from problems import write_pendulum
from processes import SMALL, finish, run, start

from iql_torchrl import train
from iql_torchrl.data.sources import HDF5, Embedded
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.reporting.doctor import as_text, diagnose, examine
from iql_torchrl.reporting.run_folder import Records

pytestmark = pytest.mark.slow

OPTIONS = {
    "train.compile": False,
    "train.products": "mkl",
    "train.log_interval": 50,
    "dataset.validation_fraction": 0,
    "checkpoint.interval": 10_000,
}
SMALL_NETWORKS = {"hidden_dims": [32, 32], "batch_size": 64, "reward_transform": "none"}


def a_log(episodes=40, length=50, seed=0, *, terminals=True):
    """A task that can be learnt: the reward says how near the action is to the first number of the observation."""
    random = np.random.default_rng(seed)
    rows = episodes * length
    observations = random.normal(size=(rows, 3)).clip(-2, 2).astype(np.float32)
    # What follows is mostly what was, so that an episode does not look like many.
    for row in range(rows):
        if row % length:
            observations[row] = 0.9 * observations[row - 1] + 0.3 * observations[row]
    actions = random.uniform(-0.9, 0.9, size=(rows, 2)).astype(np.float32)
    rewards = 1 - np.abs(actions[:, 0] - observations[:, 0].clip(-0.9, 0.9)).astype(np.float32)
    ends, none = np.arange(rows) % length == length - 1, np.zeros(rows, bool)
    if terminals:  # at lengths of their own, as real ends are
        ends |= np.arange(rows) % (3 * length + 21) == 20
    return {
        "observations": observations,
        "actions": actions,
        "rewards": rewards.astype(np.float32),
        "terminals": ends if terminals else none,
        "timeouts": none if terminals else ends,
    }


def of(log, steps=600, environment=None, options=None, **algorithm):
    chosen = SMALL_NETWORKS | algorithm
    found = train(log, environment=environment, steps=steps, quiet=True, options=OPTIONS | (options or {}), **chosen)
    return {one["name"]: one for one in found.summary["findings"]}, found


def test_a_healthy_run_has_none():
    for terminals in (True, False):
        findings, run = of(a_log(terminals=terminals))
        assert findings == {} and run.summary["findings"] == []


def test_a_log_of_pendulum_has_none(tmp_path):
    log = HDF5(path=str(write_pendulum(tmp_path / "pendulum.hdf5")))
    for episodes in (2, 10):  # of two the spread says nothing, and the return happens to fall
        findings, run = of(log, 1000, "Pendulum-v1", {"eval.interval": 100, "eval.episodes": episodes})
        assert findings == {} and len(run.records.evaluations()) == 10


@pytest.mark.parametrize("options", [{}, {"preset": "behaviour_cloning"}], ids=["iql", "behaviour cloning"])
def test_the_embedded_dataset_with_default_options_has_none(options):
    settings = {"train.log_interval": 250, "eval.interval": 250, "eval.episodes": 5, "train.products": "mkl"}
    found = train(Embedded(), steps=2500, quiet=True, options=settings, **options)
    assert found.summary["findings"] == [] and len(found.records.evaluations()) == 10


def test_critics_beyond_what_the_rewards_allow():
    found, _ = of(a_log(), critic_lr=0.3, value_lr=0.3, tau=1.0, expectile=0.95)
    assert "exploding_q" in found
    assert re.search(r"(Q|V) is .* where rewards of at most .* allow 99", found["exploding_q"]["evidence"])
    assert "algorithm.critic_lr" in found["exploding_q"]["advice"]


def test_critics_that_tell_nothing_apart():
    found, _ = of(a_log(), critic_lr=1.0, value_lr=1.0)  # after which no unit answers any more
    assert "constant_q" in found and "reward_scale" not in found
    assert "standard deviation is" in found["constant_q"]["evidence"]


def test_weights_that_are_all_at_their_clip():
    found, run = of(a_log(), temperature=1000.0)
    assert "weights_clipped" in found and "few_weights" not in found
    assert "clip of 100" in found["weights_clipped"]["evidence"]
    assert "now 1000" in found["weights_clipped"]["advice"]
    row = run.records.metrics()[-1]
    assert f"{100 * row['clipped_fraction']:.0f}"[0] in found["weights_clipped"]["evidence"]


@pytest.mark.parametrize("extraction", ["ddpgbc", "flow"])
def test_weights_are_not_looked_at_where_the_policy_has_none(extraction):
    found, _ = of(a_log(), temperature=1000.0, extraction=extraction)
    assert not {"weights_clipped", "few_weights"} & set(found)


def test_weights_of_which_one_a_batch_counts():
    found, _ = of(a_log(), temperature=100.0, max_weight=1e30)
    assert "of the 64 transitions" in found["few_weights"]["evidence"]


@pytest.mark.parametrize(("bounds", "which"), [([-6.0, -3.0], "upper"), ([0.0, 2.0], "lower")])
def test_a_standard_deviation_at_its_bound(bounds, which):
    found, _ = of(a_log(), log_std_bounds=bounds, actor_lr=3e-3)
    assert f"its {which} bound {np.exp(bounds[which == 'upper']):.3g}" in found["policy_std_at_bound"]["evidence"]
    assert "algorithm.log_std_bounds" in found["policy_std_at_bound"]["advice"]


def test_a_standard_deviation_of_torchrls_at_its_lower_bound():
    log = a_log()
    log["actions"][:] = 0.25  # which nothing needs to be known for
    found, _ = of(
        log, 1500, policy="tanh_normal", standard_deviation="biased_softplus", actor_lr=3e-3, opt_decay_schedule=None
    )
    assert "lower bound 0.1" in found["policy_std_at_bound"]["evidence"]


@pytest.mark.parametrize("algorithm", [{"expectile": 1.0}, {"value_lr": 0.0}])
def test_a_v_above_every_q(algorithm):
    log = a_log()
    log["rewards"] -= 5
    found, _ = of(log, 1500, **algorithm)
    assert "V lies above Q for" in found["v_above_q"]["evidence"] and "expectile" in found["v_above_q"]["advice"]


@pytest.mark.parametrize(
    ("factor", "says"), [(1e6, "root mean square of the rewards is"), (1e-5, "No reward is larger than")]
)
def test_rewards_of_another_scale(factor, says):
    log = a_log()
    log["rewards"] *= np.float32(factor)
    found, _ = of(log)
    assert says in found["reward_scale"]["evidence"] and "return_range" in found["reward_scale"]["advice"]
    found, _ = of(log, reward_transform="return_range")
    assert "reward_scale" not in found


def test_a_discount_that_ends_long_before_an_episode_does():
    found, _ = of(a_log(4, 500, terminals=False), discount=0.5)
    assert "is 2 steps; the data's episodes have 499" in found["discount"]["evidence"]
    assert found["discount"]["seeds"] is None
    assert "0.98" in found["discount"]["advice"]


def test_a_discount_that_reaches_far_beyond_episodes_that_were_cut():
    found, _ = of(a_log(400, 4, terminals=False), discount=0.999)
    assert "0% end by a terminal" in found["discount"]["evidence"] and "is 1e+03 steps" in found["discount"]["evidence"]
    assert "discount" not in of(a_log(400, 4, terminals=True), discount=0.999)[0]


def test_actions_at_their_bounds():
    log = a_log()
    log["actions"][:] = np.sign(log["actions"])
    found, _ = of(log)
    assert found["actions_at_bounds"]["evidence"].startswith("100% of the numbers")


class Aim(gymnasium.Env):
    """One step, whose return is highest for actions halfway to where the data have them."""

    observation_space = Box(-2, 2, (3,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3).clip(-2, 2).astype(np.float32), {}

    def step(self, action):
        reward = 1 - abs(float(action[0]) - 0.4)
        return np.zeros(3, np.float32), reward, True, False, {}


def test_a_score_that_falls_while_the_losses_go_down(register):
    name = register("Aim-v0", lambda: Aim())
    log = a_log()
    log["actions"][:] = 0.85 + 0.01 * np.random.default_rng(1).normal(size=log["actions"].shape)
    options = {"eval.interval": 50, "eval.episodes": 10}
    found, run = of(log, 900, name, options, temperature=0.0)
    assert "The return fell from" in found["score_falls"]["evidence"] and "policy" in found["score_falls"]["evidence"]
    scores = [row["episode_return_mean"] for row in run.records.evaluations()]
    assert len(scores) == 18 and max(scores) > scores[-1] + 0.2


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("constant_reward", lambda log: log["rewards"].fill(1)),
        ("outlying_reward", lambda log: log["rewards"].__setitem__(1234, 1e9)),
        ("outlying_observation", lambda log: log["observations"].__setitem__((77, 1), -9e8)),
        ("outlying_action", lambda log: log["actions"].__setitem__((1234, 1), 500)),
        ("jump", lambda log: log["timeouts"].fill(False)),
        ("terminal_at_limit", lambda log: log.update(terminals=log["timeouts"], timeouts=log["terminals"])),
        (
            "duplicate_rows",
            lambda log: log.update({key: np.concatenate([value[:1000]] * 2) for key, value in log.items()}),
        ),
    ],
)
def test_problems_of_the_inspection_report(kind, spoil):
    log = a_log(terminals=False)
    for episode in range(40):  # far from each other, so that the end of one and the start of the next are
        log["observations"][50 * episode : 50 * episode + 50] = np.linspace(0, 1, 50)[:, None] + 40 * (episode % 2)
    spoil(log)
    found, run = of(log, 20)
    assert kind in found and found[kind]["seeds"] is None
    (problem,) = (one for one in run.summary["data"]["problems"] if one["kind"] == kind)
    assert found[kind]["evidence"] == problem["meaning"] and "inspect_dataset" in found[kind]["advice"]


def test_ends_that_are_not_flagged_in_data_with_their_own_next_observations():
    log = a_log(terminals=False)
    log["next_observations"] = np.roll(log["observations"], -1, axis=0)
    log["next_observations"][log["timeouts"]] = 5.0  # where each episode went before it was cut
    options = {"dataset.keep_timeouts": True}
    assert of(log, 20, options=options)[0] == {}
    log["timeouts"][:] = False
    found, run = of(log, 20, options=options)
    assert set(found) == {"missing_end"} and "Flag the ends of the episodes" in found["missing_end"]["advice"]
    assert found["missing_end"]["evidence"].startswith("39 rows have a next observation that is not the following row")
    assert [one["kind"] for one in run.summary["data"]["problems"]] == ["missing_end"]


def test_an_outlying_action_is_told_in_the_units_of_the_log():
    log = a_log(terminals=False)
    log["actions"][1234, 1] = 500  # the bounds come from the data, and within them it is 1
    found, run = of(log, 20)
    assert run.data.spaces.action_high[1] == 500
    # 24 rows before it are dropped, and what is trained on is clipped to a hundred thousandth.
    assert "outlying action: 499.997 in row 1210, dimension 1, where 90% lie in" in found["outlying_action"]["evidence"]


def test_returns_that_no_policy_has():
    log = {"observations": np.random.default_rng(0).normal(size=(500, 11)), "actions": np.zeros((500, 3))}
    log |= {"rewards": np.random.default_rng(1).uniform(size=500) * 1e4, "terminals": np.arange(500) % 50 == 49}
    options = {"eval.episodes": 1, "eval.interval": 20}
    found, _ = of(log, 20, "Hopper-v5", options)
    assert "no policy has scores outside" in found["returns_far_from_references"]["evidence"]


# ---------------------------------------------------------------------- kinds of runs


def test_of_several_seeds_each_has_its_own_and_they_are_named(tmp_path):
    found, run = of(
        a_log(), temperature=1000.0, options={"train.num_seeds": 3, "train.seed": 4, "run_dir": str(tmp_path / "run")}
    )
    assert found["weights_clipped"]["seeds"] == [4, 5, 6]
    assert "weights clipped (seed 4, 5, 6)" in as_text(run.summary["findings"], 3)
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    seed = lines[0].split(",").index("seed")
    kept = [line for line in lines if line.split(",")[seed] != "5"]
    assert len(kept) < len(lines)
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(kept) + "\n")
    assert [one["seeds"] for one in examine(tmp_path / "run")] == [[4, 6]]


def test_behaviour_cloning_has_no_finding_of_weights():
    assert of(a_log(), temperature=0.0, max_weight=1.0)[0] == {}


def test_discrete_actions_are_examined_too():
    log = a_log()
    log["actions"] = (log["actions"][:, 0] > 0).astype(np.int64)
    assert of(log)[0] == {}
    found, run = of(log, temperature=1000.0)
    assert "weights_clipped" in found and run.summary["data"]["actions_at_bounds"] is None


def test_a_run_that_diverges_is_examined(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        of(a_log(), critic_lr=1e30, options={"run_dir": str(tmp_path / "run")})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["diverged"] and isinstance(summary["findings"], list)
    assert examine(tmp_path / "run") == summary["findings"]


def test_a_folder_is_examined_as_its_run_was_finished_or_killed(tmp_path):
    found, _ = of(a_log(), temperature=1000.0, options={"run_dir": str(tmp_path / "run")})
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {one["name"]: one for one in examine(tmp_path / "run")} == found
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    assert [one["name"] for one in examine(tmp_path / "killed")] == ["weights_clipped"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / "config.yaml").unlink(), "has no config.yaml"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json is damaged"),
        (lambda folder: (folder / "config.yaml").write_text("[1"), "config.yaml is damaged"),
        (lambda folder: (folder / "config.yaml").write_text("1"), "holds no mapping"),
        (lambda folder: (folder / "metrics.csv").write_text("a,b\n1,2\n"), "metrics.csv is damaged"),
        (lambda folder: (folder / "metrics.csv").write_text("step,seed,qvalue\n1,0,x\n"), "metrics.csv is damaged"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(spoil, says, tmp_path):
    of(a_log(), 20, options={"run_dir": str(tmp_path / "run")})
    spoil(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=re.escape(says)) as error:
        examine(tmp_path / "run")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_without_rows_there_is_nothing_to_say():
    assert diagnose(Records(), {}, {}) == []


def test_the_findings_stand_beside_the_closing_table_and_in_the_summary(tmp_path):
    np.savez(tmp_path / "log.npz", **a_log())
    options = (*SMALL, "dataset=numpy", f"dataset.path={tmp_path / 'log.npz'}", "env.name=null", "train.steps=600")
    out = run("iql_offline.py", *options, "algorithm.temperature=1000", f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert re.search(r"final|objective", out) and "! weights clipped\n" in out and "lower algorithm.temperature" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "weights_clipped" in [one["name"] for one in summary["findings"]]
    assert {"name", "evidence", "advice", "seeds"} == set(summary["findings"][0])


def test_a_run_that_goes_on_online_is_examined(tmp_path):
    options = ("train.steps=30", "online.steps=30", "eval.interval=20", "eval.episodes=1", "train.compile=false")
    options += ("algorithm.hidden_dims=[16,16]", "algorithm.discount=0.5", f"run_dir={tmp_path / 'run'}")
    code, out, error = finish(start("iql_finetune.py", *options, cwd=tmp_path))
    assert code == 0, error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [one["name"] for one in summary["findings"]] == ["discount"] and "! discount\n" in out
    assert summary["data"]["problems"] == [] and summary["data"]["episodes"] == 657
    assert Path(tmp_path / "run" / "summary.json").exists()
