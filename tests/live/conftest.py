"""Fixtures of the live tests."""

from __future__ import annotations

import pytest

from tests.conftest import Snap, run_snap


@pytest.fixture(scope="session")
def snap() -> Snap:
    """Run `snap` in a fresh process: whether a check imports transformers is tested here."""
    return run_snap
