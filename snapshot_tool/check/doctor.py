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
from snapshot_tool.base.errors import CheckpointUnavailable, DeviceUnavailable, SnapError
from snapshot_tool.candidates.fms.candidate import family_in_fms
from snapshot_tool.candidates.fms.importing import FmsSource, import_fms
from snapshot_tool.families import FAMILIES
from snapshot_tool.goldens.find import FoundSet, check_line, find_goldens, how_to_get
from snapshot_tool.goldens.manifest import Manifest
from snapshot_tool.goldens.verify import verify_set


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis: its subject, whether it works, and the details."""

    subject: str
    good: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Whether checking and recording work here, and the findings.

    `next_step` is a command or an instruction.
    """

    can_check: bool
    can_record: bool
    findings: tuple[Finding, ...]
    next_step: str


def diagnose(goldens: Path, *, fms_path: Path | None) -> Diagnosis:
    """Examine packages, devices, FMS and golden sets without running a model."""
    import torch

    machine = describe_machine()
    packages = ", ".join(f"{k} {v}" for k, v in sorted(package_versions().items()))
    gpu = torch.cuda.is_available()
    no_gpu = f"torch {torch.__version__} finds no GPU"
    facts = [
        Finding("python", True, f"{machine['python']} on {machine['platform']}"),
        Finding("packages", True, packages),
        Finding("device cpu", True, f"{device_name('cpu')}, {torch.get_num_threads()} threads"),
        Finding("device cuda", gpu, device_name("cuda") if gpu else no_gpu),
    ]
    fms, source = _fms_finding(fms_path)
    recording = _recording_finding()
    found = find_goldens(goldens)
    sets = [_golden_finding(one, goldens, source) for one in found]
    usable = [one.name for one, finding in zip(found, sets, strict=True) if finding.good]
    if usable:
        options = ["--fms-path", str(fms_path)] if fms_path else []
        if len(usable) > 1:
            options.append("--all")
        elif len(found) > 1:
            options += ["--checkpoint", usable[0]]
        step = check_line(goldens, *options)
    elif source is None:
        step = fms.detail
    elif found:
        step = "no golden set can be checked here: see the reasons above"
    else:
        step = how_to_get(goldens)
        sets = [Finding("goldens", False, f"no golden set in {goldens}")]
    return Diagnosis(bool(usable), recording.good, (*facts, fms, recording, *sets), step)


def _fms_finding(fms_path: Path | None) -> tuple[Finding, FmsSource | None]:
    """Import FMS; return the finding, and its source or None."""
    before = "transformers" in sys.modules
    try:
        source = import_fms(fms_path)
    except SnapError as error:
        return Finding("fms", False, f"{error.problem}; {error.remedy}"), None
    from fms import models

    known = set(models.list_models())
    here = [name for name, family in FAMILIES.items() if family.fms.architecture in known]
    name = source.commit[:12] + (" (dirty)" if source.dirty else "") or source.version or "no git"
    imported = "transformers" in sys.modules and not before
    detail = (
        f"{source.path} {name}; families: {', '.join(here) or 'none that snap supports'}"
        f"{'; it imports transformers' if imported else ''}"
    )
    return Finding("fms", bool(here), detail), source


def _recording_finding() -> Finding:
    missing = [name for name in ("transformers", "accelerate") if not is_importable(name)]
    if missing:
        lacking = " and ".join(missing)
        return Finding("recording", False, f"{lacking} not installed (not needed for checking)")
    return Finding("recording", True, "transformers and accelerate are installed")


def _golden_finding(found: FoundSet, root: Path, source: FmsSource | None) -> Finding:
    """Return whether a set can be checked here with the installed FMS."""
    name = f"golden {found.name}"
    if found.manifest is None:
        return Finding(name, False, found.problem)
    try:
        manifest, damage = verify_set(found.folder, found.manifest)
        if damage:
            return Finding(name, False, damage[0])
        checkpoint = _checkpoint_source(root, manifest)
        if source is None:
            return Finding(name, False, "FMS is not available")
        family_in_fms(manifest.checkpoint.config, source)
    except SnapError as error:
        return Finding(name, False, error.problem)
    detail = f"{len(manifest.cases)} cases, golden version {manifest.golden_version}, usable here"
    return Finding(name, True, f"{detail}; {checkpoint}")


def _checkpoint_source(root: Path, manifest: Manifest) -> str:
    """Return the source of a set's weights; raise SnapError if it cannot be checked."""
    import torch

    if manifest.device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(
            "recorded on cuda, which is not available (to check on the CPU: --golden-device cuda)"
        )
    entry = manifest.checkpoint
    if entry.location is not None:
        folder = root.absolute().parent / entry.location
        if not folder.is_dir():
            raise CheckpointUnavailable(f"its checkpoint is not at {folder}: pass --checkpoint DIR")
        return f"checkpoint {folder}"
    if is_folder_name(entry.name):
        raise CheckpointUnavailable(
            "the folder of its checkpoint is unknown: pass --checkpoint DIR"
        )
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(entry.name, n, revision=entry.revision) for n in entry.files]
    if all(isinstance(path, str) for path in cached):
        return "checkpoint in the hub's cache"
    return f"checkpoint {entry.name} will be downloaded from the hub by the first check"
