"""What the figures were measured with; no paths and no names of machines."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "peft", "transformers", "accelerate", "peft-lntune")


def environment(device: torch.device, workers: int) -> dict[str, Any]:
    """Describe the software and the processor.

    Args:
        device: where the models run.
        workers: processes that train side by side.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "processes": workers,
        "load_average_at_start": [round(load, 1) for load in os.getloadavg()],
        "device": device_name(device),
    }


def write_environment(path: Path, experiment: str, device: torch.device, workers: int) -> None:
    """Record the environment of an experiment in the file that all experiments share.

    Args:
        path: `environment.json`, beside the results.
        experiment: the key of the entry, for instance `accuracy`.
        device: where the models run.
        workers: processes that train side by side.
    """
    write_entry(path, experiment, environment(device, workers))


def write_entry(path: Path, experiment: str, entry: dict[str, Any]) -> None:
    """Record an environment that another process has described, see `write_environment`."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[experiment] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def device_name(device: torch.device) -> str:
    """Return the name of the accelerator, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    if package == "peft-lntune":  # run from a checkout without installing
        from peft_lntune.version import __version__

        return __version__
    return None


def _cpu_model() -> str:
    """Return the processor's model as Linux gives it, else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
