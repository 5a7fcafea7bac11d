"""What a check does at once before its first phase."""

from __future__ import annotations

from threading import current_thread, main_thread
from typing import Any

import pytest

from snapshot_tool import opening
from snapshot_tool.check_request import CheckRequest
from snapshot_tool.core.progress import SilentProgress
from snapshot_tool.store.golden import open_golden
from tests.candidates import CHECKOUT
from tests.conftest import GOLDENS, set_folder


def test_torchs_library_is_loaded_before_the_checkpoint_is_digested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both on a thread beside the imports, which the library is wanted for first."""
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> None:
        own = getattr(opening, name)

        def noted(*given: Any) -> Any:
            seen.append((name, current_thread() is main_thread()))
            return own(*given)

        monkeypatch.setattr(opening, name, noted)

    note("load_library")
    note("open_checkpoint_of")
    request = CheckRequest(GOLDENS, fms_path=CHECKOUT)
    opening.open_checker(request, open_golden(set_folder(GOLDENS)), SilentProgress())
    assert seen == [("load_library", False), ("open_checkpoint_of", False)]
