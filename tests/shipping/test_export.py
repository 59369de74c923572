"""Files that act without this package: what they do, what they tell, and what is refused."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from problems import ACTION_DIM, OBSERVATION_DIM
from processes import ROOT, refused, run

from iql_torchrl import IQLLoss, build_qvalues, build_value
from iql_torchrl.data.normalisation import ObservationNormaliser
from iql_torchrl.errors import CheckpointError, ConfigurationError, ExportError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.networks import build_actor, build_diffusion_actor, build_discrete_actor, build_flow_actor
from iql_torchrl.objectives import DiffusionLoss, FlowLoss
from iql_torchrl.shipping import files
from iql_torchrl.shipping.export import export_policy
from iql_torchrl.shipping.verifying import largest_differences
from iql_torchrl.training.checkpoints import save_checkpoint

onnx = pytest.importorskip("onnx", reason="needs the extra export")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
FINGERPRINT = "0123456789abcdef"
POLICIES = {
    "tanh_mean_normal": {"dropout": 0.5, "layer_norm": True, "activation": "gelu"},
    "tanh_normal": {"standard_deviation": "biased_softplus"},
    "normal": {"standard_deviation": "state_dependent", "extra_layer": True, "activation": "elu"},
    "deterministic": {"activation": "silu"},
    "categorical": {"activation": "tanh"},
}


def normaliser():
    return ObservationNormaliser(torch.arange(1.0, 6.0), torch.tensor([1e-3, 1.0, 2.0, 3.0, 50.0]))


def write_checkpoint(folder, policy="tanh_mean_normal", *, normalised=True, change=lambda actor: None, **options):
    """A checkpoint with a policy of random weights, ``[16, 16]`` wide."""
    torch.manual_seed(0)
    architecture = {"observation_dim": OBSERVATION_DIM, "hidden_dims": [16, 16], **POLICIES[policy], **options}
    discrete = policy == "categorical"
    architecture |= {"num_actions": 3} if discrete else {"action_dim": ACTION_DIM, "policy": policy}
    actor = (build_discrete_actor if discrete else build_actor)(**architecture)
    change(actor)
    bounds = (torch.empty(0), torch.empty(0)) if discrete else (LOW, HIGH)
    built = Policy(actor, *bounds, normaliser() if normalised else None)
    environment = {"name": "Hopper-v5", "kwargs": {"max_episode_steps": 7}, "layout": "flat"}
    content = {
        "training": {"loss": {}},
        "policy": built.state_dict(architecture),
        "architecture": architecture,
        "config": {},
        "dataset_fingerprint": FINGERPRINT,
        "environment": environment if normalised else None,
    }
    return save_checkpoint(folder / "checkpoints", 70, content), built


DRAWING = {
    "tanh_mean_normal": (IQLLoss, build_actor, {"policy": "tanh_mean_normal", "layer_norm": True}),
    "tanh_normal": (IQLLoss, build_actor, {"policy": "tanh_normal", "standard_deviation": "biased_softplus"}),
    "flow": (FlowLoss, build_flow_actor, {"flow_steps": 4, "activation": "gelu"}),
    "diffusion": (DiffusionLoss, build_diffusion_actor, {"residual_blocks": 1, "dropout": 0.2}),
}


@pytest.fixture
def drawing(tmp_path):
    """A checkpoint with a policy that chooses among draws, and the policy."""

    def write(kind, **choice):
        torch.manual_seed(0)
        loss, build, options = DRAWING[kind]
        sizes = {"observation_dim": OBSERVATION_DIM, "hidden_dims": [16, 16]}
        architecture = {**sizes, "action_dim": ACTION_DIM, **options}
        of_critics = {key: value for key, value in options.items() if key in ("layer_norm", "activation")}
        critics = build_qvalues(action_dim=ACTION_DIM, **sizes, **of_critics), build_value(**sizes, **of_critics)
        policy = Policy.from_loss(loss(build(**architecture), *critics), LOW, HIGH, normaliser(), **choice)
        architecture |= {"extraction": kind} if kind in ("flow", "diffusion") else {}
        content = {
            "training": {"loss": {}},
            "policy": policy.state_dict(architecture),
            "architecture": architecture,
            "config": {},
            "dataset_fingerprint": FINGERPRINT,
            "environment": None,
        }
        return save_checkpoint(tmp_path / "checkpoints", 70, content), policy

    return write


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def act(path, observation, *noise):
    """What a user of the file does."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(*map(torch.from_numpy, (observation, *noise))).numpy()
    inputs = dict(zip(("observation", "noise"), (observation, *noise), strict=False))
    return session(path).run(["action"], inputs)[0]


def observations(count, scale=1.0, *, normalised=True):
    normals = scale * np.random.default_rng(count).normal(size=(count, OBSERVATION_DIM))
    return (normaliser().mean.numpy() + normaliser().std.numpy() * normals if normalised else normals).astype("float32")


# ------------------------------------------------------------------------------------------------- what a file does


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", POLICIES)
def test_a_file_acts_as_its_checkpoint_in_batches_of_any_size(kind, normalised, suffix, tmp_path):
    path, policy = write_checkpoint(tmp_path, kind, normalised=normalised)
    written = export_policy(path, tmp_path / f"policy{suffix}")
    assert written.path == tmp_path / f"policy{suffix}"
    assert set(written.differences) == {"zeros", "data", "1e3", "1e6"} and written.differences["data"] < 1e-5
    assert written.differences["1e6"] < 2e-6  # where a tanh is at its bound, and squashed Normals 1e-6 before it
    for count in (1, 2, 3, 50, 1000):
        observation = observations(count, normalised=normalised)
        expected, found = policy(observation), act(written.path, observation)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("kind", DRAWING)
def test_a_file_chooses_among_the_draws_that_it_is_given_as_its_checkpoint_does(kind, suffix, drawing, tmp_path):
    path, policy = drawing(kind, num_samples=4)
    written = export_policy(path, tmp_path / f"policy{suffix}")
    assert written.metadata["noise_shape"] == [4, 5 if kind == "diffusion" else 1, ACTION_DIM]
    assert written.metadata["policy"] == kind
    for count in (1, 2, 50):
        observation = observations(count)
        noise, _ = policy.chooser.noise_for(observation, 0)
        found = act(written.path, observation, noise.numpy())
        expected = policy(observation)
        assert found.dtype == expected.dtype
        close = np.isclose(found, expected, rtol=0, atol=5e-5).all(-1)
        assert close.mean() > 0.95  # where two draws have the same Q but for rounding, either is the best
    assert not np.allclose(act(written.path, observation, -noise.numpy()), expected)


def test_a_file_takes_as_many_draws_as_asked_for(drawing, tmp_path):
    path, _ = drawing("flow")
    assert export_policy(path, tmp_path / "policy.pt2").metadata["noise_shape"] == [32, 1, ACTION_DIM]
    written = export_policy(path, tmp_path / "policy.onnx", num_samples=1)
    assert written.metadata["noise_shape"] == [1, 1, ACTION_DIM]
    _, noise = session(written.path).get_inputs()
    assert (noise.name, noise.shape) == ("noise", ["batch", 1, 1, ACTION_DIM])
    path, _ = drawing("tanh_mean_normal")
    assert export_policy(path, tmp_path / "policy.onnx").metadata["noise_shape"] is None
    assert export_policy(path, tmp_path / "policy.onnx", num_samples=3).metadata["noise_shape"] == [3, 1, ACTION_DIM]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_computes_what_the_policy_is_defined_as(suffix, tmp_path):
    path, policy = write_checkpoint(tmp_path, "tanh_mean_normal", layer_norm=False, activation="relu")
    weights = {name: value.double().numpy() for name, value in policy.actor.state_dict().items()}
    layers = sorted({name.rpartition(".")[0] for name in weights if "trunk" in name})
    x = (observations(40).astype(float) - normaliser().mean.numpy()) / normaliser().std.numpy()
    for index, layer in enumerate(layers):
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        x = np.maximum(x, 0) if index < len(layers) - 1 else np.tanh(x)
    expected = np.clip(np.stack([2 * x[:, 0], 5 * (x[:, 1] + 1)], -1), LOW.numpy(), HIGH.numpy())
    found = act(export_policy(path, tmp_path / f"policy{suffix}").path, observations(40))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_actions_are_clipped_to_the_bounds(suffix, tmp_path):
    path, _ = write_checkpoint(tmp_path, "normal", normalised=False)
    found = act(export_policy(path, tmp_path / f"policy{suffix}").path, observations(100, scale=1e4))
    assert (found >= LOW.numpy()).all() and (found <= HIGH.numpy()).all()
    assert (found == HIGH.numpy()).any(0).all() and (found == LOW.numpy()).any(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("opset", range(18, 26))
def test_a_model_is_of_the_opset_that_was_asked_for(opset, tmp_path):
    path, _ = write_checkpoint(tmp_path)
    written = export_policy(path, tmp_path / "policy.onnx", opset=opset)
    model = onnx.load(written.path)
    assert [one.version for one in model.opset_import if not one.domain] == [opset]
    assert act(written.path, observations(3)).shape == (3, ACTION_DIM)


# ------------------------------------------------------------------------------------------------ what a file tells


def metadata_in(path):
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["metadata.json"])
    return {key: json.loads(text) for key, text in session(path).get_modelmeta().custom_metadata_map.items()}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_tells_what_it_was_made_of(suffix, tmp_path):
    path, _ = write_checkpoint(tmp_path)
    written = export_policy(path, tmp_path / f"policy{suffix}")
    found = metadata_in(written.path)
    assert found == written.metadata
    versions = found.pop("versions")
    assert versions["torch"] == torch.__version__ and versions["onnxruntime"] == onnxruntime.__version__
    assert found == {
        "producer": "iql_torchrl",
        "step": 70,
        "dataset_fingerprint": FINGERPRINT,
        "environment": "Hopper-v5",
        "environment_kwargs": {"max_episode_steps": 7},
        "observation_layout": "flat",
        "observation_dim": OBSERVATION_DIM,
        "normalises_observations": True,
        "policy": "tanh_mean_normal",
        "noise_shape": None,
        "num_actions": None,
        "action_low": LOW.tolist(),
        "action_high": HIGH.tolist(),
    }


def test_a_file_of_discrete_actions_without_an_environment_tells_so(tmp_path):
    path, _ = write_checkpoint(tmp_path, "categorical", normalised=False)
    found = metadata_in(export_policy(path, tmp_path / "policy.onnx").path)
    assert found["policy"] == "categorical" and found["num_actions"] == 3
    assert all(found[key] is None for key in ("environment", "observation_layout", "action_low", "action_high"))
    assert found["normalises_observations"] is False


def test_a_model_names_its_input_its_output_and_the_batch(tmp_path):
    path, _ = write_checkpoint(tmp_path)
    found = session(export_policy(path, tmp_path / "policy.onnx").path)
    (observation,), (action,) = found.get_inputs(), found.get_outputs()
    assert (observation.name, observation.shape) == ("observation", ["batch", OBSERVATION_DIM])
    assert (action.name, action.shape) == ("action", ["batch", ACTION_DIM])


# ------------------------------------------------------------------------------------------------- what is verified


@pytest.mark.parametrize("kind", ["tanh_mean_normal", "categorical"])
def test_the_difference_of_another_policy_is_found(kind, tmp_path):
    _, policy = write_checkpoint(tmp_path, kind)
    assert set(largest_differences(policy, policy, OBSERVATION_DIM).values()) == {0.0}
    step = 1 if kind == "categorical" else 1e-3

    def late(observation):  # right for small batches alone
        return policy(observation) + (len(observation) > 100) * np.asarray(step, policy(observation).dtype)

    with pytest.raises(ExportError, match=r"differ from the checkpoint's by up to (0\.001|1) on"):
        largest_differences(late, policy, OBSERVATION_DIM)


def test_actions_of_another_shape_or_type_are_found(tmp_path):
    _, policy = write_checkpoint(tmp_path)
    with pytest.raises(ExportError, match=r"float64 \[1, 2\], the checkpoint's float32 \[1, 2\]"):
        largest_differences(lambda observation: policy(observation).astype(float), policy, OBSERVATION_DIM)
    with pytest.raises(ExportError, match=r"float32 \[1\], the checkpoint's float32 \[1, 2\]"):
        largest_differences(lambda observation: policy(observation)[:, 0], policy, OBSERVATION_DIM)


def test_the_difference_of_another_choice_is_found(drawing):
    _, policy = drawing("flow", num_samples=4)

    def decide(observation, noise):
        return policy.decide(observation, torch.from_numpy(noise))

    assert set(largest_differences(decide, policy, OBSERVATION_DIM).values()) == {0.0}
    for other in (
        lambda observation, noise: decide(observation, 1.5 * noise),
        lambda observation, noise: decide(observation, np.repeat(noise[:, :1], 4, 1)),  # the first draw, not the best
    ):
        with pytest.raises(ExportError, match="differ from the checkpoint's by up to"):
            largest_differences(other, policy, OBSERVATION_DIM)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_no_file_is_left_of_a_policy_that_does_not_act_as_it_should(suffix, tmp_path):
    def spoil(actor):
        for parameter in actor.parameters():
            parameter.data.fill_(math.nan)

    path, _ = write_checkpoint(tmp_path, change=spoil)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="differ from the checkpoint's by up to nan"):
        export_policy(path, tmp_path / f"policy{suffix}")
    assert sorted(tmp_path.rglob("*")) == before


# -------------------------------------------------------------------------------------------------- what is refused


def test_an_opset_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    path, _ = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"opset must be None or an integer in \[18, 25\], got 99"):
        export_policy(path, tmp_path / "policy.onnx", opset=99)
    message = refused("export.py", f"checkpoint={path}", "output=policy.onnx", "opset=99", cwd=tmp_path)
    assert "opset must be null or an integer in [18, 25], got 99" in message
    assert not (tmp_path / "policy.onnx").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("output=policy.bin",), "output must end in .onnx, or in .pt2 for torch.export, got policy.bin"),
        (("output=policy.pt2", "opset=20"), "opset=20 is of ONNX, and output=policy.pt2 is not"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, expected, tmp_path):
    assert expected in refused("export.py", "checkpoint=none.pt", *options, cwd=tmp_path)


def test_a_choice_that_is_drawn_and_draws_of_a_policy_without_randomness_are_refused(drawing, tmp_path):
    path, _ = drawing("flow", selection="expectile")
    with pytest.raises(ExportError, match=r"selection=expectile draws which action it takes and is not exported; give"):
        export_policy(path, tmp_path / "policy.pt2")
    assert export_policy(path, tmp_path / "policy.pt2", selection="largest").path.exists()
    path, _ = write_checkpoint(tmp_path, "deterministic")
    with pytest.raises(ConfigurationError, match="num_samples=4 needs a stochastic policy"):
        export_policy(path, tmp_path / "policy.onnx", num_samples=4)
    assert "num_samples must be" in refused(
        "export.py", f"checkpoint={path}", "output=policy.onnx", "num_samples=0", cwd=tmp_path
    )


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "several" / "checkpoints").mkdir(parents=True)
    seed = write_checkpoint(tmp_path)[0].rename(tmp_path / "step-00000070.pt")
    (tmp_path / "several" / "checkpoints" / "seed-0").mkdir()
    seed.rename(tmp_path / "several" / "checkpoints" / "seed-0" / seed.name)
    for name, expected in (
        ("none.pt", "is not a file"),
        ("foreign.pt", "no checkpoint of iql_torchrl"),
        ("empty", "is a folder without step-*.pt; name a run folder or a file"),
        ("several", f"a run of several seeds: name one, such as {tmp_path}/several/checkpoints/seed-0"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            export_policy(tmp_path / name, tmp_path / "policy.onnx")
    export_policy(tmp_path / "several" / "checkpoints" / "seed-0", tmp_path / "policy.pt2")


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    path, _ = write_checkpoint(tmp_path)
    find = files.importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    for output, options in (("policy.onnx", {}), ("policy.pt2", {"latency": True})):
        with pytest.raises(ConfigurationError, match=r"pip install 'iql_torchrl\[export\]'"):
            export_policy(path, tmp_path / output, **options)
    assert export_policy(path, tmp_path / "policy.pt2").path.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    path, _ = write_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"output=.*file/policy.pt2 cannot be written: .*(exists|directory)"):
        export_policy(path, tmp_path / "file" / "policy.pt2")


# ------------------------------------------------------------------------------------------------- as a user has it

WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(("torch", "torchrl", "tensordict", "iql_torchrl"))
script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def test_the_example_acts_where_torch_cannot_be_imported(tmp_path):
    write_checkpoint(tmp_path)
    out = run("export.py", f"checkpoint={tmp_path}", "output=policy.onnx", cwd=tmp_path)
    assert re.search(
        r"wrote policy.onnx, of step 70\n  largest difference from the checkpoint's actions \S+ \(zeros", out
    )
    example = ROOT / "recipes" / "examples" / "onnx_policy.py"
    command = [sys.executable, "-I", "-c", WITHOUT_TORCH, str(example), "--model", "policy.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    policy = Policy.from_state_dict(torch.load(next(tmp_path.rglob("*.pt")), weights_only=True)["policy"])
    (found,) = re.findall(r"^actions: (.*)$", done.stdout, flags=re.MULTILINE)
    rows = [json.loads(row) for row in re.findall(r"\[[^\]]*\]", found)]
    np.testing.assert_allclose(rows, policy(np.zeros((3, OBSERVATION_DIM))), atol=1e-5)


@pytest.mark.slow
def test_latencies_are_printed_for_everything_that_runs_the_policy(tmp_path):
    write_checkpoint(tmp_path)
    out = run("export.py", f"checkpoint={tmp_path}", "output=policy.pt2", "latency=true", cwd=tmp_path)
    found = re.findall(r"^    (\S+) +([\d.]+) \(([\d.]+) - ([\d.]+)\)  ([\d.]+)$", out, flags=re.MULTILINE)
    names = [name for name, *_ in found]
    assert [name for name in names if name != "compiled"] == ["onnxruntime", "torch.export", "eager", "load_policy"]
    assert "compiled" in names or "compiled: " in out
    for _, median, low, high, ratio in found:
        assert 0 < float(low) <= float(median) <= float(high) and float(ratio) > 0
    assert found[0][-1] == "1.00"
