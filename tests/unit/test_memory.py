"""Memory: what garbage collection does while modules are imported."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from snapshot_tool.memory import without_collection

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
