"""Making a report of a finished check: its record, and what its golden set tells of the cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from snapshot_tool.base.errors import GoldenNotFound
from snapshot_tool.base.preview import CaseStory
from snapshot_tool.base.report import CheckReport, GoldenIdentity
from snapshot_tool.goldens.find import Selection, find_goldens
from snapshot_tool.goldens.golden import open_golden
from snapshot_tool.reports.preview import tell_stories


def find_stories(report: CheckReport, goldens: Path) -> Mapping[str, CaseStory]:
    """Return the stories of a check's cases, from the golden set that it was checked against.

    Raises GoldenNotFound where the set, or its version, is not in the folder.
    """
    golden = open_golden(_find_folder(report.golden, goldens))
    return tell_stories(golden, {result.case for result in report.results})


def _find_folder(wanted: GoldenIdentity, goldens: Path) -> Path:
    selection = Selection(wanted.checkpoint, wanted.revision, wanted.device, wanted.dtype)
    for found in find_goldens(goldens):
        manifest = found.manifest
        if manifest is None or not selection.matches(manifest):
            continue
        if manifest.golden_version == wanted.golden_version:
            return found.folder
    raise GoldenNotFound(
        f"{goldens} does not hold {wanted}, which the run was checked against",
        "name the folder that does with --goldens",
    )
