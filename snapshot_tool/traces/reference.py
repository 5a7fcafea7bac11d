"""Tracing the reference: Hugging Face's model, on a case, another trace's inputs, or a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from snapshot_tool.base.devices import require_device
from snapshot_tool.base.environment import package_version
from snapshot_tool.base.errors import InputRefused, SnapError, UsageError
from snapshot_tool.base.protocol import LoadSettings, Progress, Reference
from snapshot_tool.base.recipes import CaseRecipe, ImageRecipe
from snapshot_tool.reference import load_reference
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


def trace_reference(
    out: Path,
    given: TraceSubject | Prompt,
    options: TraceOptions,
    progress: Progress,
) -> TraceHeader:
    """Run Hugging Face's model with every module watched and write the trace."""
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
        _answer(reference, subject, options),
        header=header,
        inputs=subject.inputs,
    )


def _checkpoint(given: TraceSubject | Prompt) -> Checkpoint:
    if isinstance(given, Prompt):
        return open_checkpoint(given.checkpoint or DEFAULT_CHECKPOINT, revision=given.revision)
    return given.checkpoint


def _answer(
    reference: Reference, subject: TraceSubject, options: TraceOptions
) -> Callable[[], object]:
    if options.mode is Mode.FORWARD:
        return lambda: reference.forward(subject.inputs, observe=lambda *_: None)
    tokens = options.new_tokens(subject)
    return lambda: reference.generate(subject.inputs, max_new_tokens=tokens)


def _prepare(prompt: Prompt, checkpoint: Checkpoint, reference: Reference) -> TraceSubject:
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
