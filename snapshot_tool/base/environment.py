"""The environment: versions, devices, processes, and the settings that make runs repeatable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

from snapshot_tool.base.errors import DeviceUnavailable

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
    """Return a package's version; "" if it is not installed."""
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
    """Return this process's rank if torchrun or accelerate started several, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        return None
    return int(os.environ["RANK"])


def is_importable(module: str) -> bool:
    """Return whether a top-level module could be imported, without importing it."""
    return module in sys.modules or importlib.util.find_spec(module) is not None


def require_device(device: str) -> None:
    """Raise DeviceUnavailable unless torch can compute on the device."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise DeviceUnavailable(
            f"--device {device}: torch {torch.__version__} ({built}) finds no GPU",
            "use --device cpu, or a machine with a GPU and a CUDA build of torch",
        )


def make_deterministic(seed: int, *, strict: bool = True) -> dict[str, str]:
    """Fix everything in torch that could change a result, and return the settings as recorded.

    The number of threads is left to torch (and OMP_NUM_THREADS). It is recorded, since sums over
    another number of parts round differently.

    strict: whether torch refuses operations that have no deterministic form. A candidate on a GPU
    may need one.
    """
    # cuBLAS reads this once, at its first use (CUDA documentation, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # For a compiled candidate: use_deterministic_algorithms would import the compiler, which takes
    # longer than a small check.
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    import torch

    torch.manual_seed(seed)
    torch.set_deterministic_debug_mode("error" if strict else "warn")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    return {
        "torch_seed": str(seed),
        "torch_threads": str(torch.get_num_threads()),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()).lower(),
        **precision_settings(),
        "cublas_workspace": os.environ["CUBLAS_WORKSPACE_CONFIG"],
    }


def precision_settings() -> dict[str, str]:
    """Return the switches by which torch rounds float32 products to fewer digits."""
    import torch

    return {
        "tf32": str(
            torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        ).lower(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
