"""Recording a golden set: draw the cases, ask the reference, write everything in one commit.

Every case's answers are staged as small files under goldens/.snap as soon as they are there, so a
recording that was killed goes on with `--resume` where it stopped. At the end the parts are joined
into the files of the set and the set is put in place with one rename.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from snapshot_tool.checkpoint import Checkpoint, open_checkpoint
from snapshot_tool.core.errors import (
    GoldenExists,
    InputRefused,
    ReferenceUnavailable,
    SnapError,
    UsageError,
)
from snapshot_tool.core.interfaces import CaseInputs, Progress, Reference, ReferenceInfo
from snapshot_tool.core.phases import PHASES, Phase
from snapshot_tool.core.recipes import FIXED_CASES, NamedRecipe
from snapshot_tool.core.sketch import MAX_DIMENSIONS, Sketch, sketch
from snapshot_tool.core.tolerance import DEFAULT_TOLERANCES
from snapshot_tool.determinism import make_deterministic
from snapshot_tool.devices import require_device
from snapshot_tool.drift import describe_drift, diff_goldens
from snapshot_tool.environment import describe_machine, device_name, package_versions
from snapshot_tool.images import render
from snapshot_tool.store import parts
from snapshot_tool.store.golden import Golden, find_goldens, open_golden
from snapshot_tool.store.layout import INPUTS, MANIFEST, TAPS, SetLocation, phase_file
from snapshot_tool.store.manifest import (
    SCHEMA_VERSION,
    CaseEntry,
    CheckpointEntry,
    Draws,
    FileEntry,
    GenerationEntry,
    HistoryEntry,
    Manifest,
    TapsEntry,
    case_recipe,
    encode,
    to_builtins,
)
from snapshot_tool.store.tensors import describe_file, join_files
from snapshot_tool.store.transaction import (
    commit,
    make_folder,
    recording_lock,
    sync_folder,
    write_atomically,
)

if TYPE_CHECKING:
    import torch

DEFAULT_SEED = 42
DEFAULT_VARIANTS = 12
DEFAULT_NEW_TOKENS = 20
_MAX_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class RecordRequest:
    """What to record.

    None for seed, variants and max_new_tokens: as recorded before, else 42, 12 and 20.
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


@dataclass(frozen=True, slots=True)
class RecordOutcome:
    """What was recorded; `changed` is False where an update found nothing to change."""

    location: SetLocation
    manifest: Manifest
    changed: bool


class _PlannedCase(msgspec.Struct, frozen=True):
    """A case whose inputs are staged."""

    name: str
    origin: str
    recipe: object
    text: str


class _Settings(msgspec.Struct, frozen=True):
    """What must be the same for a recording to go on."""

    revision: str
    seed: int
    variants: int
    max_new_tokens: int
    phases: tuple[Phase, ...]
    environment: dict[str, str]


class _Plan(msgspec.Struct, frozen=True):
    """What is being recorded: kept in the staging folder for `--resume`."""

    settings: _Settings
    cases: tuple[_PlannedCase, ...]
    draws: Draws


def record(request: RecordRequest, progress: Progress) -> RecordOutcome:
    """Record a golden set, or go on with an unfinished one."""
    if request.update and not request.reason:
        raise UsageError("--update needs --reason TEXT", "say why the golden changes")
    require_device(request.device)
    checkpoint = open_checkpoint(request.checkpoint, revision=request.revision)
    if checkpoint.resolved_from:
        progress.note(f"{checkpoint.resolved_from} is commit {checkpoint.revision}")
    location = SetLocation(
        request.goldens, checkpoint.name, checkpoint.revision, request.device, request.dtype
    )
    with recording_lock(location):
        recorder = _open_recorder(request, checkpoint, location, progress)
        return recorder.run()


def _open_recorder(
    request: RecordRequest, checkpoint: Checkpoint, location: SetLocation, progress: Progress
) -> _Recorder:
    existing = _existing_golden(request, location)
    staging = location.work_folder / location.set_name
    if not request.resume and staging.exists():
        if not request.fresh:
            raise GoldenExists(
                f"an unfinished recording of {location} is in {request.goldens}",
                "go on with --resume, or throw it away with --fresh",
            )
        shutil.rmtree(staging)
    if request.resume and not (staging / "plan.json").exists() and not staging.exists():
        raise UsageError(
            f"there is no unfinished recording of {location} in {request.goldens}",
            "leave --resume out",
        )
    siblings = _siblings(location)
    template = existing.manifest if existing else siblings[0].manifest if siblings else None
    return _Recorder(request, checkpoint, location, staging, existing, siblings, template, progress)


def _existing_golden(request: RecordRequest, location: SetLocation) -> Golden | None:
    if not (location.folder / MANIFEST).exists():
        return None
    if not request.update:
        raise GoldenExists(
            f"{location} is recorded already in {location.folder}",
            "replace it with: --update --reason TEXT",
        )
    return open_golden(location.folder)


def _siblings(location: SetLocation) -> list[Golden]:
    """Return the whole sets of the same revision on other devices: they share its inputs."""
    folders = [found.folder for found in find_goldens(location.root) if found.manifest]
    return [
        open_golden(folder)
        for folder in folders
        if folder.parent == location.revision_folder and folder != location.folder
    ]


@dataclass(frozen=True, slots=True)
class _Recorder:
    """One recording under way; settings not asked for come from `template`, an earlier one."""

    request: RecordRequest
    checkpoint: Checkpoint
    location: SetLocation
    staging: Path
    existing: Golden | None
    siblings: list[Golden]
    template: Manifest | None
    progress: Progress

    def run(self) -> RecordOutcome:
        """Ask the reference what is not staged yet, then write the set."""
        from snapshot_tool.reference import load_reference

        make_folder(self.staging)
        settings = make_deterministic(self._seed)
        with self.progress.stage(f"loading {self.checkpoint.name}", 1) as steps:
            reference = load_reference(
                self.checkpoint.folder,
                device=self.request.device,
                dtype=self.request.dtype,
                seed=self._seed,
            )
            next(steps)
        info = reference.info()
        environment = {
            **describe_machine(),
            **package_versions(),
            **settings,
            **info.environment,
            "device": device_name(self.request.device),
        }
        plan = self._plan(reference, environment)
        self._stage_answers(reference, info, plan)
        return self._write(info, plan)

    @property
    def _seed(self) -> int:
        stored = self.template.seed if self.template else DEFAULT_SEED
        return stored if self.request.seed is None else self.request.seed

    @property
    def _variants(self) -> int:
        stored = self.template.draws.variants if self.template else DEFAULT_VARIANTS
        return stored if self.request.variants is None else self.request.variants

    @property
    def _max_new_tokens(self) -> int:
        stored = self.template.generation.max_new_tokens if self.template else DEFAULT_NEW_TOKENS
        return stored if self.request.max_new_tokens is None else self.request.max_new_tokens

    def _part(self, case: str, file: str) -> Path:
        return self.staging / "parts" / case / file

    # Planning: which cases, and what the processor makes of them.

    def _plan(self, reference: Reference, environment: dict[str, str]) -> _Plan:
        path = self.staging / "plan.json"
        settings = _Settings(
            self.checkpoint.revision,
            self._seed,
            self._variants,
            self._max_new_tokens,
            tuple(sorted(self.request.phases)),
            environment,
        )
        if path.exists():
            plan = msgspec.json.decode(path.read_bytes(), type=_Plan)
            _require_same_settings(plan.settings, settings)
            return plan
        plan = self._draw_plan(reference, settings)
        write_atomically(path, msgspec.json.encode(plan))
        return plan

    def _draw_plan(self, reference: Reference, settings: _Settings) -> _Plan:
        stored = self.template
        if stored and (stored.seed, stored.draws.variants) == (self._seed, self._variants):
            recipes = [case_recipe(case) for case in stored.cases]
            with self.progress.stage("preparing cases", len(recipes)) as steps:
                cases = [self._prepare(reference, recipe, steps) for recipe in recipes]
            return _Plan(settings, tuple(cases), stored.draws)
        reasons: dict[str, int] = {}
        with self.progress.stage("drawing cases", len(FIXED_CASES) + self._variants) as steps:
            cases = [self._prepare(reference, recipe, steps) for recipe in FIXED_CASES]
            for index in range(self._variants):
                cases.append(self._draw_case(reference, index, reasons, steps))
        draws = Draws(variants=self._variants, refused=sum(reasons.values()), reasons=reasons)
        return _Plan(settings, tuple(cases), draws)

    def _draw_case(
        self, reference: Reference, index: int, reasons: dict[str, int], steps: Iterator[int]
    ) -> _PlannedCase:
        """Draw a variant until the reference takes it, counting what it refused."""
        from snapshot_tool.variants.recorded import draw_recipe

        for attempt in range(_MAX_ATTEMPTS):
            recipe = draw_recipe(seed=self._seed, index=index, attempt=attempt)
            named = NamedRecipe(f"variant-{index + 1:02}", "variant", recipe)
            try:
                return self._prepare(reference, named, steps)
            except InputRefused as refusal:
                reasons[str(refusal)] = reasons.get(str(refusal), 0) + 1
        raise ReferenceUnavailable(
            f"the reference refused {_MAX_ATTEMPTS} draws of variant {index + 1}, the last for: "
            f"{list(reasons)[-1]}",
            "record with another --seed or fewer --variants",
        )

    def _prepare(
        self, reference: Reference, named: NamedRecipe, steps: Iterator[int]
    ) -> _PlannedCase:
        images = [render(image) for image in named.recipe.images]
        prepared = reference.prepare(named.recipe, images)
        save_part(self._part(named.name, INPUTS), parts.input_tensors(prepared, images))
        if images:
            grids = {"image_grids": prepared.image_grids}
            save_part(self._part(named.name, phase_file(Phase.PREPROCESSING)), grids)
        next(steps)
        return _PlannedCase(named.name, named.origin, to_builtins(named.recipe), prepared.text)

    # Asking the reference.

    def _stage_answers(self, reference: Reference, info: ReferenceInfo, plan: _Plan) -> None:
        with self.progress.stage("recording cases", len(plan.cases)) as steps:
            for case in plan.cases:
                inputs = parts.read_inputs(self._part(case.name, INPUTS))
                self._stage_forward(reference, info, case.name, inputs)
                self._stage_generation(reference, case.name, inputs)
                next(steps)

    def _stage_forward(
        self, reference: Reference, info: ReferenceInfo, case: str, inputs: CaseInputs
    ) -> None:
        wanted = {Phase.VISION, Phase.CONNECTOR, Phase.FORWARD} & set(self.request.phases)
        # taps.safetensors is written last of a forward pass: its presence says the pass is staged.
        if not wanted or self._part(case, TAPS).exists():
            return
        sketches: dict[str, Sketch] = {}

        def observe(module: str, output: torch.Tensor) -> None:
            if output.is_floating_point() and output.dim() <= MAX_DIMENSIONS:
                sketches[module] = sketch(output, seed=self._seed)

        answer = reference.forward(inputs, observe=observe)
        for phase in wanted & set(answer.outputs):
            save_part(self._part(case, phase_file(phase)), dict(answer.outputs[phase]))
        if Phase.FORWARD in wanted:
            tensors = parts.forward_tensors(answer.logits, inputs, seed=self._seed)
            save_part(self._part(case, phase_file(Phase.FORWARD)), tensors)
        save_part(self._part(case, TAPS), parts.tap_tensors(sketches, info.modules))

    def _stage_generation(self, reference: Reference, case: str, inputs: CaseInputs) -> None:
        part = self._part(case, phase_file(Phase.GENERATE))
        if Phase.GENERATE not in self.request.phases or part.exists():
            return
        generation = reference.generate(inputs, max_new_tokens=self._max_new_tokens)
        write_atomically(part.with_suffix(".txt"), generation.text.encode("utf-8", "replace"))
        save_part(part, parts.generate_tensors(generation))

    # Writing the set.

    def _write(self, info: ReferenceInfo, plan: _Plan) -> RecordOutcome:
        tree = self.staging / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        folder = tree / self.location.set_name
        make_folder(folder)
        files = self._join(plan, tree, folder)
        self._require_shared_inputs(files[INPUTS])
        manifest = self._manifest(info, plan, files)
        if self.existing:
            moved = self._moved(Golden(folder, manifest))
            if not moved:
                shutil.rmtree(self.staging)
                return RecordOutcome(self.location, self.existing.manifest, changed=False)
            manifest = self._next_version(manifest, moved)
        write_atomically(folder / MANIFEST, encode(manifest))
        commit(tree, self.location)
        shutil.rmtree(self.staging)
        sync_folder(self.staging.parent)
        return RecordOutcome(self.location, manifest, changed=True)

    def _join(self, plan: _Plan, tree: Path, folder: Path) -> dict[str, FileEntry]:
        """Join the parts of each file; carry over the phases that were not asked for."""
        phases = [phase for phase in PHASES if phase in self.request.phases]
        files = {}
        for name in [INPUTS, *(phase_file(phase) for phase in phases), TAPS]:
            target = (tree if name == INPUTS else folder) / name
            staged = {case.name: self._part(case.name, name) for case in plan.cases}
            join_files({case: part for case, part in staged.items() if part.exists()}, target)
            files[name] = describe_file(target)
        if self.existing and self.existing.manifest.files[INPUTS] == files[INPUTS]:
            for name, entry in self.existing.manifest.files.items():
                if name not in files:
                    shutil.copy2(self.existing.folder / name, folder / name)
                    files[name] = entry
        return files

    def _require_shared_inputs(self, inputs: FileEntry) -> None:
        for sibling in self.siblings:
            if sibling.manifest.files[INPUTS] != inputs:
                raise GoldenExists(
                    f"{sibling.manifest.title} shares the inputs of this revision, and these would "
                    "change them",
                    "record with its seed and number of variants, or remove it first",
                )

    def _manifest(self, info: ReferenceInfo, plan: _Plan, files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            schema_version=SCHEMA_VERSION,
            golden_version=1,
            history=(
                HistoryEntry(
                    version=1, when=_today(), reason=self.request.reason or "recorded", moved=()
                ),
            ),
            checkpoint=CheckpointEntry(
                name=self.checkpoint.name,
                revision=self.checkpoint.revision,
                family=info.family,
                location=_relative_location(self.checkpoint.folder, self.request.goldens),
                files=dict(self.checkpoint.files),
                config=dict(info.config),
            ),
            device=self.request.device,
            dtype=self.request.dtype,
            seed=self._seed,
            environment=plan.settings.environment,
            draws=plan.draws,
            generation=GenerationEntry(
                max_new_tokens=self._max_new_tokens,
                eos_token_ids=info.eos_token_ids,
                pad_token_id=info.pad_token_id,
            ),
            cases=tuple(self._case_entry(case, info, files) for case in plan.cases),
            tolerances={phase: DEFAULT_TOLERANCES[phase] for phase in info.phases},
            taps=TapsEntry(seed=self._seed, modules=info.modules),
            files=files,
        )

    def _case_entry(
        self, case: _PlannedCase, info: ReferenceInfo, files: dict[str, FileEntry]
    ) -> CaseEntry:
        tensors = files[INPUTS].tensors
        pixels = tensors.get(f"{case.name}/pixel_values")
        named = msgspec.convert(to_builtins(case), NamedRecipe)
        image_phases = (Phase.PREPROCESSING, Phase.VISION, Phase.CONNECTOR)
        return CaseEntry(
            name=case.name,
            origin=case.origin,
            recipe=case.recipe,
            text=case.text,
            phases=tuple(p for p in info.phases if pixels or p not in image_phases),
            images=len(named.recipe.images),
            tiles=pixels.shape[0] if pixels else 0,
            tokens=tensors[f"{case.name}/input_ids"].shape[1],
            generated=self._generated_text(case.name),
        )

    def _generated_text(self, case: str) -> str:
        staged = self._part(case, phase_file(Phase.GENERATE)).with_suffix(".txt")
        if staged.exists():
            return staged.read_text(encoding="utf-8")
        old = self.existing.manifest.cases if self.existing else ()
        return next((entry.generated for entry in old if entry.name == case), "")

    def _moved(self, new: Golden) -> tuple[str, ...]:
        """Say what differs from the golden that is replaced; nothing where all bytes are equal."""
        if self.existing is None:
            return ()
        old = self.existing.manifest
        if new.manifest.files == old.files and new.manifest.generation == old.generation:
            return ()
        drift = describe_drift(diff_goldens(self.existing, new))
        return tuple(drift) or ("the set's files, within nothing that is compared",)

    def _next_version(self, manifest: Manifest, moved: tuple[str, ...]) -> Manifest:
        if self.existing is None:
            return manifest
        old = self.existing.manifest
        version = old.golden_version + 1
        entry = HistoryEntry(
            version=version, when=_today(), reason=self.request.reason, moved=moved
        )
        return msgspec.structs.replace(
            manifest, golden_version=version, history=(*old.history, entry)
        )


def save_part(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one case's tensors of one file, atomically."""
    from safetensors.torch import save

    make_folder(path.parent)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, save(contiguous))
    except OSError as error:
        raise SnapError(
            f"cannot write {path}: {error.strerror}", "make room, then go on with --resume"
        ) from error


def _require_same_settings(old: _Settings, new: _Settings) -> None:
    for name in _Settings.__struct_fields__:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise UsageError(
                f"the unfinished recording has another {name}: {_difference(before, now)}",
                "finish it with the settings it began with, or throw it away with --fresh",
            )


def _difference(before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        return f"{keys[0]} was {before.get(keys[0])}, is {now.get(keys[0])}"
    return f"it was {before}, is {now}"


def _relative_location(folder: Path, goldens: Path) -> str | None:
    """Return a checkpoint folder's place below the goldens folder's parent, or None elsewhere."""
    try:
        return folder.resolve().relative_to(goldens.resolve().parent).as_posix()
    except ValueError:
        return None


def _today() -> str:
    """Return the day in UTC: a day, not an instant, so that recording twice gives equal bytes.

    SOURCE_DATE_EPOCH (reproducible-builds.org) overrides it.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = dt.datetime.now(dt.UTC)
    day = dt.datetime.fromtimestamp(int(epoch), dt.UTC) if epoch else now
    return day.date().isoformat()
