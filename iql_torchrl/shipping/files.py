"""A policy's graph as ONNX and as a program of torch.export, and both read back as functions."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from iql_torchrl.errors import ConfigurationError, ExportError, first_line
from iql_torchrl.shipping.graph import PolicyGraph

# Of observations, and of noise where the policy takes some.
Act = Callable[..., np.ndarray]
METADATA = "metadata.json"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def refuse_without_onnx(why: str) -> None:
    """Raise a ConfigurationError where a package for ONNX is not installed.

    Args:
        why: the option that needs it.
    """
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigurationError(
            f"{why} needs {', '.join(missing)}: pip install 'iql_torchrl[export]'; or give output=policy.pt2 and "
            "latency=false, which need torch alone."
        )


def traced(graph: PolicyGraph, observation_dim: int) -> torch.export.ExportedProgram:
    """The graph's operations, for batches of any size."""
    batch = torch.export.Dim("batch")
    inputs = [torch.zeros(2, observation_dim)]
    if graph.noise_shape is not None:
        inputs.append(torch.zeros(2, *graph.noise_shape))
    return torch.export.export(graph, tuple(inputs), dynamic_shapes=tuple({0: batch} for _ in inputs))


def as_onnx(program: torch.export.ExportedProgram, metadata: Mapping[str, Any], opset: int) -> bytes:
    """A program as an ONNX model, inputs ``observation`` ``[batch, O]`` and, where it takes some, ``noise``.

    Its output is ``action``.

    Args:
        program: of :func:`traced`.
        metadata: plain values, which become ``metadata_props``, each in JSON.
        opset: version of ONNX's operators.

    Raises:
        ExportError: the installed torch and ONNX do not write that opset.
    """
    onnx: Any = importlib.import_module("onnx")
    try:
        with _quiet():
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["observation", "noise"][: len(program.graph_signature.user_inputs)],
                output_names=["action"],
                dynamic_shapes=None,
                verbose=False,
            )
            model = exported.model_proto
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_param = "batch"
            onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
            onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # whatever the exporter raises, there is no model
        raise ExportError(f"opset={opset} cannot be written: {first_line(error)}; give another one.") from error
    written = next(one.version for one in model.opset_import if not one.domain)
    if written != opset:
        raise ExportError(f"opset={opset} cannot be written: what was written is of {written}; give that one.")
    return model.SerializeToString()


def as_exported(program: torch.export.ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """A program as the content of a .pt2 file, with the metadata as the extra file ``metadata.json``."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    return file.getvalue()


def onnx_act(model: bytes) -> Act:
    """An ONNX model as onnxruntime runs it on one core.

    Raises:
        ExportError: it does not.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which have no common class
        raise ExportError(
            f"onnxruntime {runtime.__version__} does not load the model: {first_line(error)}; give a lower opset."
        ) from error
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]


def exported_act(content: bytes) -> Act:
    """The content of a .pt2 file as torch runs it."""
    return module_act(torch.export.load(io.BytesIO(content)).module())


def module_act(module: Callable[..., Any]) -> Act:
    """A module on tensors as a function of arrays."""

    @torch.no_grad()
    def act(*inputs: np.ndarray) -> np.ndarray:
        return module(*map(torch.from_numpy, inputs)).numpy()

    return act


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
