"""What this process runs on: versions, processor, devices; found out without heavy imports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "hypothesis",
    "ibm-fms",
)


def package_version(name: str) -> str:
    """Return an installed package's version, or "" where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that can change a result, installed ones only."""
    versions = {name: package_version(name) for name in PACKAGES}
    return {name: version for name, version in versions.items() if version}


def processor_name() -> str:
    """Return the CPU's model name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine() -> dict[str, str]:
    """Return Python, platform and processor."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
    }


def device_name(device: str) -> str:
    """Return the model name of "cpu" or "cuda" (its first GPU)."""
    if device == "cpu":
        return processor_name()
    import torch

    return str(torch.cuda.get_device_name(0))


def rank_here() -> int | None:
    """Return this process's rank where torchrun or accelerate started several, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        return None
    return int(os.environ["RANK"])


def is_importable(module: str) -> bool:
    """Tell whether a top-level module could be imported, without importing it."""
    return module in sys.modules or importlib.util.find_spec(module) is not None
