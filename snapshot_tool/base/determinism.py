"""The same numbers every time: seeds, threads, TF32 and algorithms, and what they were set to."""

from __future__ import annotations

import os


def make_deterministic(seed: int, *, strict: bool = True) -> dict[str, str]:
    """Fix everything in torch that could change a result, and return the settings as recorded.

    The number of threads is left to torch (and OMP_NUM_THREADS): it is recorded, since sums over
    another number of parts round differently. `strict` makes torch refuse operations that have no
    deterministic form: right for recording, while a candidate on a GPU may need one.
    """
    # cuBLAS reads this once, at its first use (CUDA documentation, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # For a candidate that is compiled: use_deterministic_algorithms would import the compiler to
    # tell it, which takes more time than a small check.
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
