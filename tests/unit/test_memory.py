"""Memory: new and given back; what garbage collection does while modules are imported."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from snapshot_tool.memory import Lent, equal_bytes, unset_memory, without_collection

MODULE = "colorsys"  # of the standard library, and used by nobody here


@pytest.fixture
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_thawed")
def test_nothing_is_collected_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what they hold ever looked through again."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    before = gc.get_freeze_count()
    with without_collection():
        __import__(MODULE)
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


@pytest.mark.usefixtures("_thawed")
def test_what_is_left_of_an_earlier_check_is_collected_where_nothing_is_imported() -> None:
    """What is frozen would stay for good."""
    before = gc.get_freeze_count()
    with without_collection():
        pass
    assert gc.get_freeze_count() == before


def test_collection_that_was_off_stays_off() -> None:
    """Whoever switched it off does not find it on."""
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [0, 8, 2**21 - 8, 2**21, 3 * 2**21 + 8])
def test_memory_of_any_size_takes_any_dtype(size: int) -> None:
    """Two pieces of it never overlap."""
    one, other = (unset_memory(size).view(torch.float64) for _ in range(2))
    one.fill_(1.5)
    other.fill_(2.5)
    assert one.numel() == size // 8
    assert bool((one == 1.5).all())
    assert bool((other == 2.5).all())


def resident() -> int:
    """Return the memory of this process that is in use, in bytes (man 5 proc: statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def large_pages_around(place: int) -> int:
    """Return the bytes in large pages of the mapping at an address (man 5 proc: smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, end = (int(at, 16) for at in name.split("-"))
            inside = start <= place < end
        elif inside and name == "AnonHugePages:":
            return int(rest.split()[0]) * 1024
    return 0


def test_memory_is_given_back_with_the_last_tensor_in_it() -> None:
    """A view keeps it."""
    size = 2**26
    before = resident()
    kept = unset_memory(size).fill_(7)[:: 2**20]
    assert resident() - before > 0.9 * size
    assert kept.tolist() == [7] * 2**6
    del kept
    assert resident() - before < 0.5 * size


def test_memory_is_there_where_the_system_has_no_large_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel built without them refuses the advice."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 2**16)  # no advice that there is
    assert unset_memory(2**22).fill_(7).sum() == 7 * 2**22
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert unset_memory(2**22).fill_(7).sum() == 7 * 2**22


def test_memory_is_of_large_pages_where_the_system_has_them() -> None:
    """In part at least: it may have no more of them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    has_them = setting.exists() and "[never]" not in setting.read_text()
    kept = unset_memory(2**26).fill_(7)
    assert (large_pages_around(kept.data_ptr() + 2**25) > 0) == has_them


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4099, 2**20])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64])
def test_bytes_are_equal_where_the_last_bit_is(size: int, dtype: torch.dtype) -> None:
    """However many there are, and wherever in memory they begin."""
    whole = torch.randint(0, 2, (size + 3,), generator=torch.Generator().manual_seed(1)).to(dtype)
    for start in range(4):
        one = whole[start : start + size]
        other = one.clone()
        assert equal_bytes(one, other)
        if len(one):
            other[-1] = 1 - other[-1].to(torch.int64)
            assert not equal_bytes(one, other)


def test_bytes_are_those_of_any_layout() -> None:
    """A view has the bytes of its elements in their order; zeros of two signs differ in theirs."""
    table = torch.rand(3, 4)
    assert equal_bytes(table.T, table.T.contiguous())
    assert not equal_bytes(table.T.reshape(3, 4), table)
    assert not equal_bytes(torch.tensor(0.0), torch.tensor(-0.0))
    nan = torch.tensor([float("nan")] * 2)
    assert equal_bytes(nan, nan.clone())


class Maker:
    """Makes a tensor of ones, and counts how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> torch.Tensor:
        self.made += 1
        return torch.ones(2, 3)


def test_what_is_lent_is_made_once_for_all_who_ask() -> None:
    """Another name is another tensor, and the first is not kept beside it."""
    lent, make = Lent(), Maker()
    assert lent.lend("one", make) is not None
    assert lent.lend("one", make) is not None
    assert make.made == 1
    lent.lend("other", make)
    lent.lend("one", make)
    assert make.made == 3


def test_what_a_borrower_has_written_to_is_made_anew() -> None:
    """The last bit counts; what only the borrower's own view was made into does not."""
    lent, make = Lent(), Maker()
    borrowed = lent.lend("one", make)
    assert borrowed is not None
    borrowed.unsqueeze_(0).requires_grad_()
    again = lent.lend("one", make)
    assert again is not None
    assert (again.shape, again.requires_grad, make.made) == ((2, 3), False, 1)
    again.view(torch.int32)[1, 2] ^= 1
    last = lent.lend("one", make)
    assert last is not None
    assert torch.equal(last, torch.ones(2, 3))
    assert make.made == 2


def test_what_is_lent_is_plain_whatever_mode_it_was_made_in() -> None:
    """Whoever borrows it next may want gradients, or to compute in place."""
    lent, make = Lent(), Maker()
    with torch.inference_mode():
        lent.lend("one", make)
    borrowed = lent.lend("one", make)
    assert borrowed is not None
    assert make.made == 1
    assert not borrowed.is_inference()
    borrowed.mul_(2)


def test_what_is_not_there_is_asked_for_again() -> None:
    """Nothing is lent in its place."""
    lent, make = Lent(), Maker()
    assert lent.lend("one", lambda: None) is None
    assert lent.lend("one", make) is not None


def test_what_is_forgotten_is_free_once_it_is_given_back() -> None:
    """Nothing else holds it."""
    lent, make = Lent(), Maker()
    borrowed = lent.lend("one", make)
    assert borrowed is not None
    held = StorageWeakRef(borrowed.untyped_storage())  # type: ignore[no-untyped-call]
    lent.forget()
    assert not held.expired()  # type: ignore[no-untyped-call]
    del borrowed
    assert held.expired()  # type: ignore[no-untyped-call]
