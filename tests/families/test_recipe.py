"""docs/adding-a-family.md shows a family as it is."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_the_recipe_shows_the_declaration_as_it_is() -> None:
    """The page has the whole file but its docstring and imports."""
    page = (ROOT / "docs" / "adding-a-family.md").read_text("utf-8")
    (shown,) = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    source = (ROOT / "snapshot_tool" / "families" / "granite.py").read_text("utf-8")
    assert shown == source[source.index("def granite_config") :]
