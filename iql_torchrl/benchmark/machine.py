"""On which machine a measurement was made."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("avx", "fma", "amx", "sse4", "asimd", "sve", "bf16")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, its vector instructions, threads, GPU and date (UTC)."""
    found = _processor()
    return {
        "processor": found.get("model name") or platform.processor() or platform.machine(),
        "vendor": found.get("vendor_id"),
        "family": found.get("cpu family"),
        "model": found.get("model"),
        "stepping": found.get("stepping"),
        "flags": [one for one in found.get("flags", "").split() if one.startswith(_FLAGS)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "system": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """In a few words, for a title."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _processor() -> dict[str, str]:
    """The first processor of Linux's list; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
