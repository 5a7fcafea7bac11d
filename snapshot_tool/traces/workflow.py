"""Tracing a candidate: FMS, or what `module:factory` names. Hugging Face is out of reach here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshot_tool.base.devices import require_device
from snapshot_tool.base.errors import CandidateUnavailable, EndedProcess
from snapshot_tool.base.foreign_code import foreign_code
from snapshot_tool.base.protocol import CandidateInfo, CandidateRequest, Progress
from snapshot_tool.candidates import FMS, load_candidate
from snapshot_tool.families import family_of
from snapshot_tool.traces.format import TraceHeader
from snapshot_tool.traces.subject import TraceOptions, TraceSubject, describe
from snapshot_tool.traces.write import Mode, write_trace

if TYPE_CHECKING:
    import torch


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
        loaded: Any = load_candidate(candidate, request, fms_path=fms_path)
        next(steps)
    show = getattr(loaded, "modules", None)
    if not callable(show):
        raise CandidateUnavailable(
            f"{candidate} does not show its modules",
            "give it a method modules() that returns the torch.nn.Module, see docs/candidates.md",
        )
    return write_trace(
        out,
        show(),
        lambda: _run(loaded, subject, options, spec=candidate),
        header=_named(header, loaded),
        inputs=subject.inputs,
        twin_outputs=getattr(loaded, "twin_outputs", _no_twins),
    )


def _run(candidate: Any, subject: TraceSubject, options: TraceOptions, *, spec: str) -> object:
    """Run the candidate; raise CandidateUnavailable if it tries to end the process."""
    try:
        with foreign_code(f"--candidate {spec}"):
            return _answer(candidate, subject, options)
    except EndedProcess as ended:
        raise CandidateUnavailable(str(ended), "nothing was written") from ended


def _answer(candidate: Any, subject: TraceSubject, options: TraceOptions) -> object:
    import torch

    with torch.inference_mode():
        if not family_of(subject.family).takes_text:
            return candidate.vision(subject.inputs.pixel_values)
        if options.mode is Mode.FORWARD:
            return candidate.forward(subject.inputs)
        return candidate.generate(
            subject.inputs,
            max_new_tokens=options.new_tokens(subject),
            eos_token_ids=subject.eos_token_ids,
        )


def _named(header: TraceHeader, candidate: Any) -> TraceHeader:
    """Say which implementation it is, where it says so itself."""
    import msgspec

    info = getattr(candidate, "info", None)
    if not callable(info):
        return header
    found: CandidateInfo = info()
    words = [found.name, f"version {found.version}" if found.version else ""]
    if found.commit:
        words.append(f"commit {found.commit[:12]} ({'dirty' if found.dirty else 'clean'})")
    return msgspec.structs.replace(header, implementation=" ".join(word for word in words if word))


def _no_twins(_module: str, _output: object) -> Mapping[str, torch.Tensor]:
    return {}
