"""Recording a golden set: plan the cases, ask the reference, write everything in one commit.

Every case's answers are staged as small files under goldens/.snap as soon as they are there, so a
recording that was killed goes on with `--resume` where it stopped. At the end the parts are joined
into the files of the set, and the set is put in place with one rename.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.checkpoint import Checkpoint, open_checkpoint
from snapshot_tool.core.drift import Review
from snapshot_tool.core.errors import GoldenExists, SnapError, UsageError
from snapshot_tool.core.interfaces import Progress
from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.determinism import make_deterministic
from snapshot_tool.devices import require_device
from snapshot_tool.environment import describe_machine, device_name, package_versions
from snapshot_tool.recording.answers import stage_answers
from snapshot_tool.recording.assemble import Assembly
from snapshot_tool.recording.oracle import stage_oracle
from snapshot_tool.recording.plan import Settings, make_plan
from snapshot_tool.recording.staging import Staging
from snapshot_tool.store.golden import Golden, find_goldens, open_golden
from snapshot_tool.store.layout import MANIFEST, ORACLE, OUTPUTS, SetLocation
from snapshot_tool.store.manifest import Manifest
from snapshot_tool.store.transaction import make_folder, recording_lock

DEFAULT_SEED = 42
DEFAULT_VARIANTS = 12
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """What to record.

    None for seed, variants and max_new_tokens: as recorded before, else 42, 12 and 20; for oracle
    and whole_outputs: as recorded before, else without. whole_outputs are globs of cases.
    """

    checkpoint: str
    goldens: Path
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    phases: tuple[Phase, ...] = PHASES
    variants: int | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    update: bool = False
    reason: str = ""
    resume: bool = False
    fresh: bool = False
    oracle: bool | None = None
    whole_outputs: tuple[str, ...] | None = None
    trusts_code: bool = False


@dataclass(frozen=True, slots=True)
class RecordOutcome:
    """What was recorded; `changed` is False where an update found nothing to change."""

    location: SetLocation
    manifest: Manifest
    changed: bool


def record(request: RecordRequest, progress: Progress, review: Review) -> RecordOutcome:
    """Record a golden set, or go on with an unfinished one.

    `review` is shown what an update changes before it is written, and returns the reason.
    """
    require_device(request.device)
    checkpoint = open_checkpoint(request.checkpoint, revision=request.revision)
    if checkpoint.resolved_from:
        progress.note(f"{checkpoint.resolved_from} is commit {checkpoint.revision}")
    location = SetLocation(
        request.goldens, checkpoint.name, checkpoint.revision, request.device, request.dtype
    )
    with recording_lock(location):
        existing = _existing_golden(request, location)
        staging = _open_staging(request, location)
        try:
            return _record(
                request,
                checkpoint,
                location,
                existing=existing,
                staging=staging,
                progress=progress,
                review=review,
            )
        except OSError as error:
            where = f" {error.filename}" if error.filename else f" below {request.goldens}"
            raise SnapError(
                f"cannot write{where}: {error.strerror or error}",
                "nothing that was recorded is lost: mend it, then go on with --resume",
            ) from error


def _existing_golden(request: RecordRequest, location: SetLocation) -> Golden | None:
    if not (location.folder / MANIFEST).exists():
        return None
    if not request.update:
        raise GoldenExists(
            f"{location} is recorded already in {location.folder}",
            "replace it with: --update --reason TEXT",
        )
    return open_golden(location.folder)


def _open_staging(request: RecordRequest, location: SetLocation) -> Staging:
    staging = Staging(location.work_folder / location.set_name)
    if request.resume and not staging.folder.exists():
        raise UsageError(
            f"there is no unfinished recording of {location} in {request.goldens}",
            "leave --resume out",
        )
    if staging.folder.exists() and not request.resume:
        if not request.fresh:
            raise GoldenExists(
                f"an unfinished recording of {location} is in {request.goldens}",
                "go on with --resume, or throw it away with --fresh",
            )
        staging.discard()
    return staging


def _siblings(location: SetLocation) -> list[Golden]:
    """Return the whole sets of the same revision on other devices."""
    folders = [found.folder for found in find_goldens(location.root) if found.manifest]
    return [
        open_golden(folder)
        for folder in folders
        if folder.parent == location.revision_folder and folder != location.folder
    ]


def _record(
    request: RecordRequest,
    checkpoint: Checkpoint,
    location: SetLocation,
    *,
    existing: Golden | None,
    staging: Staging,
    progress: Progress,
    review: Review,
) -> RecordOutcome:
    from snapshot_tool.reference import load_reference

    siblings = _siblings(location)
    template = existing.manifest if existing else siblings[0].manifest if siblings else None
    seed = _choose(request.seed, template.seed if template else DEFAULT_SEED)
    flags = make_deterministic(seed)
    with progress.stage(f"loading {checkpoint.name}", 1) as steps:
        load = functools.partial(
            load_reference,
            checkpoint.folder,
            device=request.device,
            seed=seed,
            trusts_code=request.trusts_code,
        )
        reference = load(dtype=request.dtype)
        next(steps)
    info = reference.info()
    oracle, whole_outputs = _extras(request, existing)
    settings = Settings(
        revision=checkpoint.revision,
        seed=seed,
        variants=_choose(
            request.variants, template.draws.variants if template else DEFAULT_VARIANTS
        ),
        max_new_tokens=_choose(
            request.max_new_tokens,
            template.generation.max_new_tokens if template else DEFAULT_NEW_TOKENS,
        ),
        phases=tuple(sorted(set(request.phases) & set(info.phases))),
        oracle=oracle,
        whole_outputs=whole_outputs,
        environment={
            **describe_machine(),
            **package_versions(),
            **flags,
            **info.environment,
            "device": device_name(request.device),
        },
    )
    make_folder(staging.folder)
    plan = make_plan(staging, settings, reference=reference, template=template, progress=progress)
    stage_answers(staging, plan, reference=reference, progress=progress)
    del reference  # the oracle loads models of its own
    if oracle:
        stage_oracle(
            staging,
            plan,
            info,
            own_dtype=request.dtype,
            load=lambda dtype: load(dtype=dtype),
            progress=progress,
        )
    assembly = Assembly(
        staging, plan, info, checkpoint, location, existing, siblings, request.reason, review
    )
    manifest, changed = assembly.write()
    staging.discard()
    return RecordOutcome(location, manifest, changed)


def _extras(request: RecordRequest, existing: Golden | None) -> tuple[bool, tuple[str, ...]]:
    """Return whether to record an oracle, and of which cases whole outputs."""
    files = existing.manifest.files if existing else {}
    oracle = ORACLE in files if request.oracle is None else request.oracle
    whole = request.whole_outputs
    if whole is None:
        tensors = files[OUTPUTS].tensors if OUTPUTS in files else ()
        whole = tuple(dict.fromkeys(key.partition("/")[0] for key in tensors))
    if oracle and set(request.phases) != set(PHASES):
        raise UsageError(
            "an oracle belongs to all phases", "record --phase all, or pass --no-oracle"
        )
    return oracle, whole


def _choose(asked_for: int | None, otherwise: int) -> int:
    return otherwise if asked_for is None else asked_for
