"""Write the questions of a golden set as files that can be answered without snap.

`ask` writes snap's own, `ask_aftu` the validation information of aiu-fms-testing-utils. Its reader:
load_validation_information and get_validation_info_path in
aiu_fms_testing_utils/testing/validation.py. A folder is one batch, of prompts padded to one length.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from snapshot_tool.base import __version__
from snapshot_tool.base.errors import GoldenNotFound, UsageError
from snapshot_tool.base.protocol import Phase, Progress
from snapshot_tool.candidates.answers import (
    PNG_MODES,
    AskedGolden,
    question_inputs,
    wanted_answers,
    weight_digests,
)
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.tensors import join_files

SCHEMA = "snap-questions/1"
_CASES = "cases.part"
_BLOCK = 64  # prompts for aiu-fms-testing-utils are padded to a multiple of it
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def ask(golden: Golden, out: Path, progress: Progress) -> None:
    """Write questions.json, questions.safetensors and the images; see docs/answers.md."""
    _require_empty(out)
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


def _require_empty(out: Path) -> None:
    """Raise UsageError unless a folder is empty or missing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder", "name another folder")


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


def ask_aftu(
    golden: Golden, out: Path, *, model_id: str, attn_type: str, version: str
) -> list[tuple[Path, list[str], int]]:
    """Write one folder for each padded length; return it, its cases (0.pt, 1.pt …), and the length.

    Cases with images are left out, and those that end before the last new token. Of the logits
    (new, vocabulary) the greatest are the recorded ones. All others of a step are equal, so that
    their log-sum-exp is the recorded one: that is not what Hugging Face answered.

    model_id, attn_type: in the names of the folders, as the tests of aiu-fms-testing-utils have
    them. version: of aiu-fms-testing-utils, "0.8.1".
    """
    _require_empty(out)
    new = golden.manifest.generation.max_new_tokens
    by_length: dict[int, list[str]] = {}
    for case in golden.manifest.cases:
        if case.images or Phase.GENERATE not in case.phases:
            continue
        names = golden.tensor_names(case.name, Phase.GENERATE)
        if parts.STEP_LOGSUMEXP not in names:
            raise GoldenNotFound(
                f"{golden.manifest.title} has no log-sum-exp of steps",
                "record it again: snap record ... --update --reason TEXT",
            )
        if len(golden.tensor(case.name, Phase.GENERATE, parts.TOKEN_IDS)) == new:
            real = int(golden.text(case.name).attention_mask.sum())
            by_length.setdefault(-(-real // _BLOCK) * _BLOCK, []).append(case.name)
    if not by_length:
        raise GoldenNotFound(
            f"{golden.manifest.title} has no case of text alone with {new} new tokens",
            "record one with --prompt FILE",
        )
    batches = []
    for length, cases in sorted(by_length.items()):
        fields = {
            "attn-type": attn_type,
            "batch-size": str(len(cases)),
            "dtype": _SHORT[golden.manifest.dtype],
            "max-new-tokens": str(new),
            "model-id": model_id.replace("/", "--"),
            "seq-length": str(length),
        }
        name = "_".join(f"{field}-{value}" for field, value in fields.items())
        digest = hashlib.sha256(name.encode()).hexdigest()
        folder = out / f"{digest}_{version}.cpu_validation_info.0.out"
        folder.mkdir(parents=True)
        for index, name_of_case in enumerate(cases):
            torch.save(_sentence(golden, name_of_case, length), folder / f"{index}.pt")
        batches.append((folder, cases, length))
    return batches


def _sentence(golden: Golden, case: str, length: int) -> dict[str, torch.Tensor]:
    """Return tokens (length + new,) int64 and logits (new, vocabulary) float32 of a case."""
    inputs = golden.text(case)
    prompt = inputs.input_ids[0][inputs.attention_mask[0].bool()]
    pad = max(golden.manifest.generation.pad_token_id, 0)
    padding = prompt.new_full((length - len(prompt),), pad)
    ids, values, logsumexp = (
        golden.tensor(case, Phase.GENERATE, name)
        for name in ("step_topk_ids", "step_topk_values", parts.STEP_LOGSUMEXP)
    )
    vocabulary = golden.tensor(case, Phase.FORWARD, parts.LOGITS).shape[0]
    best = (values.double() - logsumexp.double()[:, None]).exp().sum(1)
    share = (1 - best).clamp(min=1e-30) / max(vocabulary - ids.shape[1], 1)
    rest = torch.minimum(share.log() + logsumexp.double(), values.double().amin(1))
    logits = rest[:, None].repeat(1, vocabulary).scatter(1, ids, values.double()).float()
    tokens = golden.tensor(case, Phase.GENERATE, parts.TOKEN_IDS)
    return {"tokens": torch.cat([padding, prompt, tokens]), "logits": logits}
