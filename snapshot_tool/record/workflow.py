"""Recording a golden set: plan the cases, ask the reference, write everything in one commit.

Every case's answers are staged as small files under goldens/.snap as soon as they are there, so a
recording that was killed goes on with `--resume` where it stopped. At the end the parts are joined
into the files of the set, and the set is put in place with one rename.

Several processes may record together: the first holds the lock, plans and assembles, and each asks
its part of the cases, on a model of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from snapshot_tool.base.checkpoint import Checkpoint, open_checkpoint
from snapshot_tool.base.environment import (
    Processes,
    describe_machine,
    device_name,
    make_deterministic,
    package_versions,
    require_device,
)
from snapshot_tool.base.errors import GoldenExists, SnapError, UsageError
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import (
    LoadSettings,
    Progress,
    Reference,
    ReferenceInfo,
    SilentProgress,
)
from snapshot_tool.diagnose.diff import Review
from snapshot_tool.goldens.find import read_revision
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import MANIFEST, ORACLE, OUTPUTS, SetLocation, phase_file
from snapshot_tool.goldens.manifest import Manifest, Storage
from snapshot_tool.goldens.transaction import make_folder, recording_lock
from snapshot_tool.record.answers import stage_answers
from snapshot_tool.record.assemble import Assembly
from snapshot_tool.record.cases import changes_inputs, make_plan
from snapshot_tool.record.oracle import stage_oracle
from snapshot_tool.record.plan import Earlier, Plan, Settings, Staging, read_plan

DEFAULT_SEED = 42
DEFAULT_VARIANTS = 12
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """What to record.

    None for seed, variants and max_new_tokens: as recorded before, else 42, 12 and 20; for storage:
    as before, else full; for oracle and whole_outputs: as before, else without. whole_outputs are
    globs of cases. redraw draws the variants anew where the set that is replaced has their recipes.
    prompts and long (numbers of tokens) are further cases. dropped are phases that the new version
    shall lack. allows_nan records answers with NaN or Inf in them.
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
    redraw: bool = False
    update: bool = False
    reason: str = ""
    resume: bool = False
    fresh: bool = False
    oracle: bool | None = None
    whole_outputs: tuple[str, ...] | None = None
    storage: Storage | None = None
    prompts: tuple[str, ...] = ()
    long: tuple[int, ...] = ()
    dropped: tuple[Phase, ...] = ()
    allows_nan: bool = False
    trusts_code: bool = False
    device_map: str = ""
    max_memory: tuple[tuple[str, str], ...] = ()


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
    from snapshot_tool.reference import join_processes

    require_device(request.device)
    processes = join_processes(request.device)
    if processes.count > 1 and request.device_map:
        raise UsageError(
            f"--device-map spreads one reference, and here are {processes.count} processes",
            "leave out --device-map, or record in one process",
        )
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
                processes=processes,
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
        finally:
            staging.forget_offload()


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


def _siblings(location: SetLocation) -> tuple[Golden, ...]:
    """Return the whole sets of the same revision on other devices."""
    return tuple(
        open_golden(found.folder, found.manifest)
        for found in read_revision(location.revision_folder)
        if found.manifest and found.folder != location.folder
    )


def _record(
    request: RecordRequest,
    checkpoint: Checkpoint,
    location: SetLocation,
    *,
    processes: Processes,
    existing: Golden | None,
    staging: Staging,
    progress: Progress,
    review: Review,
) -> RecordOutcome:
    earlier = Earlier(existing, _siblings(location))
    template = earlier.template.manifest if earlier.template else None
    storage = request.storage or (template.storage if template else Storage.FULL)
    oracle, whole_outputs = _extras(request, existing, storage)
    work = processes.share(
        _Work(
            staging=staging,
            checkpoint=checkpoint.folder,
            name=checkpoint.name,
            dtype=request.dtype,
            allows_nan=request.allows_nan,
            load=LoadSettings(
                device=request.device,
                seed=_choose(request.seed, template.seed if template else DEFAULT_SEED),
                trusts_code=request.trusts_code,
                device_map=request.device_map,
                max_memory=dict(request.max_memory),
                offload=staging.offload if request.device_map else None,
            ),
        )
    )

    def make(reference: Reference, flags: Mapping[str, str]) -> Plan:
        info = reference.info()
        settings = Settings(
            revision=checkpoint.revision,
            seed=work.load.seed,
            variants=_choose(
                request.variants, template.draws.variants if template else DEFAULT_VARIANTS
            ),
            max_new_tokens=_choose(
                request.max_new_tokens,
                template.generation.max_new_tokens if template else DEFAULT_NEW_TOKENS,
            ),
            phases=_phases(request, info),
            oracle=oracle,
            whole_outputs=whole_outputs,
            storage=storage,
            prompts=tuple(dict.fromkeys(request.prompts)),
            long=tuple(sorted(set(request.long))),
            environment={
                **describe_machine(),
                **package_versions(),
                **flags,
                **info.environment,
                "device": device_name(request.device),
            },
        )
        _require_all_phases(request, settings, existing)
        make_folder(staging.folder)
        plan = make_plan(
            staging,
            settings,
            reference=reference,
            earlier=earlier,
            redraw=request.redraw,
            progress=progress,
        )
        processes.wait()  # the others read it
        return plan

    plan, info = _ask(work, processes, make, progress)
    assembly = Assembly(
        staging=staging,
        plan=plan,
        info=info,
        checkpoint=checkpoint,
        location=location,
        earlier=earlier,
        dropped=request.dropped,
        reason=request.reason,
        review=review,
    )
    manifest, changed = assembly.write()
    staging.discard()
    return RecordOutcome(location, manifest, changed)


@dataclass(frozen=True, slots=True)
class _Work:
    """What every process of a recording has to know."""

    staging: Staging
    checkpoint: Path
    name: str
    dtype: str
    allows_nan: bool
    load: LoadSettings


def help_to_record(device: str) -> None:
    """Ask this process's part of the cases of a recording that another process leads."""
    from snapshot_tool.reference import join_processes

    require_device(device)
    processes = join_processes(device)
    work: _Work = processes.share(None)

    def read(_reference: Reference, _flags: Mapping[str, str]) -> Plan:
        processes.wait()
        return read_plan(work.staging)

    _ask(work, processes, read, SilentProgress())


def _ask(
    work: _Work,
    processes: Processes,
    planned: Callable[[Reference, Mapping[str, str]], Plan],
    progress: Progress,
) -> tuple[Plan, ReferenceInfo]:
    """Load the reference and stage its answers to this process's part of the plan's cases."""
    from snapshot_tool.reference import load_reference

    flags = make_deterministic(work.load.seed)
    load = functools.partial(load_reference, work.checkpoint, settings=work.load)
    with progress.stage(f"loading {work.name}", 1) as steps:
        reference = load(dtype=work.dtype)
        next(steps)
    info = reference.info()
    plan = planned(reference, flags)
    part = plan.part_for(processes)
    stage_answers(
        work.staging, part, reference=reference, progress=progress, allows_nan=work.allows_nan
    )
    del reference  # the oracle loads models of its own
    if plan.settings.oracle:
        stage_oracle(
            work.staging,
            part,
            info,
            own_dtype=work.dtype,
            load=lambda dtype: load(dtype=dtype),
            progress=progress,
        )
    processes.wait()  # all parts are staged
    return plan, info


def _phases(request: RecordRequest, info: ReferenceInfo) -> tuple[Phase, ...]:
    """Return the phases to record; raise UsageError if the model has none of those named."""
    phases = tuple(sorted((set(request.phases) & set(info.phases)) - set(request.dropped)))
    if not phases:
        named = ", ".join(phase.value for phase in request.phases)
        raise UsageError(
            f"{info.family} has no phase {named}, or it is dropped",
            f"it has: {', '.join(phase.value for phase in info.phases)}",
        )
    return phases


def _require_all_phases(
    request: RecordRequest, settings: Settings, existing: Golden | None
) -> None:
    """Raise UsageError if the new version would lack phases of the replaced one unnamed.

    Phases that are not recorded anew are carried over, unless their inputs change.
    """
    if existing is None or not (request.redraw or changes_inputs(existing, settings)):
        return
    there = existing.manifest.files
    lost = [
        phase.value
        for phase in PHASES
        if phase_file(phase) in there and phase not in (*settings.phases, *request.dropped)
    ]
    if lost:
        raise UsageError(
            f"the inputs change, and golden version {existing.manifest.golden_version + 1} would "
            f"lack: {', '.join(lost)}",
            f"record --phase all, or name what is to go: --drop-phase {lost[0]}",
        )


def _extras(
    request: RecordRequest, existing: Golden | None, storage: Storage
) -> tuple[bool, tuple[str, ...]]:
    """Return whether to record an oracle, and of which cases whole outputs."""
    files = existing.manifest.files if existing else {}
    compact = storage is Storage.COMPACT
    if compact and request.oracle:
        raise UsageError(
            "a compact golden set has no oracle, which belongs to whole tensors",
            "leave out --oracle, or record with --storage full",
        )
    oracle = ORACLE in files and not compact if request.oracle is None else request.oracle
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
