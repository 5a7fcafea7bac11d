"""`snap trace`: run the reference or a candidate and write the inputs and outputs of its modules.

The inputs and the checkpoint are those of a golden set's case or of another trace; the reference
also takes a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from PIL import Image

from snapshot_tool.base.checkpoint import (
    DEFAULT_CHECKPOINT,
    Checkpoint,
    is_folder,
    is_folder_name,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.base.environment import (
    describe_machine,
    make_deterministic,
    package_version,
    package_versions,
    require_device,
)
from snapshot_tool.base.errors import (
    CandidateUnavailable,
    CheckpointUnavailable,
    EndedProcess,
    InputRefused,
    SnapError,
    UsageError,
)
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.protocol import CandidateRequest, CaseInputs, LoadSettings, Progress
from snapshot_tool.base.recipes import CaseRecipe, ImageRecipe
from snapshot_tool.candidates import FMS, load_candidate
from snapshot_tool.families import family_of
from snapshot_tool.goldens.find import GoldenChoice, open_checkpoint_of
from snapshot_tool.traces.trace import (
    SCHEMA,
    TracedCheckpoint,
    TraceHeader,
    open_trace,
    write_trace,
)

if TYPE_CHECKING:
    from snapshot_tool.reference.huggingface import HuggingFaceReference

_SEED = 42
_NEW_TOKENS = 20


class Mode(StrEnum):
    """What is traced: one pass over the prompt, or all passes of a generation."""

    FORWARD = "forward"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a model is run and what is kept.

    Args:
        first_pass_only: whether a generation ends after one token.
        max_elements: tensors of up to this size are kept whole, and a sketch of larger ones.
        max_new_tokens: in place of the subject's; None: the subject's.
    """

    mode: Mode = Mode.FORWARD
    first_pass_only: bool = False
    max_elements: int = 65_536
    max_new_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text with one `<image>` for each image file, and the checkpoint to run."""

    text: str
    images: tuple[Path, ...]
    checkpoint: str | None
    revision: str | None


@dataclass(frozen=True, slots=True)
class TraceSubject:
    """What is run.

    Args:
        checkpoint: the opened checkpoint.
        inputs: the model's inputs.
        header: describes the trace, but for what runs the subject and how.
    """

    checkpoint: Checkpoint
    inputs: CaseInputs
    header: TraceHeader


def choose_subject(
    choice: GoldenChoice, *, case: str | None, inputs: Path | None, prompt: Prompt | None
) -> TraceSubject | Prompt:
    """Return the one that is named; raise UsageError unless it is exactly one of the three."""
    if sum(source is not None for source in (case, inputs, prompt)) != 1:
        raise UsageError("name one of --case, --inputs and --prompt", "snap list shows the goldens")
    if prompt is not None:
        return prompt
    if inputs is not None:
        return _subject_of_trace(inputs, choice.checkpoint)
    return subject_of_golden(choice, str(case))


def subject_of_golden(choice: GoldenChoice, case: str) -> TraceSubject:
    """Return a case of a golden set; raise UsageError if the set has no such case."""
    golden = choice.open()
    manifest = golden.manifest
    names = [entry.name for entry in manifest.cases]
    if case not in names:
        raise UsageError(f"there is no case {case} in the golden", f"there are: {', '.join(names)}")
    checkpoint = open_checkpoint_of(golden, choice.checkpoint)
    header = _new_header(
        checkpoint,
        family=manifest.checkpoint.family,
        config=manifest.checkpoint.config,
        question=f"case {case}",
        seed=manifest.taps.seed,
        max_new_tokens=manifest.generation.max_new_tokens,
        eos_token_ids=golden.eos_token_ids(case),
    )
    return TraceSubject(checkpoint, golden.inputs(case), header)


def _subject_of_trace(path: Path, checkpoint: str | None) -> TraceSubject:
    """Return the inputs of a trace with its checkpoint, whose files must be the same."""
    trace = open_trace(path)
    traced = trace.header.checkpoint
    if checkpoint is None and is_folder_name(traced.name):
        raise CheckpointUnavailable(
            f"{path} does not say where the folder of {traced.name} is", "pass --checkpoint DIR"
        )
    spec = checkpoint or traced.name
    opened = open_checkpoint(spec, revision=None if is_folder(spec) else traced.revision)
    require_same_files(opened, traced.files)
    named = msgspec.structs.replace(traced, name=opened.name, revision=opened.revision)
    header = msgspec.structs.replace(trace.header, checkpoint=named, calls=())
    return TraceSubject(opened, trace.inputs(), header)


def _subject_of_prompt(
    prompt: Prompt, checkpoint: Checkpoint, reference: HuggingFaceReference
) -> TraceSubject:
    images = [_read_image(path) for path in prompt.images]
    try:
        # Stand-ins: the images are given, not drawn from recipes.
        recipe = CaseRecipe(prompt.text, tuple(ImageRecipe("flat", 1, 1) for _ in images))
        prepared = reference.prepare(recipe, images)
    except ValueError as error:
        raise UsageError(
            f"--prompt and --image do not fit: {error}", "write <image> once for each --image FILE"
        ) from error
    except InputRefused as refusal:
        raise UsageError(
            f"the reference refuses this prompt: {refusal}", "change --prompt or --image"
        ) from refusal
    info = reference.info()
    header = _new_header(
        checkpoint,
        family=info.family,
        config=info.config,
        question=f"prompt {prompt.text!r}",
        seed=_SEED,
        max_new_tokens=_NEW_TOKENS,
        eos_token_ids=info.eos_token_ids,
    )
    return TraceSubject(checkpoint, prepared.inputs, header)


def _new_header(checkpoint: Checkpoint, *, config: Mapping[str, Any], **fields: Any) -> TraceHeader:
    traced = TracedCheckpoint(
        name=checkpoint.name,
        revision=checkpoint.revision,
        files=dict(checkpoint.files),
        config=dict(config),
    )
    later: dict[str, Any] = dict.fromkeys(("impl", "implementation", "mode", "device", "dtype"), "")
    later |= {"max_elements": 0, "environment": {}, "calls": ()}  # see _describe
    return TraceHeader(schema=SCHEMA, checkpoint=traced, **later, **fields)


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SnapError(f"--image {path} cannot be read: {error}", "name a picture") from error


def require_free(target: Path, *, force: bool) -> None:
    """Raise SnapError if the file exists, before anything is computed."""
    if target.exists() and not force:
        raise SnapError(f"{target} already exists", "replace it with --force, or name another file")


def trace_reference(
    out: Path, given: TraceSubject | Prompt, options: TraceOptions, progress: Progress
) -> TraceHeader:
    """Run Hugging Face's model on a case, another trace's inputs or a prompt; write the trace."""
    # A trace of a candidate does not import this.
    from snapshot_tool.reference import load_reference

    require_device(options.device)
    if isinstance(given, Prompt):
        spec = given.checkpoint or DEFAULT_CHECKPOINT
        checkpoint = open_checkpoint(spec, revision=given.revision)
    else:
        checkpoint = given.checkpoint
    with progress.stage("loading the reference", 1) as steps:
        settings = LoadSettings(options.device, _SEED)
        reference = load_reference(checkpoint.folder, dtype=options.dtype, settings=settings)
        next(steps)
    subject = (
        _subject_of_prompt(given, checkpoint, reference) if isinstance(given, Prompt) else given
    )
    version = package_version("transformers")
    header = _describe(subject, options, impl="hf", implementation=f"transformers {version}")

    def run() -> object:
        if options.mode is Mode.FORWARD:
            return reference.forward(subject.inputs, observe=lambda *_: None)
        return reference.generate(
            subject.inputs,
            max_new_tokens=header.max_new_tokens,
            eos_token_ids=header.eos_token_ids,
        )

    return write_trace(out, reference.modules(), run, header=header, inputs=subject.inputs)


def trace_candidate(
    out: Path,
    subject: TraceSubject,
    options: TraceOptions,
    progress: Progress,
    *,
    candidate: str = FMS,
    fms_path: Path | None = None,
) -> TraceHeader:
    """Run FMS, or the candidate of a `module:factory`, on a subject; write the trace."""
    require_device(options.device)
    impl = FMS if candidate == FMS else "candidate"
    header = _describe(subject, options, impl=impl, implementation=candidate)
    request = CandidateRequest(
        subject.checkpoint.folder, header.checkpoint.config, options.device, options.dtype
    )
    with progress.stage("loading the candidate", 1) as steps:
        loaded = load_candidate(candidate, request, fms_path=fms_path)
        next(steps)
    if not loaded.supports("modules"):
        raise CandidateUnavailable(
            f"{candidate} does not show its modules",
            "give it a method modules() that returns the torch.nn.Module, see docs/candidates.md",
        )
    if loaded.supports("info"):
        info = loaded.info()
        state = "dirty" if info.dirty else "clean"
        words = [
            info.name,
            f"version {info.version}" if info.version else "",
            f"commit {info.commit[:12]} ({state})" if info.commit else "",
        ]
        implementation = " ".join(word for word in words if word)
        header = msgspec.structs.replace(header, implementation=implementation)

    def run() -> object:
        pixel_values = subject.inputs.pixel_values
        with foreign_code(f"--candidate {candidate}"), torch.inference_mode():
            if not family_of(header.family).takes_text and pixel_values is not None:
                return loaded.vision(pixel_values)
            if options.mode is Mode.FORWARD:
                return loaded.forward(subject.inputs)
            return loaded.generate(
                subject.inputs,
                max_new_tokens=header.max_new_tokens,
                eos_token_ids=header.eos_token_ids,
            )

    try:
        return write_trace(
            out,
            loaded.modules(),
            run,
            header=header,
            inputs=subject.inputs,
            twin_outputs=loaded.twin_outputs,
        )
    except EndedProcess as ended:
        raise CandidateUnavailable(str(ended), "nothing was written") from ended


def _describe(subject: TraceSubject, options: TraceOptions, **implementation: str) -> TraceHeader:
    """Make torch deterministic and return the header of the trace, without calls."""
    settings = make_deterministic(subject.header.seed, strict=False)
    new_tokens = options.max_new_tokens or subject.header.max_new_tokens
    return msgspec.structs.replace(
        subject.header,
        **implementation,
        mode=options.mode.value,
        device=options.device,
        dtype=options.dtype,
        max_elements=options.max_elements,
        max_new_tokens=1 if options.first_pass_only else new_tokens,
        environment={**describe_machine(), **package_versions(), **settings},
    )
