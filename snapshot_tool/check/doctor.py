"""What works in this environment: recording, checking, devices, FMS, golden sets."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.checkpoint import is_folder_name
from snapshot_tool.base.environment import (
    describe_machine,
    device_name,
    is_importable,
    package_versions,
)
from snapshot_tool.base.errors import SnapError
from snapshot_tool.families import FAMILIES
from snapshot_tool.goldens.find import FoundSet, find_goldens
from snapshot_tool.goldens.manifest import Manifest
from snapshot_tool.goldens.verify import verify_set


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis: its subject, whether it is in order, and the facts."""

    subject: str
    good: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Whether checking and recording work here, and everything that was found."""

    can_check: bool
    can_record: bool
    findings: tuple[Finding, ...]


def diagnose(goldens: Path, *, fms_path: Path | None) -> Diagnosis:
    """Look at packages, devices, FMS and golden sets without running a model."""
    import torch

    machine = describe_machine()
    packages = ", ".join(f"{k} {v}" for k, v in sorted(package_versions().items()))
    gpu = torch.cuda.is_available()
    no_gpu = f"torch {torch.__version__} sees no GPU here"
    facts = [
        Finding("python", True, f"{machine['python']} on {machine['platform']}"),
        Finding("packages", True, packages),
        Finding("device cpu", True, f"{device_name('cpu')}, {torch.get_num_threads()} threads"),
        Finding("device cuda", gpu, device_name("cuda") if gpu else no_gpu),
    ]
    fms = _fms_finding(fms_path)
    recording = _recording_finding()
    sets = [_golden_finding(found, goldens) for found in find_goldens(goldens)]
    if not sets:
        sets = [Finding("goldens", False, f"no golden set in {goldens}: record one")]
    usable = fms.good and any(finding.good for finding in sets)
    return Diagnosis(usable, recording.good, (*facts, fms, recording, *sets))


def _fms_finding(fms_path: Path | None) -> Finding:
    from snapshot_tool.candidates.fms.importing import import_fms

    before = "transformers" in sys.modules
    try:
        source = import_fms(fms_path)
    except SnapError as error:
        return Finding("fms", False, f"{error.problem}; {error.remedy}")
    from fms import models

    known = set(models.list_models())
    here = [name for name, family in FAMILIES.items() if family.fms.architecture in known]
    name = source.commit[:12] + (" (dirty)" if source.dirty else "") or source.version or "no git"
    imported = "transformers" in sys.modules and not before
    detail = (
        f"{source.path} {name}; families: {', '.join(here) or 'none that snap knows'}"
        f"{'; it imports transformers' if imported else ''}"
    )
    return Finding("fms", bool(here), detail)


def _recording_finding() -> Finding:
    missing = [name for name in ("transformers", "accelerate") if not is_importable(name)]
    if missing:
        lacking = " and ".join(missing)
        return Finding("recording", False, f"{lacking} not installed (fine for checking)")
    return Finding("recording", True, "transformers and accelerate are installed")


def _golden_finding(found: FoundSet, root: Path) -> Finding:
    name = f"golden {found.folder.relative_to(root)}"
    if found.manifest is None:
        return Finding(name, False, found.problem)
    try:
        manifest, damage = verify_set(found.folder)
    except SnapError as error:
        return Finding(name, False, error.problem)
    problem = damage[0] if damage else _why_unusable(root, manifest)
    if problem:
        return Finding(name, False, problem)
    detail = f"{len(manifest.cases)} cases, golden version {manifest.golden_version}, usable here"
    return Finding(name, True, detail)


def _why_unusable(root: Path, manifest: Manifest) -> str:
    """Return why an undamaged set cannot be checked here as it is, or ""."""
    import torch

    if manifest.device == "cuda" and not torch.cuda.is_available():
        return "recorded on cuda, which is not here (--device cpu --golden-device cuda allows it)"
    entry = manifest.checkpoint
    if entry.location is not None:
        folder = root.absolute().parent / entry.location
        missing = f"its checkpoint is not at {folder}: pass --checkpoint DIR"
        return "" if folder.is_dir() else missing
    if is_folder_name(entry.name):
        return "it does not name the folder of its checkpoint: pass --checkpoint DIR"
    return ""
