"""Loading torch's largest library while Python imports, which takes turns by itself.

A fifth of `import torch` is the system's loader at work on libtorch_cpu.so: hundreds of megabytes
whose addresses are put right, thousands of operators that are registered. None of it needs Python.
"""

from __future__ import annotations

# The loader serves one thread at a time, so whoever imports an extension module waits for the large
# library: these are the extension modules that sympy needs, and are here before it is begun.
import cmath  # noqa: F401
import contextlib
import importlib.util
import os
import subprocess  # noqa: F401
import sys
import unicodedata  # noqa: F401
from pathlib import Path

from snapshot_tool.c_library import function_of_c

_LIBRARY = "libtorch_cpu.so"
# A build for GPUs finds its other libraries first, in an order of its own.
_OF_GPU_BUILDS = ("libtorch_cuda.so", "libtorch_hip.so", "libtorch_xpu.so")


def load_library() -> None:
    """Load it on the thread that calls; others run meanwhile.

    Where that is not possible nothing happens: `import torch` loads it, or says why it cannot.
    """
    library, load = find_library(), function_of_c("dlopen")
    if library is not None and load is not None:
        # As Python itself loads extension modules. Whoever wants it again is given this one.
        load(os.fsencode(library), sys.getdlopenflags())


def find_library() -> Path | None:
    """Return the file of a CPU build of torch that was not imported yet; None without one."""
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "lib")
    if any((folder / name).exists() for name in _OF_GPU_BUILDS):
        return None
    library = folder / _LIBRARY
    return library if library.exists() else None


def import_meanwhile() -> None:
    """Import what torch's compiler needs and what is Python alone: sympy, the largest of it."""
    # Not every torch requires it. Whoever needs it is told what is wrong with it.
    with contextlib.suppress(Exception):
        import sympy  # noqa: F401
