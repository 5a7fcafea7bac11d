"""docs/adding-a-family.md shows a family's file as it is."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_the_tutorial_shows_the_file_as_it_is() -> None:
    """The file that the tests record and check with."""
    page = (ROOT / "docs" / "adding-a-family.md").read_text("utf-8")
    (shown,) = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    assert shown == (ROOT / "tests" / "examples" / "xlm_roberta.py").read_text("utf-8")
