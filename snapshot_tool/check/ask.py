"""Write the questions of a golden set as files that can be answered without snap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file

from snapshot_tool.base import __version__
from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.protocol import Progress
from snapshot_tool.candidates.answers import (
    PNG_MODES,
    AskedGolden,
    question_inputs,
    wanted_answers,
    weight_digests,
)
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.tensors import join_files

SCHEMA = "snap-questions/1"
_CASES = "cases.part"


def ask(golden: Golden, out: Path, progress: Progress) -> None:
    """Write questions.json, questions.safetensors and the images; see docs/answers.md."""
    require_empty(out)
    try:
        _write(golden, out, progress)
    except OSError as error:
        raise SnapError(f"cannot write {out}: {error.strerror}", "name another folder") from error


def require_empty(out: Path) -> None:
    """Raise UsageError unless a folder is empty or missing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder", "name another folder")


def _write(golden: Golden, out: Path, progress: Progress) -> None:
    # One case is in memory at a time: pixel values take hundreds of megabytes.
    (out / _CASES).mkdir(parents=True)
    (out / "images").mkdir()
    cases, files = [], {}
    with progress.stage("writing questions", len(golden.manifest.cases)) as steps:
        for entry in golden.manifest.cases:
            inputs = question_inputs(golden, entry.name)
            files[entry.name] = out / _CASES / entry.name
            save_file({n: tensor.contiguous() for n, tensor in inputs.items()}, files[entry.name])
            cases.append(_question(golden, entry.name, inputs=sorted(inputs), out=out))
            next(steps)
    join_files(files, out / "questions.safetensors")
    shutil.rmtree(out / _CASES)
    questions = {
        "schema": SCHEMA,
        "snap": __version__,
        "golden": msgspec.to_builtins(AskedGolden.of(golden)),
        "weights": weight_digests(golden),
        "config": golden.manifest.checkpoint.config,
        "cases": cases,
    }
    text = json.dumps(questions, indent=2, ensure_ascii=False) + "\n"
    (out / "questions.json").write_text(text, encoding="utf-8")


def _question(golden: Golden, case: str, *, inputs: list[str], out: Path) -> dict[str, Any]:
    entry = golden.case(case)
    images: list[str | None] = []
    for index, image in enumerate(golden.images(case)):
        name = f"images/{case}-{index}.png" if image.mode in PNG_MODES else None
        if name:
            image.save(out / name)
        images.append(name)
    return {
        "name": case,
        "prompt": entry.text,
        "images": images,
        "inputs": inputs,
        "input_ids": golden.text(case).input_ids[0].tolist(),
        "attention_mask": golden.text(case).attention_mask[0].tolist(),
        "max_new_tokens": golden.manifest.generation.max_new_tokens,
        "eos_token_ids": golden.eos_token_ids(case),
        "wanted": wanted_answers(golden, case),
    }
