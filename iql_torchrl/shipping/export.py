"""A checkpoint's policy as a file that needs nothing of this package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iql_torchrl.atomic import write_atomically
from iql_torchrl.configuration.declaring import check_argument
from iql_torchrl.environments.specification import EnvironmentSpec
from iql_torchrl.errors import ConfigurationError
from iql_torchrl.evaluation.policy import Policy
from iql_torchrl.reporting.summary import versions
from iql_torchrl.running.options import ExportOptions
from iql_torchrl.shipping.files import as_exported, as_onnx, exported_act, onnx_act, refuse_without_onnx, traced
from iql_torchrl.shipping.graph import PolicyGraph
from iql_torchrl.shipping.latency import latencies
from iql_torchrl.shipping.verifying import largest_differences
from iql_torchrl.training.checkpoints import checkpoint_file, load_checkpoint

OPSET = 18


@dataclass(frozen=True)
class Export:
    """What was written: the file, its metadata, the largest differences by kind of observation, and latencies."""

    path: Path
    metadata: dict[str, Any]
    differences: dict[str, float]
    latency: list[str]

    def __str__(self) -> str:
        of_kinds = ", ".join(f"{kind} {difference:.2g}" for kind, difference in self.differences.items())
        lines = [
            f"wrote {self.path}, of step {self.metadata['step']}",
            f"  largest difference from the checkpoint's actions {max(self.differences.values()):.2g} ({of_kinds})",
        ]
        return "\n".join([*lines, *self.latency])


def export_policy(
    checkpoint: str | Path,
    output: str | Path,
    *,
    best: bool = False,
    num_samples: int | None = None,
    selection: str | None = None,
    opset: int | None = None,
    latency: bool = False,
) -> Export:
    """Write the policy of a checkpoint as ONNX or as a program of torch.export, once it acts as the checkpoint does.

    Observations ``[batch, O]``, float32 -> actions ``[batch, A]``, float32, in the environment's bounds, or of discrete
    actions ``[batch]``, int64: normalisation, tanh, rescaling and clipping are inside. Of a policy that chooses among
    draws, standard Normals ``noise`` of the shape in the metadata are a second input.

    Args:
        checkpoint: a file, or a run folder for its newest one.
        best: of a run folder, that of the best evaluation.
        output: ends in ``.onnx`` or ``.pt2``.
        num_samples, selection: of :func:`iql_torchrl.load_policy`.
        opset: version of ONNX's operators, 18 where not given.
        latency: also measure how long one action takes on one core.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or foreign.
        ConfigurationError: another suffix, packages that are not installed, a file that cannot be written, or several
            draws of a policy that has no randomness.
        ValueError: an opset that does not exist.
        ExportError: an opset that is not written, a choice that is drawn, or actions that differ; nothing is written
            then.
    """
    check_argument(ExportOptions, "opset", opset)
    output = Path(output).expanduser()
    if output.suffix not in (".onnx", ".pt2"):
        raise ConfigurationError(f"output={output} must end in .onnx, or in .pt2 for torch.export.")
    onnx = output.suffix == ".onnx"
    if onnx or latency:
        refuse_without_onnx(f"output={output}" if onnx else "latency=true")
    path = checkpoint_file(checkpoint, best=best)
    content = load_checkpoint(path)
    policy = Policy.from_state_dict(content["policy"], num_samples=num_samples, selection=selection)
    observation_dim = content["architecture"]["observation_dim"]
    graph = PolicyGraph(policy)
    program = traced(graph, observation_dim)
    metadata = metadata_of(content, policy)
    written = as_onnx(program, metadata, opset or OPSET) if onnx else as_exported(program, metadata)
    act = onnx_act(written) if onnx else exported_act(written)
    differences = largest_differences(act, policy, observation_dim)
    table = []
    if latency:
        other = exported_act(as_exported(program, metadata)) if onnx else onnx_act(as_onnx(program, metadata, OPSET))
        acts = {"onnxruntime": act if onnx else other, "torch.export": other if onnx else act}
        found, note = latencies(policy, graph, acts, observation_dim)
        table = ["  one action on one core, microseconds: median (quartiles), times onnxruntime"]
        table += [
            f"    {name:<12} {one.microseconds:6.1f} ({one.quartiles[0]:.1f} - {one.quartiles[1]:.1f})  {one.ratio:.2f}"
            for name, one in found.items()
        ]
        table += [f"    compiled: {note}"] if note else []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, lambda file: file.write(written))
    except OSError as error:
        raise ConfigurationError(f"output={output} cannot be written: {error.strerror or error}.") from error
    return Export(output, metadata, differences, table)


def metadata_of(checkpoint: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """What a file tells of its policy: plain values.

    Args:
        checkpoint: of :func:`iql_torchrl.training.checkpoints.load_checkpoint`.
        policy: of it.
    """
    architecture, state = checkpoint["architecture"], checkpoint["environment"]
    environment = None if state is None else EnvironmentSpec.from_state(state)
    discrete = "num_actions" in architecture
    return {
        "producer": "iql_torchrl",
        "step": checkpoint["step"],
        "dataset_fingerprint": checkpoint["dataset_fingerprint"],
        "environment": None if environment is None else environment.name,
        "environment_kwargs": None if environment is None else environment.kwargs,
        "observation_layout": None if environment is None else environment.layout,
        "observation_dim": architecture["observation_dim"],
        "normalises_observations": policy.normaliser is not None,
        "policy": "categorical" if discrete else architecture.get("policy", architecture.get("extraction")),
        "noise_shape": list(policy.chooser.noise_shape) if policy.chooses and policy.chooser is not None else None,
        "num_actions": architecture["num_actions"] if discrete else None,
        "action_low": None if discrete else policy.action_low.tolist(),
        "action_high": None if discrete else policy.action_high.tolist(),
        "versions": versions() | _versions_of_onnx(),
    }


def _versions_of_onnx() -> dict[str, str]:
    found = {}
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
