"""What is verified before any code of the candidate runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import CHECKPOINT, ROOT, Snap, set_folder

MARK = "the candidate's code ran"


@pytest.fixture
def fms(tmp_path: Path) -> Path:
    """Lay out an FMS that says on standard error that it was imported."""
    package = tmp_path / "checkout" / "fms"
    package.mkdir(parents=True)
    text = f"import sys; print({MARK!r}, file=sys.stderr)\n"
    (package / "__init__.py").write_text(text, encoding="utf-8")
    return package.parent


def check(snap: Snap, goldens: Path, fms: Path) -> str:
    """Check the FMS against a golden set; return what was said."""
    run = snap("check", "--goldens", goldens, "--fms-path", fms)
    assert run.code == 3
    return run.err


def test_an_fms_is_imported_after_golden_and_checkpoint_are_verified(
    snap: Snap, goldens_copy: Path, fms: Path
) -> None:
    """A damaged golden set, or another checkpoint, ends the check before it."""
    assert MARK in check(snap, goldens_copy, fms)
    weights = goldens_copy.parent / CHECKPOINT.relative_to(ROOT) / "config.json"
    original = weights.read_text(encoding="utf-8")
    weights.write_text(original + " ", encoding="utf-8")
    assert MARK not in check(snap, goldens_copy, fms)
    weights.write_text(original, encoding="utf-8")
    taps = set_folder(goldens_copy) / "taps.safetensors"
    taps.write_bytes(taps.read_bytes()[:-1] + b"?")
    assert MARK not in check(snap, goldens_copy, fms)
