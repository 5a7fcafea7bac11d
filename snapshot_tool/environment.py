"""What this process runs on: versions, processor, devices; found out without heavy imports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

from snapshot_tool.core.errors import OutOfMemory

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


# The smallest model takes as much. With less, the libraries of numpy and OpenMP may end the process
# in a way of their own.
_LEAST_ADDRESS_SPACE = 800 * 2**20


def require_address_space() -> None:
    """Raise OutOfMemory where a limit (ulimit -v) leaves no room for torch and a model."""
    try:
        import resource
    except ImportError:  # not a Unix system: there is no such limit
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LEAST_ADDRESS_SPACE:
        raise OutOfMemory(
            f"not enough memory: {limit // 2**20} MiB are allowed here (ulimit -v), torch and "
            f"a small model take {_LEAST_ADDRESS_SPACE // 2**20}",
            "raise the limit",
        )
