"""Cases of an earlier recording, rebuilt by a reference that may not take them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from snapshot_tool.core.errors import InputRefused, ReferenceUnavailable
from snapshot_tool.core.interfaces import PreparedCase
from snapshot_tool.core.progress import SilentProgress
from snapshot_tool.core.recipes import CaseRecipe
from snapshot_tool.recording.plan import Settings, make_plan
from snapshot_tool.recording.staging import Staging
from snapshot_tool.store.manifest import load_manifest
from tests.unit.factory import write_golden


class RefusesAll:
    """A reference of another release, which takes none of the inputs."""

    def prepare(self, recipe: CaseRecipe, images: Sequence[Image.Image]) -> PreparedCase:
        raise InputRefused("ValueError: Unsupported number of image dimensions: 2")


def test_a_stored_case_that_is_refused_names_itself(tmp_path: Path) -> None:
    """Two lines that say which case and what to do; no case is dropped in silence."""
    template = load_manifest(write_golden(tmp_path / "goldens"))
    settings = Settings(
        revision=template.checkpoint.revision,
        seed=template.seed,
        variants=template.draws.variants,
        max_new_tokens=4,
        phases=(),
        environment={},
    )
    staging = Staging(tmp_path / "staging")
    staging.folder.mkdir()
    with pytest.raises(ReferenceUnavailable) as refused:
        make_plan(
            staging,
            settings,
            reference=RefusesAll(),  # type: ignore[arg-type]
            template=template,
            progress=SilentProgress(),
        )
    first = template.cases[0].name
    assert f"the reference refuses case {first}, which another release took" in str(refused.value)
    assert not staging.plan.exists()
