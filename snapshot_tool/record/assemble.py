"""Assemble a golden set from staged parts: join files, write the manifest, commit."""

from __future__ import annotations

import datetime as dt
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from snapshot_tool.base import __version__
from snapshot_tool.base.checkpoint import Checkpoint, is_folder_name
from snapshot_tool.base.errors import GoldenExists, printable
from snapshot_tool.base.files import make_folder, write_atomically
from snapshot_tool.base.protocol import PHASES, Phase, ReferenceInfo
from snapshot_tool.base.tolerance import DEFAULT_TOLERANCES
from snapshot_tool.diagnose.diff import Review, describe_diff, diff_goldens
from snapshot_tool.families.family import ANSWERS
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import (
    INPUTS,
    MANIFEST,
    MODULE_INPUTS,
    ORACLE,
    OUTPUTS,
    PROBES,
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
from snapshot_tool.goldens.transaction import commit
from snapshot_tool.record.answers import FORWARD_PASS, GENERATED_TEXT, read_notes
from snapshot_tool.record.plan import Earlier, Plan, PlannedCase, Staging

_IMAGE_PHASES = (Phase.PREPROCESSING, Phase.VISION, Phase.CONNECTOR)


@dataclass(frozen=True, slots=True)
class Assembly:
    """The sources of a golden set.

    Args:
        earlier: the sets of the same revision.
        dropped: phases of the replaced set that the new version does not take over.
        reason: the reason of a first version, for its history.
        review: returns the reason of any further version, given what moved.
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

    def write(self) -> tuple[Manifest, bool]:
        """Commit the set; return its manifest, and False if nothing changed.

        If the review declines, the old set and everything staged stay as they are.
        """
        folder = self.staging.tree / self.location.set_name
        shutil.rmtree(self.staging.tree, ignore_errors=True)
        make_folder(folder)
        files = self._join(folder)
        self.earlier.require_shared_inputs(lambda sibling: sibling.files[INPUTS] == files[INPUTS])
        manifest = self._manifest(files)
        replaced = self.earlier.replaced
        if replaced:
            old = replaced.manifest
            if _answers(old) == _answers(manifest):
                return old, False
            version = old.golden_version + 1
            manifest = msgspec.structs.replace(manifest, golden_version=version)
            diff = diff_goldens(replaced, Golden(folder, manifest))
            reason = printable(self.review(diff))
            moved = tuple(describe_diff(diff)) or ("no recorded tensor",)
            entry = msgspec.structs.replace(
                manifest.history[0], version=version, reason=reason, moved=moved
            )
            manifest = msgspec.structs.replace(manifest, history=(*old.history, entry))
        write_atomically(folder / MANIFEST, encode_readable(manifest))
        commit(self.staging.tree, self.location)
        return manifest, True

    def _join(self, folder: Path) -> dict[str, FileEntry]:
        """Join the parts of each file; carry over the files of phases that are not recorded.

        The float64 reference belongs to all phases and is never carried over.
        """
        settings = self.plan.settings
        names = [INPUTS, *(phase_file(phase) for phase in PHASES if phase in settings.phases)]
        if FORWARD_PASS & set(settings.phases):
            names += [TAPS, OUTPUTS] if settings.whole_outputs or settings.modules else [TAPS]
            names += [MODULE_INPUTS, PROBES] if settings.modules else [PROBES]
        names += [ORACLE] if settings.oracle else []
        files = {}
        for name in names:
            target = (self.staging.tree if name == INPUTS else folder) / name
            staged = {case.name: self.staging.part(case.name, name) for case in self.plan.cases}
            there = {case: part for case, part in staged.items() if part.exists()}
            if there or name != PROBES:  # not every model has probes
                join_files(there, target)
                files[name] = describe_file(target)
        replaced = self.earlier.replaced
        if replaced is None:
            return files
        old = replaced.manifest
        lost = {ORACLE, *(phase_file(phase) for phase in self.dropped)}
        forward_pass = [phase_file(p) for p in FORWARD_PASS if p not in self.dropped]
        if TAPS in files or not any(name in old.files for name in forward_pass):
            lost |= {TAPS, OUTPUTS, MODULE_INPUTS, PROBES}
        for name in sorted(old.files.keys() - files.keys() - lost):
            if old.files[INPUTS] != files[INPUTS]:
                raise GoldenExists(
                    f"the inputs have changed: {name} of golden version {old.golden_version} does "
                    "not belong to them",
                    "record --phase all",
                )
            shutil.copy2(replaced.folder / name, folder / name)
            files[name] = old.files[name]
        return files

    def _manifest(self, files: dict[str, FileEntry]) -> Manifest:
        settings, info, replaced = self.plan.settings, self.info, self.earlier.replaced
        warnings = set(self.plan.warnings)
        for case in self.plan.cases:
            warnings |= set(read_notes(self.staging, case.name).warnings)
        if replaced and set(settings.phases) != set(info.phases):  # some are carried over
            warnings |= set(replaced.manifest.warnings)
        first = HistoryEntry(
            version=1,
            when=_today(),
            reason=printable(self.reason) or "recorded",
            moved=(),
            snap=__version__,
            command=self._command(),
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
            warnings=tuple(sorted(warnings)),
        )

    def _command(self) -> str:
        """Return a command that records the same: by the plan, so that --resume changes nothing."""
        settings, location = self.plan.settings, self.location
        folder = _relative_location(self.checkpoint, location.root)
        words = ["snap", "record", "--checkpoint", folder or location.checkpoint]
        words += ["--revision", settings.revision, "--device", location.device]
        words += ["--dtype", location.dtype, "--phase", ",".join(settings.phases)]
        words += ["--variants", str(settings.variants), "--seed", str(settings.seed)]
        words += ["--max-new-tokens", str(settings.max_new_tokens)]
        words += ["--storage", settings.storage]
        words += ["--oracle"] if settings.oracle else []
        words += ["--prompt", "FILE"] if settings.prompts else []
        for tokens in settings.long:
            words += ["--long", str(tokens)]
        for option, globs in (
            ("--whole-outputs", settings.whole_outputs),
            ("--modules", settings.modules),
        ):
            for glob in globs:
                words += [option, glob]
        return printable(shlex.join(words))

    def _case(self, case: PlannedCase, files: dict[str, FileEntry]) -> CaseEntry:
        tensors = files[INPUTS].tensors
        replaced = self.earlier.replaced
        old = replaced.cases.get(case.name) if replaced else None
        # Of phases that are carried over.
        generated, carried = "", []
        if old:
            gone = {*self.plan.settings.phases, *self.dropped}
            generated = old.generated
            carried = [n for n in old.not_finite if Phase(n.partition("/")[0]) not in gone]
        staged = self.staging.part(case.name, GENERATED_TEXT)
        if staged.exists():
            generated = staged.read_text(encoding="utf-8")
        return CaseEntry(
            name=case.name,
            origin=case.origin,
            recipe=case.recipe,
            text=case.text,
            phases=tuple(p for p in self.info.phases if case.tiles or p not in _IMAGE_PHASES),
            images=len(case.named.recipe.images),
            tiles=case.tiles,
            tokens=tensors[f"{case.name}/input_ids"].shape[1],
            generated=generated,
            eos_token_ids=case.eos_token_ids,
            not_finite=(*carried, *read_notes(self.staging, case.name).not_finite),
        )


def _answers(manifest: Manifest) -> tuple[object, ...]:
    """Return the parts of a manifest that describe the outputs and how they were made."""
    declared = manifest.environment.get(ANSWERS)
    return manifest.files, manifest.generation, manifest.checkpoint.family, declared


def _relative_location(checkpoint: Checkpoint, goldens: Path) -> str | None:
    """Return a folder relative to the parent of the goldens; None if outside or on the hub."""
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
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return dt.datetime.fromtimestamp(seconds, dt.UTC).date().isoformat()
