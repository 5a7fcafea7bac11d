"""FMS's encoders are given padding on the side where it is, and the token types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from snapshot_tool.base.protocol import CandidateRequest, CaseInputs
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.goldens.golden import Golden, open_golden

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> Golden:
    """Open the committed golden set of a RoBERTa."""
    (manifest,) = FOLDER.glob("goldens/local--roberta/*/*/manifest.json")
    return open_golden(manifest.parent)


@pytest.fixture(scope="module")
def candidate(golden: Golden) -> FmsCandidate:
    """Load FMS's RoBERTa."""
    config = golden.manifest.checkpoint.config
    checkpoint = FOLDER / "checkpoints" / "roberta"
    return load_fms_candidate(CandidateRequest(checkpoint, config, "cpu", "float32"), fms_path=None)


def hidden(candidate: FmsCandidate, inputs: CaseInputs) -> torch.Tensor:
    """Return the encoder's output at the positions that are no padding."""
    with torch.inference_mode():
        answer: Mapping[str, torch.Tensor] = candidate.forward(inputs)
    return answer["last_hidden_state"][:, inputs.attention_mask[0].bool()]


@pytest.mark.parametrize("sides", [(4, 0), (0, 4)], ids=["left", "right"])
def test_padding_on_either_side_changes_no_answer(
    golden: Golden, candidate: FmsCandidate, sides: tuple[int, int]
) -> None:
    """RoBERTa counts positions over the real tokens."""
    whole = golden.inputs("one-sentence")
    pad = golden.manifest.generation.pad_token_id
    padded = CaseInputs(
        torch.nn.functional.pad(whole.input_ids, sides, value=pad),
        torch.nn.functional.pad(whole.attention_mask, sides),
    )
    expected, actual = hidden(candidate, whole), hidden(candidate, padded)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_token_types_reach_the_model(golden: Golden, candidate: FmsCandidate) -> None:
    """Those of a second text make another answer; zeros are what the model assumes."""
    whole = golden.inputs("one-sentence")
    zeros = CaseInputs(
        whole.input_ids, whole.attention_mask, token_type_ids=torch.zeros_like(whole.input_ids)
    )
    ones = CaseInputs(
        whole.input_ids, whole.attention_mask, token_type_ids=torch.ones_like(whole.input_ids)
    )
    assert torch.equal(hidden(candidate, whole), hidden(candidate, zeros))
    assert not torch.allclose(hidden(candidate, whole), hidden(candidate, ones), atol=1e-3)
