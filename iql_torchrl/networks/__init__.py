"""Builders of the networks: policies, a list of critics Q(s, a), and V(s)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict.nn import TensorDictModuleBase

from iql_torchrl.networks.feedforward import (
    NormalParameters,
    build_actor,
    build_discrete_actor,
    build_discrete_qvalues,
    build_qvalues,
    build_value,
)
from iql_torchrl.networks.generative import (
    DiffusionActor,
    FlowActor,
    GenerativeActor,
    NoisePredictor,
    build_diffusion_actor,
    build_flow_actor,
)

__all__ = [
    "DiffusionActor",
    "FlowActor",
    "GenerativeActor",
    "NoisePredictor",
    "NormalParameters",
    "build_actor",
    "build_diffusion_actor",
    "build_discrete_actor",
    "build_discrete_qvalues",
    "build_flow_actor",
    "build_policy",
    "build_qvalues",
    "build_value",
]

_ACTORS = {"flow": build_flow_actor, "diffusion": build_diffusion_actor}
# Of critics and V too, and not of a network that is as its authors have it.
_OF_PLAIN_LAYERS = ("layer_norm", "activation", "initialisation")


def build_policy(architecture: Mapping[str, Any], **options: Any) -> TensorDictModuleBase:
    """The policy that an architecture names.

    Args:
        architecture: arguments of :func:`build_discrete_actor` where it has ``num_actions``, else of
            :func:`build_actor`, or of the builder of its ``extraction``.
        **options: further arguments.
    """
    arguments = {**architecture, **options}
    extraction = arguments.pop("extraction", "awr")
    if "num_actions" in arguments:
        return build_discrete_actor(**arguments)
    if extraction == "diffusion":
        arguments = {key: value for key, value in arguments.items() if key not in _OF_PLAIN_LAYERS}
    return _ACTORS.get(extraction, build_actor)(**arguments)
