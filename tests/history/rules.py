"""The rules of other projects on FMS's history, from what a golden set keeps of Hugging Face.

A family's golden set has whole logits of the last token, the new tokens, and the greatest logits of
each step. Rules that read more are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from snapshot_tool.base.errors import SnapError
from snapshot_tool.base.protocol import Candidate, CandidateRequest, Phase
from snapshot_tool.candidates import load_candidate
from snapshot_tool.goldens.find import find_goldens, named_sets
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.goldens.parts import LOGITS, TOKEN_IDS
from snapshot_tool.judge.generation import step_logits, with_golden_tokens
from tests.mutants.rules import Answers, Part, References, failing_rules

# Written by `make history`; `make mutants` makes a column of docs/detection.md of it.
RESULTS = Path(__file__).parent / "rules.json"
APPLICABLE = (
    "parity suite, all cases",
    "aiu-fms-testing-utils",
    "aiu-fms-testing-utils, level 0",
    "vLLM, check_logprobs_close",
    "llama.cpp, NMSE",
    "MaxText, KL",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What rules find of one fix.

    Args:
        commit: of the fix.
        found, named: whether snap finds its parent, and names the fault's place.
        passes: whether the fix passes by snap.
        before, after: the rules of other projects that fail its parent and the fix itself.
    """

    commit: str
    found: bool
    named: bool
    passes: bool
    before: tuple[str, ...]
    after: tuple[str, ...]


def read_trials() -> list[Trial]:
    """Return the stored results."""
    return msgspec.convert(json.loads(RESULTS.read_text(encoding="utf-8")), list[Trial])


def write_trials(trials: Sequence[Trial]) -> None:
    """Store the results."""
    RESULTS.write_text(json.dumps(msgspec.to_builtins(trials), indent=1) + "\n", encoding="utf-8")


def rules_that_fail_on(fms: Path, name: str, out: Path, *, spec: str) -> tuple[str, ...] | None:
    """Return the rules that fail an FMS on a checkpoint; None if that generates no tokens.

    FMS stays imported in this process. If it cannot be loaded, every rule fails.

    name: the checkpoint's. spec: the candidate, "fms" or module:factory.
    """
    (found,) = named_sets(find_goldens(out / "goldens"), f"local/{name}")
    golden = open_golden(found.folder)
    if not all(golden.tensor_names(case, Phase.GENERATE) for case in golden.cases):
        return None
    config = golden.manifest.checkpoint.config
    request = CandidateRequest(out / "checkpoints" / name, config, "cpu", golden.manifest.dtype)
    try:
        candidate = load_candidate(spec, request, fms_path=fms if spec == "fms" else None)
    except SnapError:
        return APPLICABLE
    answers, recorded = port_answers(candidate, golden), recorded_answers(golden)
    failing = failing_rules(answers, References(recorded, recorded), on_cpu=answers)
    return tuple(rule for rule in failing if rule in APPLICABLE)


def recorded_answers(golden: Golden) -> Answers:
    """Return Hugging Face's answers: logits of the last token alone, and 8 of each step's."""
    answers: dict[Part, dict[str, torch.Tensor]] = {part: {} for part in Part}
    for case in golden.cases:
        last = golden.tensor(case, Phase.FORWARD, LOGITS)
        values, ids = (
            golden.tensor(case, Phase.GENERATE, name)
            for name in ("step_topk_values", "step_topk_ids")
        )
        answers[Part.LOGITS][case] = last[None]
        answers[Part.TOKENS][case] = golden.tensor(case, Phase.GENERATE, TOKEN_IDS)
        steps = torch.full((len(ids), len(last)), -torch.inf)
        answers[Part.STEPS][case] = steps.scatter(-1, ids, values)
    return answers


def port_answers(candidate: Candidate, golden: Golden) -> Answers:
    """Return the same of a port; what it raises in place of is left out."""
    answers: dict[Part, dict[str, torch.Tensor]] = {part: {} for part in Part}
    with torch.inference_mode():
        for case in golden.cases:
            for part, compute in _questions(candidate, golden, case).items():
                with suppress(Exception, SystemExit):  # a faulty port may even exit
                    answers[part][case] = compute().clone()
    return answers


def _questions(
    candidate: Candidate, golden: Golden, case: str
) -> Mapping[Part, Callable[[], torch.Tensor]]:
    inputs = golden.inputs(case)

    def last() -> torch.Tensor:
        logits = candidate.forward(inputs)
        assert isinstance(logits, torch.Tensor)
        return logits[inputs.attention_mask.bool()][-1:]

    def tokens() -> torch.Tensor:
        limit = golden.manifest.generation.max_new_tokens
        ends = golden.eos_token_ids(case)
        return candidate.generate(inputs, max_new_tokens=limit, eos_token_ids=ends)

    def steps() -> torch.Tensor:
        logits = step_logits(candidate.forward(with_golden_tokens(golden, case)), golden, case)
        assert logits is not None
        return logits.float()

    return {Part.LOGITS: last, Part.TOKENS: tokens, Part.STEPS: steps}
