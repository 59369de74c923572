"""The device of a run."""

from __future__ import annotations

import torch

from iql_torchrl.errors import ConfigurationError, first_line


def resolve_stacked(stacked: bool | str, device: torch.device) -> bool:
    """Whether several runs are computed in one kernel; ``"auto"``: on a GPU, which one run does not fill."""
    return device.type != "cpu" if stacked == "auto" else bool(stacked)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ConfigurationError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # whose streams copies, graphs and events are then on
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {name} is not available on this machine: {first_line(error)}") from error
    return device
