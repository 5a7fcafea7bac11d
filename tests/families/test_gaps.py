"""What is reported of a port besides its figures: sizes, doubled keys, what no case reaches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.base.errors import CandidateUnavailable
from snapshot_tool.base.protocol import (
    END_TOKEN,
    ROPE,
    WINDOW,
    Candidate,
    CandidateRequest,
    CaseInputs,
)
from snapshot_tool.base.results import Verdict
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.candidates.fms.weights import CheckpointWeights
from snapshot_tool.diagnose.localise import localise_case
from snapshot_tool.explore.draw import explore
from snapshot_tool.explore.recorded import Recorded
from snapshot_tool.explore.run import QueryRunner
from snapshot_tool.families.family import ModulePair
from snapshot_tool.families.llama import LLAMA
from snapshot_tool.goldens.coverage import coverage, generated_tokens
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.judge.judge import Judge
from tests.conftest import CHECKOUT, Snap, fms_of, imported_fms

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _installed_fms() -> Iterator[None]:
    """Other tests of this process may have imported the checkout."""
    with imported_fms(fms_of([])):
        yield


def golden_of(name: str) -> Golden:
    """Open the committed golden set of a family."""
    (manifest,) = FOLDER.glob(f"goldens/local--{name}/*/*/manifest.json")
    return open_golden(manifest.parent)


def load(name: str, checkpoint: Path | None = None, **fields: Any) -> FmsCandidate:
    """Load the installed FMS's model of a family."""
    folder = checkpoint or FOLDER / "checkpoints" / name
    config = golden_of(name).manifest.checkpoint.config
    return load_fms_candidate(
        CandidateRequest(folder, config, "cpu", "float32", **fields), fms_path=None
    )


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4}


@pytest.mark.parametrize(
    ("name", "fields", "is_reached"),
    [
        (WINDOW, {"sliding_window": 4}, True),
        (WINDOW, {"sliding_window": 4096}, False),
        (WINDOW, {"sliding_window": 4, "use_sliding_window": False}, None),
        (WINDOW, {}, None),
        (ROPE, {"rope_scaling": LONGROPE}, True),
        (ROPE, {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 4096}}, False),
        # This type scales every position alike.
        (ROPE, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, None),
    ],
)
def test_a_length_is_covered_by_a_longer_case_alone(
    name: str, fields: dict[str, Any], *, is_reached: bool | None
) -> None:
    """Of a window, or of a rope that changes; a model without such a length has no line."""
    golden = golden_of("llama")
    entry = golden.manifest.checkpoint
    changed = msgspec.structs.replace(entry, config={**entry.config, **fields})
    manifest = msgspec.structs.replace(golden.manifest, checkpoint=changed)
    generated = generated_tokens(golden.folder, manifest)
    reached = {one.name: one.reached for one in coverage(manifest, manifest.cases, generated)}
    assert reached.get(name) is is_reached


@pytest.mark.parametrize(("case", "code"), [("one-image", 3), ("*", 0)])
def test_what_is_required_must_be_reached_by_a_case(snap: Snap, case: str, code: int) -> None:
    """A generation that the number of tokens stops meets no end token; the report says so."""
    options = ("--case", case, "--phase", "generate", "--quick", "--require", END_TOKEN)
    run = snap("check", "--fms-path", CHECKOUT, *options, "--json", "-")
    assert run.out, run.err
    (found,) = (one for one in run.report["coverage"] if one["name"] == END_TOKEN)
    assert run.code == code
    assert found["reached"] is (code == 0)
    assert run.report["unmet_requirements"] == ([END_TOKEN] if code else [])
    if case == "*":
        assert found["text"] in snap("show", "tiny-idefics3").out


def test_a_weight_of_another_shape_is_named_with_its_field() -> None:
    """Before FMS loads anything: its own message names neither."""
    candidate = load("llama")
    weights = CheckpointWeights(candidate.request, LLAMA.fms)
    weights.adapt(candidate.model)
    key = "model.layers.0.mlp.down_proj.weight"
    wide = torch.empty(weights.used[key].shape[0], 123, device="meta")
    config = {**candidate.request.config, "intermediate_size": 123}
    wider = CheckpointWeights(replace(candidate.request, config=config), LLAMA.fms)
    wider.used[key] = wide
    with pytest.raises(CandidateUnavailable) as refused:
        wider.adapt(candidate.model)
    for part in (
        "ff_sub_layer.w2.weight",
        str(tuple(wide.shape)),
        str(tuple(weights.used[key].shape)),
    ):
        assert part in refused.value.problem
    assert "intermediate_size=123" in refused.value.problem


def test_modules_are_matched_by_their_outputs_if_no_name_fits() -> None:
    """As in an FMS that names them otherwise; a fault is placed all the same."""
    candidate = load("llama")
    renamed = replace(LLAMA.fms, module_pairs=(ModulePair("otherwise", "model"),))
    other = replace(candidate, family=replace(LLAMA, fms=renamed))
    norm = other.model.base_model.layers[1].ff_ln
    norm.weight.data += 0.5
    found = localise_case(other, golden_of("llama"), "one-sentence", dtype="float32")
    assert found is not None
    assert found.mapping is not None
    assert found.mapping.inferred
    assert found.module == "model.layers.1.post_attention_layernorm"


def test_keys_that_become_one_weight_are_named_and_the_unused_one_is_not_expected(
    tmp_path: Path,
) -> None:
    """FMS's RoBERTa takes a pooler that the reference leaves unused for the dense of the head."""
    checkpoint = Path(shutil.copytree(FOLDER / "checkpoints" / "roberta", tmp_path / "ck"))
    weights = load_file(checkpoint / "model.safetensors")
    pooler = "roberta.pooler.dense.weight"
    weights[pooler] = torch.full_like(weights["lm_head.dense.weight"], 7.0)
    save_file(weights, checkpoint / "model.safetensors")
    candidate = load("roberta", checkpoint, unused_weights=frozenset({pooler}))
    (note,) = (note for note in candidate.info().notes if pooler in note)
    assert "lm_head.dense.weight" in note
    (pair,) = (p for p in candidate.weights() if p.name == "classification_head.dense.weight")
    assert not bool((pair.expected == 7.0).any())
    assert not any("one weight" in note for note in load("roberta").info().notes)


def test_a_field_that_fms_is_not_given_is_noted() -> None:
    """Only one that is changed, and that the family's mapping does not read."""
    notes = load("llama", changed_fields=("logit_scale", "hidden_size")).info().notes
    assert [note for note in notes if "logit_scale" in note]
    assert not [note for note in notes if "hidden_size" in note]


def hidden(candidate: FmsCandidate, inputs: CaseInputs) -> torch.Tensor:
    """Return an encoder's output at the positions that are not padding."""
    with torch.inference_mode():
        answer: Any = candidate.forward(inputs)
    found: torch.Tensor = answer["last_hidden_state"][:, inputs.attention_mask[0].bool()]
    return found


@pytest.mark.parametrize("sides", [(4, 0), (0, 4)], ids=["left", "right"])
def test_padding_on_either_side_changes_no_answer_of_an_encoder(sides: tuple[int, int]) -> None:
    """RoBERTa counts positions over the real tokens."""
    golden, candidate = golden_of("roberta"), load("roberta")
    whole = golden.inputs("one-sentence")
    pad = golden.manifest.generation.pad_token_id
    padded = CaseInputs(
        torch.nn.functional.pad(whole.input_ids, sides, value=pad),
        torch.nn.functional.pad(whole.attention_mask, sides),
    )
    assert torch.allclose(hidden(candidate, padded), hidden(candidate, whole), atol=1e-5)


def test_token_types_reach_an_encoder() -> None:
    """Those of a second text change the output; zeros are the model's default."""
    candidate, whole = load("roberta"), golden_of("roberta").inputs("one-sentence")
    zeros = replace(whole, token_type_ids=torch.zeros_like(whole.input_ids))
    ones = replace(whole, token_type_ids=torch.ones_like(whole.input_ids))
    assert torch.equal(hidden(candidate, whole), hidden(candidate, zeros))
    assert not torch.allclose(hidden(candidate, whole), hidden(candidate, ones), atol=1e-3)


class ForgetsMasks(Candidate):
    """An encoder that attends to the padding of a batch."""

    def __init__(self, right: FmsCandidate) -> None:
        self.right = right

    def forward(self, inputs: CaseInputs) -> Any:
        """Return what the right one does."""
        return self.right.forward(inputs)

    def forward_batch(self, rows: Sequence[CaseInputs]) -> Any:
        """Take every token for a real one."""
        ones = [replace(row, attention_mask=torch.ones_like(row.attention_mask)) for row in rows]
        return self.right.forward_batch(ones)


def test_encoders_are_asked_in_batches_padded_on_the_right() -> None:
    """The right one passes; one that attends to the padding fails there alone."""
    golden, right = golden_of("roberta"), load("roberta")
    recorded, judge = Recorded.of(golden), Judge(golden, "float32")

    def verdicts(candidate: object) -> dict[str, set[Verdict]]:
        with torch.inference_mode():
            found = explore(QueryRunner(candidate, recorded, judge), count=24)
        return {kind.kind: {r.verdict for r in kind.results} for kind in found.kinds}

    assert verdicts(right)["batch"] == {Verdict.PASS}
    wrong = verdicts(ForgetsMasks(right))
    assert Verdict.FAIL in wrong["batch"]
    assert wrong["padding"] == {Verdict.PASS}
