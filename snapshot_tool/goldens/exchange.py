"""Functions of the C library that Python has no names for."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def function_of_c(name: str) -> ctypes._NamedFuncPointer | None:
    """Return a function of the C library; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:  # a Python that is linked statically opens no library
        return None
