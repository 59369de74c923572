"""Every preset, RLinf-named config and imported file trains on a small dataset of its domain's shape."""

import json
import re

import gymnasium
import h5py
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from processes import SMALL, refused, rows, run

from iql_torchrl import load_policy

SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6), "antmaze": (29, 8), "kitchen": (60, 9), "pen": (45, 24)}
TINY = tuple(option for option in SMALL if not option.startswith("eval.episodes"))


@pytest.fixture
def d4rl_file(tmp_path):
    """A log of a D4RL dataset's shape: three episodes of 40 rows, the first of which terminates."""

    def make(name):
        observation_dim, action_dim = SIZES[name.split("-")[0]]
        random = np.random.default_rng(0)
        path = tmp_path / f"{name}.hdf5"
        ends = np.zeros((2, 120), dtype=bool)
        ends[0, 39] = ends[1, 79] = ends[1, 119] = True
        with h5py.File(path, "w") as file:
            file["observations"] = random.normal(size=(120, observation_dim)).astype(np.float32)
            file["actions"] = random.uniform(-1, 1, size=(120, action_dim)).astype(np.float32)
            file["rewards"] = random.random(size=120).astype(np.float32)
            file["terminals"], file["timeouts"] = ends
        return path

    return make


def trained(tmp_path, *options):
    """A run of 20 updates: its configuration and summary, after checking what it left behind."""
    folder = tmp_path / "run"
    # Hydra wants its own options before the overrides.
    out = run("iql_offline.py", *options, *TINY, "train.steps=20", f"run_dir={folder}", cwd=tmp_path)
    assert (folder / "curves.png").stat().st_size > 0
    last = rows(folder / "metrics.csv")[-1]
    assert int(last["step"]) == 20
    assert all(np.isfinite(float(last[key])) for key in ("loss_actor", "loss_qvalue", "loss_value", "entropy"))
    return OmegaConf.load(folder / "config.yaml"), json.loads((folder / "summary.json").read_text()), out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "name", "expected"),
    [
        ("locomotion", "hopper-medium-v2", (0.7, 3.0, None, "return_range", 10)),
        ("antmaze", "antmaze-umaze-v2", (0.9, 10.0, None, "minus_one", 100)),
        ("kitchen_adroit", "kitchen-partial-v0", (0.7, 0.5, 0.1, "none", 10)),
    ],
)
def test_each_preset_trains_on_data_of_its_domain(tmp_path, d4rl_file, algorithm, name, expected):
    url = f"dataset.url={d4rl_file(name).as_uri()}"
    options = ("dataset=d4rl", f"dataset.name={name}", url, f"dataset.root={tmp_path / 'cache'}", "env.name=null")
    config, summary, _ = trained(tmp_path, *options, f"algorithm={algorithm}")
    preset = config.algorithm
    found = (preset.expectile, preset.temperature, preset.dropout_rate, preset.reward_transform, config.eval.episodes)
    assert found == expected
    assert summary["transitions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config_name", "name", "expected"),
    [
        ("d4rl_iql_mujoco", "halfcheetah-medium-v2", (0.7, 3.0, None)),
        ("d4rl_iql_antmaze", "antmaze-large-play-v0", (0.9, 10.0, None)),
        ("d4rl_iql_kitchen_adroit", "kitchen-partial-v0", (0.7, 0.5, 0.1)),
    ],
)
def test_each_config_with_a_name_of_rlinf_trains_its_own_dataset(tmp_path, d4rl_file, config_name, name, expected):
    url = f"dataset.url={d4rl_file(name).as_uri()}"
    cache = f"dataset.root={tmp_path / 'cache'}"
    config, _, out = trained(tmp_path, "--config-name", config_name, url, cache, "env.name=null")
    assert name in out
    algorithm = config.algorithm
    assert (algorithm.expectile, algorithm.temperature, algorithm.dropout_rate) == expected
    assert (algorithm.variant, algorithm.policy, algorithm.extra_actor_layer) == ("rlinf", "tanh_normal", True)


@pytest.mark.slow
def test_another_dataset_is_named_by_rlinfs_own_key(tmp_path, d4rl_file):
    url, cache = f"dataset.url={d4rl_file('pen-human-v1').as_uri()}", f"dataset.root={tmp_path / 'cache'}"
    options = ("--config-name=d4rl_iql_kitchen_adroit", "env.train.env_name=pen-human-v1", url, cache, "env.name=null")
    assert "pen-human-v1" in trained(tmp_path, *options)[2]


RLINF_FILE = {
    "defaults": ["env/d4rl@env.eval", {"override hydra/job_logging": "stdout"}],
    "hydra": {"run": {"dir": "."}},
    "runner": {
        "task_type": "offline",
        "max_steps": 20,
        "save_interval": -1,
        "val_check_interval": 10,
        "eval_episodes": 1,
    },
    "data": {"dataset_type": "d4rl", "task_name": "hopper-medium-v2", "dataset_path": None, "seed": 3},
    "algorithm": {"loss_type": "offline_iql", "hidden_dims": [16, 16], "tau": 0.01, "expectile": 0.8, "gamma": 0.98},
    "actor": {
        "seed": 7,
        "global_batch_size": 16,
        "offline_torch_compile": False,
        "optim": {"lr": 1e-4, "adam_beta1": 0.9},
        "critic_optim": {"lr": 2e-4},
        "value_optim": {"lr": "${actor.optim.lr}"},
        "model": {
            "iql_config": {
                "type": "actor",
                "hidden_dims": "${algorithm.hidden_dims}",
                "dropout_rate": 0.2,
                "state_dependent_std": True,
                "log_std_min": -4.0,
                "log_std_max": 1.0,
            }
        },
    },
}


def rlinf_file(folder, **changes):
    content = json.loads(json.dumps(RLINF_FILE))
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        section = content
        for name in sections:
            section = section[name]
        section[leaf] = value
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_file_of_rlinfs_repository_sets_the_options_it_has_and_names_the_rest(tmp_path, d4rl_file):
    file = rlinf_file(tmp_path)
    folder = tmp_path / "run"
    options = (f"dataset.url={d4rl_file('hopper-medium-v2').as_uri()}", f"dataset.root={tmp_path / 'cache'}")
    out = run(
        "iql_offline.py",
        f"rlinf={file}",
        *options,
        "env.name=null",
        "eval.episodes=2",
        f"run_dir={folder}",
        cwd=tmp_path,
    )
    ignored = "actor.model.iql_config.type, runner.task_type"
    assert f"rlinf={file}: keys without meaning here: {ignored}\n" in out
    config = OmegaConf.load(folder / "config.yaml")
    algorithm = config.algorithm
    assert (algorithm.variant, algorithm.policy, algorithm.standard_deviation) == (
        "rlinf",
        "tanh_normal",
        "state_dependent",
    )
    assert (algorithm.actor_lr, algorithm.value_lr, algorithm.critic_lr) == (1e-4, 1e-4, 2e-4)
    assert (algorithm.discount, algorithm.tau, algorithm.expectile, algorithm.dropout_rate) == (0.98, 0.01, 0.8, 0.2)
    assert (algorithm.batch_size, algorithm.hidden_dims, algorithm.log_std_bounds) == (16, [16, 16], [-4.0, 1.0])
    assert algorithm.reward_transform == "return_range"
    assert (config.train.steps, config.train.seed, config.train.compile) == (20, 7, False)
    assert (config.checkpoint.interval, config.eval.interval) == (20, 10)
    assert config.eval.episodes == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__dataset_type": "lerobot"}, "data.dataset_type is lerobot; only d4rl"),
        ({"data__task_name": None}, "none of data.task_name, .* names a dataset"),
        ({"actor__optim": {"adam_beta1": 0.5}}, "actor.optim.adam_beta1 is 0.5; only 0.9"),
        ({"algorithm__hidden_dims": "${nowhere.at.all}"}, "algorithm.hidden_dims cannot be resolved"),
        ({"actor__model__iql_config__hidden_dims": [8]}, r"hidden_dims is \[16, 16\] but .* is \[8\]"),
        ({"algorithm__expectile": 1.5}, r"algorithm.expectile must be a number in \(0, 1\], got 1.5"),
    ],
)
def test_a_file_of_rlinf_that_cannot_be_run_is_refused_by_key(tmp_path, changes, message):
    file = rlinf_file(tmp_path, **changes)
    assert re.search(message, refused("iql_offline.py", f"rlinf={file}", cwd=tmp_path))


def test_a_missing_or_damaged_file_of_rlinf_is_refused_by_name(tmp_path):
    assert "nowhere.yaml is not a file" in refused("iql_offline.py", "rlinf=nowhere.yaml", cwd=tmp_path)
    (tmp_path / "bad.yaml").write_text("runner: [1,\n")
    assert "bad.yaml cannot be read as YAML" in refused("iql_offline.py", "rlinf=bad.yaml", cwd=tmp_path)


def test_a_misspelt_config_name_gets_the_nearest(tmp_path):
    message = refused("iql_offline.py", "--config-name", "d4rl_iql_mujocco", cwd=tmp_path)
    assert message.endswith("unknown --config-name d4rl_iql_mujocco; did you mean 'd4rl_iql_mujoco'?")


# ---------------------------------------------------------------------------------------------- discrete actions


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """CartPole-v1 under a policy that pushes towards the pole's fall three times in five."""
    environment, random = gymnasium.make("CartPole-v1"), np.random.default_rng(0)
    log = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for episode in range(60):
        observation, _ = environment.reset(seed=episode)
        ended = False
        while not ended:
            good = int(observation[2] + observation[3] > 0)
            action = good if random.random() < 0.6 else 1 - good
            following, reward, terminated, truncated, _ = environment.step(action)
            for key, value in zip(log, (observation, action, reward, terminated, truncated), strict=True):
                log[key].append(value)
            observation, ended = following, terminated or truncated
    path = tmp_path_factory.mktemp("cartpole") / "cartpole.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.array(log["observations"], dtype=np.float32)
        file["actions"] = np.array(log["actions"])
        file["rewards"] = np.array(log["rewards"], dtype=np.float32)
        file["terminals"], file["timeouts"] = np.array(log["terminals"]), np.array(log["timeouts"])
        file.attrs["env_id"] = "CartPole-v1"
    return path


@pytest.mark.slow
def test_a_discrete_run_learns_more_than_its_data_and_its_policy_loads(tmp_path, cartpole):
    folder = tmp_path / "run"
    rates = [f"algorithm.{name}_lr=1e-3" for name in ("actor", "value", "critic")]
    options = ("algorithm.hidden_dims=[64,64]", "algorithm.reward_transform=none", "train.steps=1000", *rates)
    run(
        *("iql_offline.py", "dataset=hdf5", f"dataset.path={cartpole}", *options, "train.compile=false"),
        *("eval.episodes=5", f"run_dir={folder}"),
        cwd=tmp_path,
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["final_score"] > 2 * summary["data_score"]
    (checkpoint,) = (folder / "checkpoints").glob("step-*.pt")
    policy = load_policy(checkpoint)
    action = policy(np.zeros((3, 4), dtype=np.float32))
    assert action.dtype == np.int64 and action.shape == (3,) and set(action) <= {0, 1}
    assert policy(np.zeros(4, dtype=np.float32)).shape == ()
    out = run("evaluate.py", f"checkpoint={checkpoint}", "episodes=2", cwd=tmp_path)
    assert "in CartPole-v1" in out


@pytest.mark.slow
def test_a_discrete_run_without_a_simulator_takes_the_number_of_actions_from_the_data(tmp_path, cartpole):
    options = ("dataset=hdf5", f"dataset.path={cartpole}", "env.name=null", "algorithm.variant=corl")
    _, summary, _ = trained(tmp_path, *options)
    assert np.isfinite(summary["validation_log_prob"])


def test_discrete_actions_that_the_environment_does_not_have_are_refused(tmp_path, cartpole):
    with h5py.File(cartpole) as source, h5py.File(tmp_path / "three.hdf5", "w") as file:
        for key in source:
            file[key] = source[key][()]
        file["actions"][10] = 2
    message = refused("iql_offline.py", "dataset=hdf5", "dataset.path=three.hdf5", "env.name=CartPole-v1", cwd=tmp_path)
    assert "action 2 in transition" in message and "CartPole-v1's actions, 0 to 1" in message
