"""Record a golden set: plan the cases, run the reference, write everything in one commit.

The answers of every case are staged as small files under goldens/.snap as soon as they are
computed, so `--resume` can go on with a recording that was killed. At the end the parts are joined
into the files of the set, and the set is put in place with one rename.

Several processes may record together: the first holds the lock, plans and assembles; each runs its
part of the cases on a model of its own.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from snapshot_tool.base.checkpoint import open_checkpoint
from snapshot_tool.base.environment import (
    describe_machine,
    device_name,
    make_deterministic,
    package_versions,
    require_device,
)
from snapshot_tool.base.errors import GoldenExists, SnapError, UsageError, suggest
from snapshot_tool.base.files import make_folder
from snapshot_tool.base.protocol import PHASES, LoadSettings, Phase, Progress, ReferenceInfo
from snapshot_tool.base.tolerance import HALF_DTYPES
from snapshot_tool.diagnose.diff import Review
from snapshot_tool.goldens.find import read_revision
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.layout import (
    MANIFEST,
    MODULE_INPUTS,
    ORACLE,
    OUTPUTS,
    SetLocation,
    phase_file,
)
from snapshot_tool.goldens.manifest import Manifest, Storage
from snapshot_tool.goldens.transaction import recording_lock
from snapshot_tool.record.answers import keep_answers, stage_answers, stage_probes
from snapshot_tool.record.assemble import Assembly
from snapshot_tool.record.cases import changes_inputs, make_plan
from snapshot_tool.record.float64 import stage_float64
from snapshot_tool.record.plan import Earlier, Recording, Settings, Staging, read_plan
from snapshot_tool.record.request import (
    DEFAULT_NEW_TOKENS,
    DEFAULT_SEED,
    DEFAULT_VARIANTS,
    RecordRequest,
)
from snapshot_tool.reference import join_processes


@dataclass(frozen=True, slots=True)
class RecordOutcome:
    """The recorded set; `changed` is False if an update found nothing to change."""

    location: SetLocation
    manifest: Manifest
    changed: bool


def record(request: RecordRequest, progress: Progress, review: Review) -> RecordOutcome:
    """Record a golden set, or go on with an unfinished one.

    `review` shows what an update changes before it is written, and returns the reason.
    """
    require_device(request.device)
    prompts = request.read_prompts()
    processes = join_processes(request.device)
    if processes.count > 1 and request.device_map:
        raise UsageError(
            f"--device-map spreads one reference, and here are {processes.count} processes",
            "leave out --device-map, or record in one process",
        )
    checkpoint = open_checkpoint(request.checkpoint, revision=request.revision)
    if checkpoint.resolved_from:
        progress.note(f"{checkpoint.resolved_from} is commit {checkpoint.revision}")
    goldens = Path(request.goldens)
    location = SetLocation(
        goldens, checkpoint.name, checkpoint.revision, request.device, request.dtype
    )
    with recording_lock(location), _reported_errors(goldens):
        earlier = _open_earlier(request, location)
        staging = _open_staging(request, location)
        settings = _choose_settings(request, checkpoint.revision, prompts, earlier)
        if request.dtype in HALF_DTYPES and not settings.oracle:
            progress.note(
                f"a check of {request.dtype} needs an oracle, and this set has none: record a full "
                "set with --oracle, or check with --atol and --rtol"
            )
        # For weights that fit no device; removed after each run.
        offload = staging.folder.with_name(f"{staging.folder.name}.offload")
        load = LoadSettings(
            device=request.device,
            seed=settings.seed,
            trusts_code=request.trust_remote_code,
            device_map=request.device_map or "",
            max_memory=request.memory,
            offload=offload if request.device_map else None,
        )
        recording: Recording = processes.share(
            Recording(staging, checkpoint.folder, request.dtype, request.allow_nan, load)
        )
        try:
            flags = make_deterministic(settings.seed)
            with progress.stage(f"loading {checkpoint.name}", 1) as steps:
                reference = recording.load_reference(request.dtype)
                next(steps)
            info = reference.info()
            settings = msgspec.structs.replace(
                settings,
                phases=_choose_phases(request, info),
                environment={
                    **describe_machine(),
                    **package_versions(),
                    **flags,
                    **info.environment,
                    "device": device_name(request.device),
                },
            )
            _require_all_phases(request, settings, earlier.replaced)
            make_folder(staging.folder)
            plan = make_plan(
                staging,
                settings,
                reference=reference,
                earlier=earlier,
                redraw=request.redraw,
                progress=progress,
            )
            if earlier.replaced and request.case:
                kept = keep_answers(staging, plan, earlier.replaced, request.case)
                progress.note(f"{len(kept)} cases keep their recorded answers")
            processes.wait()  # the others read the plan
            share = plan.share_of(processes)
            stage_answers(recording, share, reference, progress)
            stage_probes(recording, share, reference)
            del reference  # the float64 reference loads models of its own
            stage_float64(recording, share, info, progress)
            processes.wait()  # all parts are staged
            manifest, changed = Assembly(
                staging=staging,
                plan=plan,
                info=info,
                checkpoint=checkpoint,
                location=location,
                earlier=earlier,
                dropped=request.dropped,
                reason=request.reason,
                review=review,
            ).write()
            staging.discard()
        except KeyboardInterrupt:
            if count := staging.count_cases():
                progress.note(f"cases kept: {count}; continue with the same command and --resume")
            raise
        finally:
            shutil.rmtree(offload, ignore_errors=True)
    return RecordOutcome(location, manifest, changed)


def help_to_record(device: str) -> None:
    """Run this process's part of the cases of a recording that another process leads."""
    require_device(device)
    processes = join_processes(device)
    recording: Recording = processes.share(None)
    make_deterministic(recording.load.seed)
    reference = recording.load_reference(recording.dtype)
    info = reference.info()
    processes.wait()  # the plan is written
    share = read_plan(recording.staging).share_of(processes)
    stage_answers(recording, share, reference, Progress())
    del reference
    stage_float64(recording, share, info, Progress())
    processes.wait()


@contextmanager
def _reported_errors(goldens: Path) -> Iterator[None]:
    """Raise SnapError for what the operating system raises, a full disk for example."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else f" below {goldens}"
        raise SnapError(
            f"cannot write{where}: {error.strerror or error}",
            "nothing that was recorded is lost: repair it, then continue with --resume",
        ) from error


def _open_earlier(request: RecordRequest, location: SetLocation) -> Earlier:
    """Return the sets of the same revision; raise GoldenExists unless one may be replaced."""
    exists = (location.folder / MANIFEST).exists()
    if exists and not request.update:
        raise GoldenExists(
            f"{location} is recorded already in {location.folder}",
            "replace it with: --update --reason TEXT",
        )
    siblings = (
        open_golden(found.folder, found.manifest)
        for found in read_revision(location.revision_folder)
        if found.manifest and found.folder != location.folder
    )
    return Earlier(open_golden(location.folder) if exists else None, tuple(siblings))


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


def _choose_settings(
    request: RecordRequest, revision: str, prompts: tuple[str, ...], earlier: Earlier
) -> Settings:
    """Return the settings that are known before the reference is loaded.

    Those that were not given are taken from an earlier set, else the defaults. Raises UsageError
    if they do not fit each other.
    """
    seed, variants, tokens = DEFAULT_SEED, DEFAULT_VARIANTS, DEFAULT_NEW_TOKENS
    storage = Storage.FULL
    if earlier.template:
        like = earlier.template.manifest
        seed, variants, tokens = like.seed, like.draws.variants, like.generation.max_new_tokens
        storage = like.storage
    storage = Storage(request.storage or storage)
    compact = storage is Storage.COMPACT
    files = earlier.replaced.manifest.files if earlier.replaced else {}
    if compact and request.oracle:
        raise UsageError(
            "a compact golden set has no oracle, which belongs to whole tensors",
            "leave out --oracle, or record with --storage full",
        )
    oracle = ORACLE in files and not compact if request.oracle is None else request.oracle
    if oracle and set(request.phases) != set(PHASES):
        raise UsageError(
            "an oracle belongs to all phases", "record --phase all, or pass --no-oracle"
        )

    def kept_before(file: str) -> tuple[str, ...]:
        tensors = files[file].tensors if file in files else ()
        return tuple(dict.fromkeys(key.partition("/")[0] for key in tensors))

    return Settings(
        revision=revision,
        seed=seed if request.seed is None else request.seed,
        variants=variants if request.variants is None else request.variants,
        max_new_tokens=tokens if request.max_new_tokens is None else request.max_new_tokens,
        phases=request.phases,
        environment={},
        oracle=oracle,
        whole_outputs=tuple(request.whole_outputs) or kept_before(OUTPUTS),
        modules=tuple(request.modules) or kept_before(MODULE_INPUTS),
        storage=storage,
        prompts=prompts,
        long=tuple(sorted(set(request.long))),
    )


def _choose_phases(request: RecordRequest, info: ReferenceInfo) -> tuple[Phase, ...]:
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
    request: RecordRequest, settings: Settings, replaced: Golden | None
) -> None:
    """Raise UsageError if the new version would lose phases that were not dropped.

    With --case also if cases could not keep their answers. Phases that are not recorded anew are
    carried over, unless their inputs change.
    """
    names = list(replaced.cases) if replaced else []
    for glob in request.case:
        if not fnmatch.filter(names, glob):
            raise UsageError(f"--case {glob} matches none of the cases", suggest(glob, names))
    if replaced is None:
        return
    changed = request.redraw or changes_inputs(replaced, settings)
    longer = settings.max_new_tokens != replaced.manifest.generation.max_new_tokens
    if request.case and (changed or longer):
        what = "inputs" if changed else "number of new tokens"
        raise UsageError(f"the {what} of all cases would change", "leave out --case")
    if not changed:
        return
    there = replaced.manifest.files
    lost = [
        phase.value
        for phase in PHASES
        if phase_file(phase) in there and phase not in (*settings.phases, *request.dropped)
    ]
    if lost:
        raise UsageError(
            f"the inputs change, and golden version {replaced.manifest.golden_version + 1} would "
            f"lack: {', '.join(lost)}",
            f"record --phase all, or name what is to go: --drop-phase {lost[0]}",
        )
