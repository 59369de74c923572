"""Runs that start from networks: of another run, or of another code base."""

import numpy as np
import pytest
import torch
from problems import write_pendulum
from processes import SMALL, refused, rows, run
from torch import nn

from iql_torchrl import load_policy, train
from iql_torchrl.data.sources import HDF5
from iql_torchrl.errors import CheckpointError
from iql_torchrl.training.checkpoints import load_checkpoint

CORL = ("algorithm.variant=corl", "algorithm.normalise_observations=true")
# One update that changes nothing but the targets, and these as little as it may.
STILL = {"algorithm.actor_lr": 0.0, "algorithm.value_lr": 0.0, "algorithm.critic_lr": 0.0, "algorithm.tau": 1e-9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A log, a run on it, and a checkpoint of CORL's for the same environment, with its own config.yaml beside."""
    folder = tmp_path_factory.mktemp("starting")
    write_pendulum(folder / "log.hdf5")
    run("iql_offline.py", *on_log(folder), *SMALL, "train.steps=40", "run_dir=run", cwd=folder)
    (folder / "corl").mkdir()
    corl(folder / "corl" / "checkpoint_99.pt")
    (folder / "corl" / "config.yaml").write_text("env: pendulum\nseed: 0\n")
    return folder


def on_log(folder):
    return ["dataset=hdf5", f"dataset.path={folder / 'log.hdf5'}", "env.name=Pendulum-v1"]


def corl(path, widths=(16, 16)):
    """What CORL saves of networks for 3 observations and 1 action, and the actor."""
    torch.manual_seed(7)

    def network(inputs, *last):
        sizes, layers = (inputs, *widths), []
        for into, out in zip(sizes, widths, strict=False):
            layers += [nn.Linear(into, out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1), *last)

    def state(module, prefix):
        return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}

    actor, one, two = network(3, nn.Tanh()), network(4), network(4)
    content = {
        "actor": {**state(actor, "net.net"), "log_std": torch.tensor([0.3])},
        "qf": {**state(one, "q1.net"), **state(two, "q2.net")},
        "vf": state(network(3), "v.net"),
        "total_it": 100,
    }
    torch.save(content, path)
    return actor, (one, two)


def still_run(folder, start, **options):
    given = {option.split("=")[0]: _value(option.split("=")[1]) for option in SMALL}
    given |= {"checkpoint.start": str(start), **STILL, **options}
    return train(HDF5(path=str(folder / "log.hdf5")), environment="Pendulum-v1", steps=1, quiet=True, options=given)


def _value(text):
    return {"[16,16]": [16, 16], "false": False}.get(text, int(text) if text.isdigit() else text)


def test_a_run_starts_from_corls_networks_and_acts_as_they_do(folder, tmp_path):
    actor, critics = corl(tmp_path / "checkpoint_9.pt")
    made = still_run(folder, tmp_path / "checkpoint_9.pt", **{"algorithm.variant": "corl"})
    raw = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    normalised = (torch.from_numpy(raw) - made.data.normaliser.mean) / made.data.normaliser.std
    with torch.no_grad():
        expected = (2 * actor(normalised)).clamp(-2, 2)
        torch.testing.assert_close(torch.from_numpy(made.policy(raw)), expected, rtol=0, atol=1e-6)
        # Actions of the buffer are in [-1, 1], those that CORL's critics have learnt from in [-2, 2].
        batch = made.data.training[:20]
        found = made.step.loss.target_qvalue(batch)
        both = torch.cat([batch["observation"], 2 * batch["action"]], -1)
        expected = torch.minimum(*(critic(both) for critic in critics)).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert made.step.count == 1


def test_actions_that_the_data_have_in_the_unit_box_are_not_rescaled_for_the_critics(folder, tmp_path):
    _, critics = corl(tmp_path / "checkpoint_9.pt")
    import h5py

    log = tmp_path / "log.hdf5"
    log.write_bytes((folder / "log.hdf5").read_bytes())
    with h5py.File(log, "r+") as file:
        file["actions"][...] = file["actions"][()] / 2
    options = {"algorithm.variant": "corl", "dataset.normalised_actions": True}
    (tmp_path / "scaled").mkdir()
    log.rename(tmp_path / "scaled" / "log.hdf5")
    made = still_run(tmp_path / "scaled", tmp_path / "checkpoint_9.pt", **options)
    batch = made.data.training[:20]
    both = torch.cat([batch["observation"], batch["action"]], -1)
    with torch.no_grad():
        expected = torch.minimum(*(critic(both) for critic in critics)).squeeze(-1)
        torch.testing.assert_close(made.step.loss.target_qvalue(batch), expected, rtol=0, atol=1e-5)


def test_a_run_starts_from_another_runs_networks_and_counts_anew(folder):
    made = still_run(folder, folder / "run")
    before = load_policy(folder / "run" / "checkpoints" / "step-00000040.pt")
    raw = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.testing.assert_array_equal(made.policy(raw), before(raw))
    assert made.step.count == 1
    moments = load_checkpoint(folder / "run" / "checkpoints" / "step-00000040.pt")["training"]["optimizers"]["actor"]
    torch.testing.assert_close(made.step.state_dict()["optimizers"]["actor"]["step"], moments["step"] + 1)


@pytest.mark.slow
def test_the_recipes_start_from_corl_offline_and_online(folder, tmp_path):
    start = f"checkpoint={folder / 'corl' / 'checkpoint_99.pt'}"
    options = (start, *on_log(folder), *CORL, *SMALL)
    run("iql_offline.py", *options, "train.steps=20", "run_dir=offline", cwd=tmp_path)
    assert [row["step"] for row in rows(tmp_path / "offline" / "eval.csv")] == ["20"]
    # Resumed, it goes on from its own checkpoint, and needs the other one no more.
    kept = (folder / "corl" / "checkpoint_99.pt").rename(tmp_path / "kept.pt")
    out = run("iql_offline.py", "resume=offline", "train.steps=40", cwd=tmp_path)
    assert "resumed from" in out and "at step 20" in out
    kept.rename(folder / "corl" / "checkpoint_99.pt")
    run("iql_finetune.py", *options, "online.steps=20", "run_dir=online", cwd=tmp_path)
    found = rows(tmp_path / "online" / "eval.csv")
    assert [(row["step"], row["phase"]) for row in found] == [("100", "offline"), ("120", "online")]
    # A run that started so is a run: its folder is enough.
    run("iql_finetune.py", "checkpoint=offline", "online.steps=10", "run_dir=again", cwd=tmp_path)
    assert [row["step"] for row in rows(tmp_path / "again" / "eval.csv")] == ["40", "50"]


def test_networks_of_other_sizes_are_refused_with_what_differs(folder, tmp_path):
    corl(tmp_path / "wide.pt", widths=(24, 16))
    with pytest.raises(CheckpointError, match=r"hidden_dims is \[24, 16\] there and \[16, 16\] here"):
        still_run(folder, tmp_path / "wide.pt", **{"algorithm.variant": "corl"})
    with pytest.raises(CheckpointError, match=r"log_std_bounds is \[-20.0, 2.0\] there and \[-5.0, 2.0\] here"):
        still_run(folder, folder / "corl" / "checkpoint_99.pt")
    with pytest.raises(CheckpointError, match="activation is 'relu' there and 'tanh' here"):
        options = {"algorithm.variant": "corl", "algorithm.activation": "tanh"}
        still_run(folder, folder / "corl" / "checkpoint_99.pt", **options)


@pytest.mark.parametrize(
    ("start", "more", "expected"),
    [
        ("none.pt", (), "checkpoint=none.pt does not exist"),
        ("foreign.pt", (), "has no config.yaml of a run, neither in it nor around it"),
        ("foreign.pt", ("dataset=embedded",), "holds none of the networks that are known (weights)"),
        ("text.pt", ("dataset=embedded",), "is truncated, or no checkpoint of iql_torchrl at all"),
        ("empty", ("dataset=embedded",), "checkpoint=empty has no checkpoint of seed 0"),
    ],
)
def test_what_nothing_can_start_from_is_refused_in_one_line(start, more, expected, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    assert expected in refused("iql_offline.py", f"checkpoint={start}", *more, *SMALL, "train.steps=10", cwd=tmp_path)


def test_a_run_starts_from_a_folder_of_the_jax_code(folder, tmp_path):
    msgpack = pytest.importorskip("msgpack", reason="needs the extra msgpack")
    generator = np.random.default_rng(0)

    def dense(into, out):
        return {"kernel": generator.normal(size=(into, out)).astype("f"), "bias": np.zeros(out, "f")}

    def network(inputs, *last):
        return {f"Dense_{index}": dense(*sizes) for index, sizes in enumerate([(inputs, 16), (16, 16), *last])}

    mean = dense(16, 1)
    trees = {
        "actor": {"MLP_0": (body := network(3)), "Dense_0": mean, "log_stds": np.zeros(1, "f")},
        "critic": {f"Critic_{index}": {"MLP_0": network(4, (16, 1))} for index in (0, 1)},
        "value": {"MLP_0": network(3, (16, 1))},
    }
    (tmp_path / "saved").mkdir()
    for name, tree in trees.items():
        pack = {"default": lambda one: msgpack.ExtType(1, msgpack.packb((one.shape, one.dtype.name, one.tobytes())))}
        (tmp_path / "saved" / name).write_bytes(msgpack.packb(tree, **pack))
    made = still_run(folder, tmp_path / "saved")
    x = raw = generator.normal(size=(20, 3)).astype(np.float32)
    for layer in body.values():
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    expected = np.clip(2 * np.tanh(x @ mean["kernel"] + mean["bias"]), -2, 2)
    np.testing.assert_allclose(made.policy(raw), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("extraction", ["ddpgbc", "flow", "diffusion"])
def test_networks_of_another_code_base_are_of_the_paper_s_extraction(folder, extraction):
    expected = rf"checkpoint_99.pt is of algorithm.extraction=awr, and this run is of {extraction}; set that to awr"
    with pytest.raises(CheckpointError, match=expected):
        still_run(folder, folder / "corl" / "checkpoint_99.pt", **{"algorithm.extraction": extraction})
