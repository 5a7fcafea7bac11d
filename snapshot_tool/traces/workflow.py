"""Tracing a candidate: FMS, or what `module:factory` names. Hugging Face is out of reach here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from snapshot_tool.base.environment import package_version, require_device
from snapshot_tool.base.errors import (
    CandidateUnavailable,
    EndedProcess,
    InputRefused,
    SnapError,
    UsageError,
)
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.protocol import (
    Candidate,
    CandidateRequest,
    LoadSettings,
    Progress,
)
from snapshot_tool.base.recipes import CaseRecipe, ImageRecipe
from snapshot_tool.candidates import FMS, load_candidate
from snapshot_tool.families import family_of
from snapshot_tool.traces.format import TraceHeader
from snapshot_tool.traces.subject import (
    DEFAULT_NEW_TOKENS,
    DEFAULT_SEED,
    Prompt,
    TraceOptions,
    TraceSubject,
    describe,
)
from snapshot_tool.traces.write import Mode, write_trace

if TYPE_CHECKING:
    from PIL import Image

    from snapshot_tool.reference.huggingface import HuggingFaceReference


def trace_reference(
    out: Path,
    given: TraceSubject | Prompt,
    options: TraceOptions,
    progress: Progress,
) -> TraceHeader:
    """Run Hugging Face's model with every module watched and write the trace."""
    # A trace of FMS imports neither this nor transformers.
    from snapshot_tool.reference import load_reference

    require_device(options.device)
    checkpoint = _checkpoint(given)
    with progress.stage("loading the reference", 1) as steps:
        reference = load_reference(
            checkpoint.folder,
            dtype=options.dtype,
            settings=LoadSettings(options.device, DEFAULT_SEED),
        )
        next(steps)
    subject = _prepare(given, checkpoint, reference) if isinstance(given, Prompt) else given
    version = package_version("transformers")
    header = describe(subject, options, impl="hf", implementation=f"transformers {version}")
    return write_trace(
        out,
        reference.modules(),
        _answer_reference(reference, subject, options),
        header=header,
        inputs=subject.inputs,
    )


def _checkpoint(given: TraceSubject | Prompt) -> Checkpoint:
    if isinstance(given, Prompt):
        return open_checkpoint(given.checkpoint or DEFAULT_CHECKPOINT, revision=given.revision)
    return given.checkpoint


def _answer_reference(
    reference: HuggingFaceReference, subject: TraceSubject, options: TraceOptions
) -> Callable[[], object]:
    if options.mode is Mode.FORWARD:
        return lambda: reference.forward(subject.inputs, observe=lambda *_: None)
    tokens = options.new_tokens(subject)
    return lambda: reference.generate(subject.inputs, max_new_tokens=tokens)


def _prepare(
    prompt: Prompt, checkpoint: Checkpoint, reference: HuggingFaceReference
) -> TraceSubject:
    """Tokenize and preprocess with the checkpoint's own processor."""
    pictures = [_open_image(path) for path in prompt.images]
    try:
        # Stand-ins: the pictures are given, not drawn.
        recipe = CaseRecipe(prompt.text, tuple(ImageRecipe("flat", 1, 1) for _ in pictures))
        prepared = reference.prepare(recipe, pictures)
    except ValueError as error:
        raise UsageError(
            f"--prompt and --image do not fit: {error}", "write <image> once for each --image FILE"
        ) from error
    except InputRefused as refusal:
        raise UsageError(
            f"the reference refuses this prompt: {refusal}", "change --prompt or --image"
        ) from refusal
    info = reference.info()
    return TraceSubject(
        checkpoint=checkpoint,
        family=info.family,
        config=info.config,
        inputs=prepared.inputs,
        question=f"prompt {prompt.text!r}",
        seed=DEFAULT_SEED,
        max_new_tokens=DEFAULT_NEW_TOKENS,
        eos_token_ids=info.eos_token_ids,
    )


def _open_image(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SnapError(f"--image {path} cannot be read: {error}", "name a picture") from error


def trace_candidate(
    out: Path,
    subject: TraceSubject,
    options: TraceOptions,
    progress: Progress,
    *,
    candidate: str = FMS,
    fms_path: Path | None = None,
) -> TraceHeader:
    """Run the candidate with every module watched and write the trace."""
    require_device(options.device)
    impl = FMS if candidate == FMS else "candidate"
    header = describe(subject, options, impl=impl, implementation=candidate)
    request = CandidateRequest(
        subject.checkpoint.folder, subject.config, options.device, options.dtype
    )
    with progress.stage("loading the candidate", 1) as steps:
        loaded = load_candidate(candidate, request, fms_path=fms_path)
        next(steps)
    if not loaded.supports("modules"):
        raise CandidateUnavailable(
            f"{candidate} does not show its modules",
            "give it a method modules() that returns the torch.nn.Module, see docs/candidates.md",
        )
    return write_trace(
        out,
        loaded.modules(),
        lambda: _run(loaded, subject, options, spec=candidate),
        header=_named(header, loaded),
        inputs=subject.inputs,
        twin_outputs=loaded.twin_outputs,
    )


def _run(
    candidate: Candidate, subject: TraceSubject, options: TraceOptions, *, spec: str
) -> object:
    """Run the candidate; raise CandidateUnavailable if it tries to end the process."""
    try:
        with foreign_code(f"--candidate {spec}"):
            return _answer(candidate, subject, options)
    except EndedProcess as ended:
        raise CandidateUnavailable(str(ended), "nothing was written") from ended


def _answer(candidate: Candidate, subject: TraceSubject, options: TraceOptions) -> object:
    import torch

    with torch.inference_mode():
        pixel_values = subject.inputs.pixel_values
        if not family_of(subject.family).takes_text and pixel_values is not None:
            return candidate.vision(pixel_values)
        if options.mode is Mode.FORWARD:
            return candidate.forward(subject.inputs)
        return candidate.generate(
            subject.inputs,
            max_new_tokens=options.new_tokens(subject),
            eos_token_ids=subject.eos_token_ids,
        )


def _named(header: TraceHeader, candidate: Candidate) -> TraceHeader:
    """Say which implementation it is, where it says so itself."""
    import msgspec

    if not candidate.supports("info"):
        return header
    found = candidate.info()
    words = [found.name, f"version {found.version}" if found.version else ""]
    if found.commit:
        words.append(f"commit {found.commit[:12]} ({'dirty' if found.dirty else 'clean'})")
    return msgspec.structs.replace(header, implementation=" ".join(word for word in words if word))
