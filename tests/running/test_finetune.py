"""Runs that go on online: their batches, their steps, and what becomes of them after a kill."""

import signal
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from comparing import rows_without_times, same
from problems import write_pendulum
from processes import SMALL, finish, refused, rows, run, start, wait_for_rows

from iql_torchrl.configuration.composing import compose, initialised
from iql_torchrl.data.preparation import prepare_data
from iql_torchrl.environments.playing import derived_seed
from iql_torchrl.errors import ConfigurationError, DivergenceError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.running.interaction import _row_type
from iql_torchrl.running.online import build_online
from iql_torchrl.running.options import FinetuneOptions, OfflineOptions
from iql_torchrl.running.run import Run
from iql_torchrl.running.stopwatch import Stopwatch
from iql_torchrl.training.checkpoints import checkpoint_folders, find_checkpoints, load_checkpoint

FAILING = "faults.simulators:Failing-v0"


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A folder with a log and a run on it."""
    folder = tmp_path_factory.mktemp("offline")
    write_pendulum(folder / "log.hdf5")
    run("iql_offline.py", *on_log(folder), *SMALL, "train.steps=40", "run_dir=run", cwd=folder)
    return folder


def on_log(folder):
    return ["dataset=hdf5", f"dataset.path={folder / 'log.hdf5'}", "env.name=Pendulum-v1"]


def options_of(*overrides, folder=None):
    with initialised():
        return compose("iql_finetune", [*SMALL, *overrides], FinetuneOptions, folder=folder)


def built(folder, *overrides, at=None):
    """Options, step, data and environments of a run that is not begun."""
    options = options_of(f"checkpoint={folder / 'run'}", *overrides)
    data = prepare_data(options.dataset, options.algorithm, options.env)
    step, data, interaction = build_online(options, data, torch.device("cpu"), at, None, Stopwatch())
    return options, step, data, interaction


def trained(folder, *overrides, at=None):
    """A finished run in this process."""
    options, step, data, interaction = built(folder, *overrides, at=at)
    run_ = Run(step, data, options, at, interaction=interaction, quiet=True)
    for losses in run_.updates():
        run_.evaluate_when_due()
        run_.log_when_due(losses)
        run_.save_when_due()
    run_.finish()
    return run_


def recorded(path, environments=1):
    with open(path, "rb") as file:
        file.readline()
        return np.frombuffer(file.read(), dtype=_row_type(3, 1)).reshape(-1, environments)


@pytest.mark.slow
def test_it_starts_from_the_offline_policy_and_goes_on_counting(offline, tmp_path):
    run_ = trained(offline, "online.steps=60", at=tmp_path)
    before, found = rows(offline / "run/eval.csv"), rows(tmp_path / "eval.csv")
    assert [(row["step"], row["phase"]) for row in found] == [
        *[("40", "offline"), ("60", "online"), ("80", "online"), ("100", "online")]
    ]
    assert found[0]["episode_return_mean"] == before[-1]["episode_return_mean"]  # of the same seeds
    assert {row["phase"] for row in before} == {""}
    assert run_.summary["offline_score"] == float(before[-1]["episode_return_mean"])
    assert run_.summary["environment_steps"] == 60 and run_.summary["offline_updates"] == 40
    assert rows(tmp_path / "metrics.csv")[-1]["environment_steps"] == "60"


@pytest.mark.slow
def test_the_recorded_steps_are_those_of_the_environment_and_what_is_trained_on(offline, tmp_path):
    run_ = trained(offline, "online.steps=230", "train.seed=5", at=tmp_path)
    steps = recorded(tmp_path / "online/seed-5.steps")[:, 0]
    environment, place = gymnasium.make("Pendulum-v1"), 0
    for episode in range(2):
        observation, _ = environment.reset(seed=derived_seed(5, 0, episode))
        over = False
        while not over and place < len(steps):
            row = steps[place]
            np.testing.assert_array_equal(row["observation"], observation.astype(np.float32))
            observation, reward, terminated, over, _ = environment.step(row["action"])
            assert (row["reward"], row["over"]) == (np.float32(reward), over)
            assert not row["terminated"] and not terminated
            place += 1
    assert place == 230 and steps["over"].nonzero()[0].tolist() == [199]

    # In the data's own terms: actions in [-1, 1], clipped; rewards scaled as the dataset's were.
    stored = run_.step.buffer.storage._storage[len(run_.data.training) :][:230]
    np.testing.assert_allclose(stored["action"], np.clip(steps["action"] / 2, -1 + 1e-5, 1 - 1e-5), atol=1e-7)
    with h5(offline / "log.hdf5") as log:
        returns = log["rewards"][()].reshape(4, 200).sum(1, dtype=np.float64)
        ends = log["rewards"][()].reshape(4, 200)[:, :199].sum(1, dtype=np.float64)
    scale = stored["next", "reward"][:, 0].numpy() / steps["reward"]
    assert np.allclose(scale, 1000 / np.ptp(ends), rtol=1e-4) or np.allclose(scale, 1000 / np.ptp(returns), rtol=1e-4)
    assert stored["next", "truncated"].nonzero()[:, 0].tolist() == [199]
    assert not stored["next", "terminated"].any()  # so that the end of time is bootstrapped
    assert run_.step.buffer.sampler.added == 230


def h5(path):
    import h5py

    return h5py.File(path)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("online.num_envs=2", "train.num_seeds=2", "online.warmup_steps=6")])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(offline, tmp_path, more):
    arguments = [f"checkpoint={offline / 'run'}", *SMALL, "online.steps=640", *more]
    expected, killed = tmp_path / "straight", tmp_path / "killed"
    run("iql_finetune.py", *arguments, f"run_dir={expected}", cwd=tmp_path)
    process = start("iql_finetune.py", *arguments, f"run_dir={killed}", cwd=tmp_path)
    wait_for_rows(killed / "metrics.csv", 15)
    process.send_signal(signal.SIGKILL)
    finish(process)
    place = killed / "online/seed-0.steps"
    ahead = place.read_bytes()
    out = run("iql_finetune.py", "resume=auto", f"run_dir={killed}", cwd=tmp_path)
    assert "resumed from" in out and "does not repeat" not in out
    assert place.read_bytes().startswith(ahead[: len(ahead) // 200 * 200])  # what was there is kept
    for file in ("eval.csv", "metrics.csv"):
        assert rows_without_times(killed / file) == rows_without_times(expected / file)
    for path in expected.glob("checkpoints/**/*.pt"):
        one, other = load_checkpoint(path), load_checkpoint(killed / path.relative_to(expected))
        assert same(one["training"], other["training"])
    for path in expected.glob("online/*.steps"):
        assert path.read_bytes() == (killed / path.relative_to(expected)).read_bytes()


@pytest.mark.slow
def test_a_checkpoint_holds_nothing_of_the_dataset_and_needs_the_steps_beside_it(offline, tmp_path):
    trained(offline, "online.steps=40", at=tmp_path)
    (newest, _) = find_checkpoints("auto", checkpoint_folders(tmp_path, [0]))[0]
    assert newest.stat().st_size < 60_000  # the dataset's 796 transitions alone are 25,472 bytes more than half of that
    (tmp_path / "online/seed-0.steps").unlink()
    line = refused("iql_finetune.py", "resume=auto", f"run_dir={tmp_path}", "online.steps=60", cwd=tmp_path)
    assert "counts on 40 steps of the environments" in line and "has 0" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("kill", "ended by SIGKILL"),
        ("not_a_number", "NaN or infinite"),
        ("raise", "unstable"),
        ("hang", "did not answer for 2 s"),
    ],
)
def test_a_simulator_that_fails_is_replaced_and_the_step_left_out(offline, tmp_path, monkeypatch, how, told):
    left = tmp_path / "left"
    left.write_text("0")
    name = (f"env.name={FAILING}", f"env.kwargs={{how:{how},left:{left}}}")
    options, step, data, interaction = built(
        offline, *name, "online.steps=150", "online.num_envs=2", "online.timeout=2"
    )
    said = []
    monkeypatch.setattr(interaction, "_say", said.append)
    run_ = Run(step, data, options, None, interaction=interaction, quiet=True)
    left.write_text("1")
    interaction.advance(40 + 149, run_.policies, [0])
    assert interaction.environment_steps == 150 and interaction.summary()["simulator_failures"] == 1
    assert len(said) == 1 and told in said[0] and "begun anew" in said[0]
    # In a process both environments are lost, a NaN is that of one alone.
    assert step.buffer.sampler.added == 150 - (1 if how == "not_a_number" else 2)
    stored = step.buffer.storage._storage[len(data.training) :][: step.buffer.sampler.added]
    assert all(bool(torch.isfinite(value).all()) for value in stored.values(True, True))
    run_.close()


@pytest.mark.slow
def test_simulators_that_fail_again_and_again_end_the_run_with_its_last_checkpoint_named(
    offline, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    left = tmp_path / "left"
    left.write_text("0")
    arguments = [
        f"checkpoint={offline / 'run'}",
        *SMALL,
        f"env.name={FAILING}",
        "eval.timeout=20",
        "eval.interval=100000",
    ]
    arguments += [f"env.kwargs={{how:raise,left:{left}}}", "online.steps=100000", "run_dir=failing"]
    process = start("iql_finetune.py", *arguments, cwd=tmp_path)
    wait_for_rows(tmp_path / "failing/metrics.csv", 4)
    left.write_text("1000000")
    code, _, error = finish(process)
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 4 and "Traceback" not in error
    assert "3 times without an episode" in line and "resume=auto run_dir=" in line


@pytest.mark.slow
def test_nothing_is_compiled_again_as_transitions_are_added(offline):
    torch._dynamo.reset()
    options, step, data, interaction = built(offline, "online.steps=30", "train.compile=true")
    run_ = Run(step, data, options, None, interaction=interaction, quiet=True)
    first = None
    for _ in run_.updates():
        first = first or step._update_at
        assert step._update_at is first and step.compiled
    assert step.buffer.sampler.added == 30
    run_.close()


@pytest.mark.slow
def test_several_seeds_start_from_their_own_checkpoints_and_keep_their_own_transitions(offline, tmp_path):
    run("iql_offline.py", *on_log(offline), *SMALL, "train.steps=20", "train.num_seeds=2", "run_dir=two", cwd=tmp_path)
    both = trained(tmp_path, f"checkpoint={tmp_path / 'two'}", "train.num_seeds=2", "online.steps=30")
    alone = trained(tmp_path, f"checkpoint={tmp_path / 'two'}", "train.seed=1", "online.steps=30")
    start_ = len(both.data.training)
    own = [
        storage[start_ + index * 30 : start_ + (index + 1) * 30]
        for index, storage in ((0, both.step.buffers[0].storage._storage), (1, both.step.buffers[1].storage._storage))
    ]
    assert not torch.equal(own[0]["observation"], own[1]["observation"])
    # A seed's transitions and networks are those that it has alone, bit for bit.
    expected = alone.step.buffer.storage._storage[start_ : start_ + 30]
    for name in ("observation", "action", ("next", "reward"), ("next", "observation")):
        assert torch.equal(own[1][name], expected[name])
    assert same(alone.step.state_dict()["loss"], both.step.state_dict(1)["loss"])


def test_the_paper_keeps_the_learning_rate_and_corl_goes_on_along_the_cosine(offline):
    for protocol in ("paper", "corl"):
        options, step, data, interaction = built(offline, f"online.protocol={protocol}", "online.steps=30")
        run_ = Run(step, data, options, None, interaction=interaction, quiet=True)
        found = [step.learning_rates["actor"] for _ in run_.updates()]
        run_.close()
        if protocol == "paper":
            assert set(found) == {float(np.float32(3e-4))}
            continue
        adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 40)
        expected = []
        for _ in range(70):
            expected.append(schedule.get_last_lr()[0])
            adam.step()
            schedule.step()
        np.testing.assert_allclose(found, expected[40:], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["online.sample_actions=false"], "explores nothing"),
        (["online.anneal_to=0.1"], "needs online.offline_fraction"),
        (["online.warmup_steps=10", "online.steps=10"], "no update would be done"),
        (["online.num_envs=3", "online.steps=10"], "multiples of online.num_envs=3"),
        (["online.protocol=papr"], "did you mean 'paper'"),
        (["train.updates_per_call=2", "train.steps=2"], "must divide"),
        (["checkpoint=/nowhere"], "checkpoint=/nowhere does not exist"),
        (["online.stepz=3"], "online.steps"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        options_of(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.name=null"], "needs an environment"),
        (["online.offline_fraction=0"], "online.warmup_steps must be at least 1"),
        (["online.steps=1000000000000"], "GB of memory are available"),
    ],
)
def test_what_does_not_suit_the_data_is_refused_before_anything_starts(offline, overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        built(offline, *overrides)


def test_a_policy_that_gives_no_numbers_ends_the_run_before_it_acts(offline):
    _, step, data, interaction = built(offline, "online.steps=30")
    policy = Policy.from_loss(step.loss, data.spaces.action_low, data.spaces.action_high)
    with torch.no_grad():
        step._state["actor"].fill_(float("nan"))
    with pytest.raises(DivergenceError, match="policy of seed 0 gives nan for an action after 0 steps"):
        interaction.advance(40, [policy], [0])
    assert interaction.environment_steps == 0
    interaction.close()


@pytest.mark.slow
def test_a_seed_that_diverges_online_stops_and_the_others_go_on(offline, tmp_path):
    options, step, data, interaction = built(offline, "online.steps=60", "train.num_seeds=2", at=tmp_path)
    run_ = Run(step, data, options, tmp_path, interaction=interaction, quiet=True)
    for losses in run_.updates():
        if run_.count == 63:
            for parameter in step.losses[0].parameters():
                parameter.data.fill_(float("nan"))
        run_.evaluate_when_due()
        run_.log_when_due(losses)
        run_.save_when_due()
    run_.finish()
    ((diverged,), added) = run_.diverged, [buffer.sampler.added for buffer in step.buffers]
    assert (diverged.seed, run_.count, added) == (0, 100, [23, 60])
    assert {row["seed"] for row in rows(tmp_path / "eval.csv") if int(row["step"]) > 60} == {"1"}

    # And one that goes on leaves it where it was.
    out = run("iql_finetune.py", "resume=auto", "online.steps=80", f"run_dir={tmp_path}", cwd=tmp_path)
    assert "seed 0 had diverged" in out
    assert [int(row["step"]) for row in rows(tmp_path / "eval.csv") if row["seed"] == "1"] == [40, 60, 80, 100, 120]


def test_exploring_leaves_the_generator_of_the_process_alone_and_depends_on_the_seed(offline):
    _, step, data, interaction = built(offline, "online.steps=30")
    interaction.close()
    policy = Policy.from_loss(step.loss, data.spaces.action_low, data.spaces.action_high)
    observation, before = np.zeros((3, 3), np.float32), torch.get_rng_state()
    one, again, other = (policy.explore(observation, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(one, again)
    assert (one != other).all() and len(np.unique(one)) == 3 and (abs(one) <= 2).all()
    np.testing.assert_array_equal(policy.explore(observation, 1, sample=False), policy(observation))
    noisy = np.concatenate([policy.explore(observation, seed, sample=False, noise=0.1) for seed in range(200)])
    # In [-1, 1], of which Pendulum's actions are twice: a standard deviation of 0.2, within four of its own.
    assert abs((noisy - policy(observation)[:1]).std() - 0.2) < 4 * 0.2 / (2 * 600) ** 0.5


def test_a_checkpoint_of_other_networks_is_refused(offline):
    with pytest.raises(ValueError, match=r"hidden_dims is \[16, 16\] there and \[8, 8\] here"):
        built(offline, "algorithm.hidden_dims=[8,8]")


def test_a_run_of_another_recipe_is_not_gone_on_with(offline, tmp_path):
    with pytest.raises(ConfigurationError, match=r"of another recipe, with options .* \(rlinf\)"):
        options_of("resume=auto", folder=offline / "run")
    trained(offline, "online.steps=10", at=tmp_path)
    with initialised(), pytest.raises(ConfigurationError, match=r"iql_offline does not have \(online\)"):
        compose("iql_offline", ["resume=auto"], OfflineOptions, folder=tmp_path)


def test_the_protocol_sets_what_neither_the_command_line_nor_the_checkpoint_of_a_run_does(offline):
    found = options_of(f"checkpoint={offline / 'run'}", "online.protocol=rlpd", "online.updates_per_step=2")
    assert (found.online.offline_fraction, found.online.warmup_steps, found.online.updates_per_step) == (0.5, 5000, 2)
    assert found.dataset.path.endswith("log.hdf5") and found.env.name == "Pendulum-v1"
    assert found.algorithm.opt_decay_schedule is None and found.algorithm.batch_size == 32
