"""The committed golden set and FMS's candidate for it, opened and loaded once."""

from __future__ import annotations

import pytest

from snapshot_tool.base.protocol import CandidateRequest
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.goldens.golden import Golden, open_golden
from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, set_folder


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Open the committed golden set."""
    return open_golden(set_folder(GOLDENS))


@pytest.fixture(scope="session")
def candidate(golden: Golden) -> FmsCandidate:
    """Load the checkout's model; a test that changes its weights puts them back."""
    request = CandidateRequest(CHECKPOINT, golden.manifest.checkpoint.config, "cpu", "float32")
    return load_fms_candidate(request, fms_path=CHECKOUT)
