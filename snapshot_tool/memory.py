"""Memory: the bytes of tensors, giving back what is free, and not looking for garbage in vain."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from snapshot_tool.c_library import function_of_c

if TYPE_CHECKING:
    import torch

_LARGE_PAGE = 2**21  # bytes, on most machines; of fewer nothing is gained


def unset_memory(size: int) -> torch.Tensor:
    """Return `size` bytes on the CPU that nothing was written to, as a flat uint8 tensor.

    In large pages where the system has them: it makes each page ready when it is first written to,
    which for thousands of small ones takes longer than reading the file that goes there.
    """
    import torch

    # By its storage: torch.empty would fill it first, where algorithms are to be deterministic.
    storage = torch.UntypedStorage(size)  # type: ignore[no-untyped-call]
    if size >= _LARGE_PAGE:
        _ask_for_large_pages(storage.data_ptr(), size)
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def _ask_for_large_pages(start: int, size: int) -> None:
    """Advise Linux to use them (man 2 madvise); where it does not, memory works as well."""
    advise, large_pages = function_of_c("madvise"), getattr(mmap, "MADV_HUGEPAGE", None)
    if advise is None or large_pages is None:
        return
    page = mmap.PAGESIZE
    first, end = -(-start // page) * page, (start + size) // page * page  # whole pages alone
    advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), large_pages)


def release_free_memory() -> None:
    """Return what the C library keeps for later; where it cannot, do nothing.

    glibc gives back only the end of its heap by itself. The caches of a generation, which grow
    token by token, leave hundreds of megabytes of holes there, beside which the next phase begins.
    """
    if trim := function_of_c("malloc_trim"):  # glibc's (man 3 malloc_trim)
        trim(0)


@contextmanager
def without_collection() -> Iterator[None]:
    """Import inside the block: Python looks for no garbage meanwhile, and not there ever after.

    torch and FMS make a million objects that live as long as the process. Looking through them
    again and again takes a sixth of the imports' time, and a second when the process ends.
    """
    was_on, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        # What is frozen is never freed: not the garbage of an earlier check, say.
        if len(sys.modules) > modules:
            gc.freeze()
        if was_on:
            gc.enable()


def fingerprint(data: torch.Tensor | bytes) -> str:
    """Return what tells bytes from others (XXH3, 128 bits), several times as quick as SHA-256.

    It tells what was written to by mistake; whoever wants two inputs that have it in common can
    make them.
    """
    return xxhash.xxh3_128_hexdigest(data if isinstance(data, bytes) else tensor_bytes(data))


def equal_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors of one shape, dtype and device have the same bytes.

    Eight at a time, where number and place of them allow it: torch compares floating-point numbers
    one by one, half as quick. What is not contiguous is copied.
    """
    import torch

    flat = [flat_bytes(t) for t in (one, other)]
    if all(t.numel() % 8 == 0 and t.storage_offset() % 8 == 0 for t in flat):
        flat = [t.view(torch.int64) for t in flat]
    return torch.equal(*flat)


@dataclass(slots=True)
class Lent:
    """The last tensor that was lent, lent again to whoever asks for it when the last is done.

    A borrower may write to it: then it is made anew. To look for that takes a fraction of what it
    takes to make one. Two who borrow it at the same time have the same memory.
    """

    _name: str = ""
    _tensor: torch.Tensor | None = None
    _mark: str = ""

    def lend(self, name: str, make: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Return the tensor of a name, which `make` makes where it is not at hand."""
        import torch

        if self._tensor is None or name != self._name or fingerprint(self._tensor) != self._mark:
            self.forget()  # first: there need not be room for two
            # A plain one, whatever mode the first borrower is in: the next may be in another.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._name, self._tensor = name, make()
            self._mark = "" if self._tensor is None else fingerprint(self._tensor)
        # Its elements alone are lent: a borrower may also reshape it in place.
        return None if self._tensor is None else self._tensor.detach()

    def forget(self) -> None:
        """Keep it no longer than its borrowers do."""
        self._tensor = None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, the last dimension first; its own memory where it lies like that."""
    return flat_bytes(tensor.to("cpu")).numpy().data


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, (bytes,) uint8, on its device; its own memory if it lies like that.

    A tensor of at most one element is contiguous with any stride, but viewed as bytes with 1 alone.
    """
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    plain = flat.as_strided(flat.shape, (1,)) if flat.numel() <= 1 else flat
    return plain.view(torch.uint8)
