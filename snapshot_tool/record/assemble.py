"""From staged parts to a golden set: files joined, manifest written, version counted."""

from __future__ import annotations

import datetime as dt
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from snapshot_tool.base.checkpoint import Checkpoint, is_folder_name
from snapshot_tool.base.errors import GoldenExists, printable
from snapshot_tool.base.phases import PHASES, Phase
from snapshot_tool.base.protocol import ReferenceInfo
from snapshot_tool.base.tolerance import DEFAULT_TOLERANCES
from snapshot_tool.diagnose.diff import Review, SetDiff, describe_diff, diff_goldens
from snapshot_tool.families.family import ANSWERS
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import (
    INPUTS,
    MANIFEST,
    ORACLE,
    OUTPUTS,
    TAPS,
    SetLocation,
    phase_file,
)
from snapshot_tool.goldens.manifest import (
    SCHEMA_VERSION,
    CaseEntry,
    CheckpointEntry,
    FileEntry,
    GenerationEntry,
    HistoryEntry,
    Manifest,
    TapsEntry,
    encode_readable,
)
from snapshot_tool.goldens.tensors import describe_file, join_files
from snapshot_tool.goldens.transaction import commit, make_folder, write_atomically
from snapshot_tool.record.answers import FORWARD_PASS, generated_text_file, read_notes
from snapshot_tool.record.plan import Earlier, Plan, PlannedCase, Staging

_IMAGE_PHASES = (Phase.PREPROCESSING, Phase.VISION, Phase.CONNECTOR)


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a golden set is assembled from.

    Args:
        earlier: the sets of the same revision.
        dropped: phases of the replaced set that the new version does not take over.
        reason: why it is recorded; kept in the history of a first version.
        review: asked for the reason of any further version, once what moved is known.
    """

    staging: Staging
    plan: Plan
    info: ReferenceInfo
    checkpoint: Checkpoint
    location: SetLocation
    earlier: Earlier
    dropped: tuple[Phase, ...]
    reason: str
    review: Review

    @property
    def existing(self) -> Golden | None:
        """The set that is replaced, or None."""
        return self.earlier.replaced

    def write(self) -> tuple[Manifest, bool]:
        """Put the set in place; return its manifest, and False where nothing had to change.

        Where the review declines, the old set and everything staged stay as they are.
        """
        folder = self.staging.tree / self.location.set_name
        shutil.rmtree(self.staging.tree, ignore_errors=True)
        make_folder(folder)
        files = self._join(folder)
        self._require_shared_inputs(files[INPUTS])
        manifest = self._manifest(files)
        if self.existing:
            if _same_answers(self.existing.manifest, manifest):
                return self.existing.manifest, False
            version = self.existing.manifest.golden_version + 1
            manifest = msgspec.structs.replace(manifest, golden_version=version)
            drift = diff_goldens(self.existing, Golden(folder, manifest))
            reason = printable(self.review(drift))
            manifest = _with_history(manifest, self.existing.manifest, drift, reason=reason)
        write_atomically(folder / MANIFEST, encode_readable(manifest))
        commit(self.staging.tree, self.location)
        return manifest, True

    def _join(self, folder: Path) -> dict[str, FileEntry]:
        """Join the parts of each file; carry over what this recording was not asked for.

        An oracle is of all phases and is never carried over.
        """
        phases = self.plan.settings.phases
        names = [INPUTS, *(phase_file(phase) for phase in PHASES if phase in phases)]
        if FORWARD_PASS & set(phases):
            names += [TAPS, *([OUTPUTS] if self.plan.settings.whole_outputs else [])]
        names += [ORACLE] if self.plan.settings.oracle else []
        files = {}
        for name in names:
            target = (self.staging.tree if name == INPUTS else folder) / name
            staged = {case.name: self.staging.part(case.name, name) for case in self.plan.cases}
            join_files({case: part for case, part in staged.items() if part.exists()}, target)
            files[name] = describe_file(target)
        if self.existing is None:
            return files
        # Answers to other inputs would be no answers to these.
        same = self.existing.manifest.files[INPUTS] == files[INPUTS]
        lost = {ORACLE, *(phase_file(phase) for phase in self.dropped)}
        if TAPS in files or not self._carries_forward_pass():
            lost |= {TAPS, OUTPUTS}
        for name in sorted(self.existing.manifest.files.keys() - files.keys() - lost):
            if not same:
                raise GoldenExists(
                    f"the inputs have changed: {name} of golden version "
                    f"{self.existing.manifest.golden_version} does not belong to them",
                    "record --phase all",
                )
            shutil.copy2(self.existing.folder / name, folder / name)
            files[name] = self.existing.manifest.files[name]
        return files

    def _carries_forward_pass(self) -> bool:
        """Return whether a phase is carried over that the taps belong to."""
        there = self.existing.manifest.files if self.existing else {}
        return any(phase_file(p) in there for p in FORWARD_PASS if p not in self.dropped)

    def _require_shared_inputs(self, inputs: FileEntry) -> None:
        for sibling in self.earlier.siblings:
            if sibling.manifest.files[INPUTS] != inputs:
                raise GoldenExists(
                    f"{sibling.manifest.title} shares the inputs of this revision, and these would "
                    "change them",
                    "record with its seed, number of variants and storage, or remove it first",
                )

    def _manifest(self, files: dict[str, FileEntry]) -> Manifest:
        settings, info = self.plan.settings, self.info
        first = HistoryEntry(
            version=1, when=_today(), reason=printable(self.reason) or "recorded", moved=()
        )
        return Manifest(
            schema_version=SCHEMA_VERSION,
            golden_version=1,
            history=(first,),
            checkpoint=CheckpointEntry(
                name=self.checkpoint.name,
                revision=self.checkpoint.revision,
                family=info.family,
                location=_relative_location(self.checkpoint, self.location.root),
                files=dict(self.checkpoint.files),
                config=dict(info.config),
                unknown_fields=info.unknown_fields,
                changed_fields=info.changed_fields,
                unused_weights=info.unused_weights,
            ),
            device=self.location.device,
            dtype=self.location.dtype,
            seed=settings.seed,
            environment=settings.environment,
            draws=self.plan.draws,
            generation=GenerationEntry(
                max_new_tokens=settings.max_new_tokens,
                eos_token_ids=info.eos_token_ids,
                pad_token_id=info.pad_token_id,
            ),
            cases=tuple(self._case(case, files) for case in self.plan.cases),
            tolerances={phase: DEFAULT_TOLERANCES[phase] for phase in info.phases},
            taps=TapsEntry(seed=settings.seed, modules=info.modules),
            files=files,
            storage=settings.storage,
            warnings=self._warnings(),
        )

    def _warnings(self) -> tuple[str, ...]:
        """Return what was warned of, also when phases were recorded that are carried over."""
        found = set(self.plan.warnings)
        for case in self.plan.cases:
            found |= set(read_notes(self.staging, case.name).warnings)
        if self.existing and set(self.plan.settings.phases) != set(self.info.phases):
            found |= set(self.existing.manifest.warnings)
        return tuple(sorted(found))

    def _case(self, case: PlannedCase, files: dict[str, FileEntry]) -> CaseEntry:
        tensors = files[INPUTS].tensors
        return CaseEntry(
            name=case.name,
            origin=case.origin,
            recipe=case.recipe,
            text=case.text,
            phases=tuple(p for p in self.info.phases if case.tiles or p not in _IMAGE_PHASES),
            images=len(case.named.recipe.images),
            tiles=case.tiles,
            tokens=tensors[f"{case.name}/input_ids"].shape[1],
            generated=self._generated_text(case.name),
            eos_token_ids=case.eos_token_ids,
            not_finite=self._not_finite(case.name),
        )

    def _not_finite(self, case: str) -> tuple[str, ...]:
        """Return the answers with NaN or Inf, those that are carried over among them."""
        recorded = self.plan.settings.phases
        old = self.existing.manifest.cases if self.existing else ()
        kept = [n for entry in old if entry.name == case for n in entry.not_finite]
        carried = [n for n in kept if Phase(n.partition("/")[0]) not in (*recorded, *self.dropped)]
        return (*carried, *read_notes(self.staging, case).not_finite)

    def _generated_text(self, case: str) -> str:
        staged = self.staging.part(case, generated_text_file())
        if staged.exists():
            return staged.read_text(encoding="utf-8")
        old = self.existing.manifest.cases if self.existing else ()
        return next((entry.generated for entry in old if entry.name == case), "")


def _same_answers(old: Manifest, new: Manifest) -> bool:
    declared = [(m.checkpoint.family, m.environment.get(ANSWERS)) for m in (old, new)]
    return (
        new.files == old.files and new.generation == old.generation and declared[0] == declared[1]
    )


def _with_history(new: Manifest, old: Manifest, drift: SetDiff, *, reason: str) -> Manifest:
    moved = tuple(describe_diff(drift)) or ("no recorded tensor",)
    entry = HistoryEntry(version=new.golden_version, when=_today(), reason=reason, moved=moved)
    return msgspec.structs.replace(new, history=(*old.history, entry))


def _relative_location(checkpoint: Checkpoint, goldens: Path) -> str | None:
    """Return a folder's place below the goldens folder's parent; None elsewhere and for the hub."""
    if not is_folder_name(checkpoint.name):
        return None
    try:
        return checkpoint.folder.resolve().relative_to(goldens.resolve().parent).as_posix()
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
