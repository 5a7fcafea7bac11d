"""The HTML report where its packages are not installed, as in the record environment."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import Snap, error_lines

pytestmark = pytest.mark.record


def test_a_report_without_its_packages_is_refused_before_the_check(
    snap: Snap, tmp_path: Path
) -> None:
    """Two lines say what is missing and how to install it; nothing has run."""
    assert find_spec("matplotlib") is None
    run = snap("check", "--goldens", tmp_path, "--html", tmp_path / "report.html")
    assert run.code == 3
    assert error_lines(run) == [
        "snap: an HTML report needs matplotlib, which is not installed here",
        "      in a checkout of snap: pip install '.[report]'",
    ]
