"""What a trace is of: inputs and a checkpoint, from a golden set or from another trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.base.checkpoint import (
    Checkpoint,
    is_folder,
    is_folder_name,
    open_checkpoint,
    require_same_files,
)
from snapshot_tool.base.environment import describe_machine, make_deterministic, package_versions
from snapshot_tool.base.errors import CheckpointUnavailable, UsageError
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.goldens.find import GoldenChoice, open_checkpoint_of
from snapshot_tool.traces.format import SCHEMA, TracedCheckpoint, TraceHeader, open_trace
from snapshot_tool.traces.write import Mode

DEFAULT_SEED = 42
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, slots=True)
class TraceSubject:
    """What is run.

    Args:
        checkpoint: the weights, opened.
        family: its family's name.
        config: the reference's configuration with all defaults.
        inputs: what the prompt and its images became.
        question: where the inputs come from, as people read it.
        seed: of the sketches.
        max_new_tokens: greedy tokens to generate.
        eos_token_ids: that end a generation.
    """

    checkpoint: Checkpoint
    family: str
    config: Mapping[str, Any]
    inputs: CaseInputs
    question: str
    seed: int
    max_new_tokens: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How it is run and what is kept.

    Args:
        mode: one forward pass, or a generation.
        first_pass_only: whether a generation ends after one token.
        max_elements: tensors up to this size are kept whole, of larger ones a sketch.
        max_new_tokens: in place of the subject's; None for those.
    """

    mode: Mode = Mode.FORWARD
    first_pass_only: bool = False
    max_elements: int = 65_536
    max_new_tokens: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def new_tokens(self, subject: TraceSubject) -> int:
        """Return how many tokens to generate: each is one pass through the model."""
        if self.first_pass_only:
            return 1
        return self.max_new_tokens or subject.max_new_tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question that no golden holds: text with one `<image>` for each file."""

    text: str
    images: tuple[Path, ...]
    checkpoint: str | None
    revision: str | None


def choose_subject(
    choice: GoldenChoice, *, case: str | None, inputs: Path | None, prompt: Prompt | None
) -> TraceSubject | Prompt:
    """Return what is meant; raise UsageError unless it is exactly one of the three."""
    if sum(source is not None for source in (case, inputs, prompt)) != 1:
        raise UsageError("name one of --case, --inputs and --prompt", "snap list shows the goldens")
    if prompt is not None:
        return prompt
    if inputs is not None:
        return subject_of_trace(inputs, choice.checkpoint)
    return subject_of_golden(choice, str(case))


def subject_of_golden(choice: GoldenChoice, case: str) -> TraceSubject:
    """Take a case of a golden set; raise UsageError for a case that it does not have."""
    golden = choice.open()
    manifest = golden.manifest
    names = [entry.name for entry in manifest.cases]
    if case not in names:
        raise UsageError(f"there is no case {case} in the golden", f"there are: {', '.join(names)}")
    return TraceSubject(
        checkpoint=open_checkpoint_of(golden, choice.checkpoint),
        family=manifest.checkpoint.family,
        config=manifest.checkpoint.config,
        inputs=golden.inputs(case),
        question=f"case {case}",
        seed=manifest.taps.seed,
        max_new_tokens=manifest.generation.max_new_tokens,
        eos_token_ids=golden.eos_token_ids(case),
    )


def subject_of_trace(path: Path, checkpoint: str | None) -> TraceSubject:
    """Take the inputs of another trace, and its checkpoint; raise where that has other files."""
    trace = open_trace(path)
    header = trace.header
    if checkpoint is None and is_folder_name(header.checkpoint.name):
        raise CheckpointUnavailable(
            f"{path} does not say where the folder of {header.checkpoint.name} is",
            "pass --checkpoint DIR",
        )
    spec = checkpoint or header.checkpoint.name
    revision = None if is_folder(spec) else header.checkpoint.revision
    opened = open_checkpoint(spec, revision=revision)
    require_same_files(opened, header.checkpoint.files)
    return TraceSubject(
        checkpoint=opened,
        family=header.family,
        config=header.checkpoint.config,
        inputs=trace.inputs(),
        question=header.question,
        seed=header.seed,
        max_new_tokens=header.max_new_tokens,
        eos_token_ids=header.eos_token_ids,
    )


def describe(
    subject: TraceSubject, options: TraceOptions, *, impl: str, implementation: str
) -> TraceHeader:
    """Fix what could change a result and return the header of the trace, without calls."""
    settings = make_deterministic(subject.seed, strict=False)
    checkpoint = subject.checkpoint
    return TraceHeader(
        schema=SCHEMA,
        impl=impl,
        implementation=implementation,
        family=subject.family,
        checkpoint=TracedCheckpoint(
            name=checkpoint.name,
            revision=checkpoint.revision,
            files=dict(checkpoint.files),
            config=dict(subject.config),
        ),
        question=subject.question,
        mode=options.mode.value,
        device=options.device,
        dtype=options.dtype,
        seed=subject.seed,
        max_elements=options.max_elements,
        max_new_tokens=options.new_tokens(subject),
        eos_token_ids=subject.eos_token_ids,
        environment={**describe_machine(), **package_versions(), **settings},
        calls=(),
    )
