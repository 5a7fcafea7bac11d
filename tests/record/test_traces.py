"""Traces of Hugging Face's model beside FMS's: the same modules, whatever each calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from snapshot_tool.base.localisation import ERROR_LIMIT, TraceComparison
from snapshot_tool.base.protocol import Progress, Side
from snapshot_tool.goldens.find import GoldenChoice
from snapshot_tool.traces.compare import compare_traces
from snapshot_tool.traces.workflow import (
    Mode,
    TraceOptions,
    subject_of_golden,
    trace_candidate,
    trace_reference,
)
from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, ROOT, Snap, run_snap

pytestmark = pytest.mark.record

FORWARD = TraceOptions()
SKETCHES = TraceOptions(max_elements=0)
THREE_TOKENS = TraceOptions(Mode.GENERATE, max_new_tokens=3)
# Hugging Face's modules that FMS does not have, or does not call.
LACKING = {"model", "model.text_model.rotary_emb"}


def trace_both(
    folder: Path,
    case: str,
    options: TraceOptions,
    *,
    candidate: str = "fms",
    other_options: TraceOptions | None = None,
) -> tuple[Path, Path]:
    """Trace both implementations on a case."""
    subject = subject_of_golden(GoldenChoice(GOLDENS, None, None, "cpu"), case)
    hf, other = folder / "hf.safetensors", folder / "other.safetensors"
    trace_reference(hf, subject, options, Progress())
    trace_candidate(
        other,
        subject,
        other_options or options,
        Progress(),
        candidate=candidate,
        fms_path=CHECKOUT if candidate == "fms" else None,
    )
    return hf, other


def compare(one: Path, two: Path, side: Side = Side.OUTPUT) -> TraceComparison:
    """Compare two traces."""
    return compare_traces(one, two, side=side)


@pytest.mark.parametrize(
    ("case", "options", "other_options"),
    [
        ("variant-04", FORWARD, SKETCHES),
        ("variant-11", FORWARD, FORWARD),
        ("variant-02", THREE_TOKENS, THREE_TOKENS),
    ],
    ids=["whole-against-sketches", "padded", "generate"],
)
def test_a_correct_port_agrees_in_every_module_by_the_familys_names(
    tmp_path: Path, case: str, options: TraceOptions, other_options: TraceOptions
) -> None:
    """Fused and reordered ones included, on both sides of each module, in every pass."""
    hf, fms = trace_both(tmp_path, case, options, other_options=other_options)
    for side in Side:
        found = compare(fms, hf, side)
        assert found.exit_code == 0, found.differing[:3]
        assert found.mapping == "modules matched by the family's names"
        assert found.reference.startswith("transformers")
        assert set(found.reference_alone) == LACKING
        assert found.missing == ()
        measured = [row for row in found.rows if row.relative_error is not None]
        assert len(measured) >= len({row.module for row in found.rows}) - 1
        assert max(row.relative_error or 0 for row in measured) < ERROR_LIMIT / 3
    assert {row.run for row in found.rows} == set(range(options.max_new_tokens or 1))


def test_both_generate_up_to_the_end_token_of_the_case(tmp_path: Path) -> None:
    """It is not one of the checkpoint's: recording chose it so that the generation meets it."""
    choice = GoldenChoice(ROOT / "tests" / "module-goldens", None, None, "cpu")
    subject = subject_of_golden(choice, "end-token")
    options = TraceOptions(Mode.GENERATE)
    hf, fms = tmp_path / "hf.safetensors", tmp_path / "fms.safetensors"
    passes = trace_reference(hf, subject, options, Progress()).runs
    assert passes == trace_candidate(fms, subject, options, Progress(), fms_path=CHECKOUT).runs
    assert passes < subject.header.max_new_tokens
    assert compare(hf, fms).exit_code == 0


def test_modules_without_names_are_matched_by_what_they_compute(tmp_path: Path) -> None:
    """Hugging Face's trace beside one of FMS's model whose names nobody knows."""
    hf, other = trace_both(tmp_path, "variant-02", FORWARD, candidate="tests.candidates:Unnamed")
    found = compare(hf, other)
    assert found.exit_code == 0, found.differing[:3]
    assert found.mapping.startswith("modules inferred from shapes and order, 56 of 58")
    assert set(found.reference_alone) == LACKING
    # FMS's rotary order: the same values elsewhere, which is said and is no error.
    elsewhere = {row.module.rpartition(".")[2] for row in found.rows if row.problem}
    assert elsewhere == {"q_proj", "k_proj"}


def test_a_faulty_module_is_the_first_row_that_differs(tmp_path: Path) -> None:
    """One weight of an encoder layer off by a hundredth, with the partners inferred."""
    hf, other = tmp_path / "hf.safetensors", tmp_path / "other.safetensors"
    faulty = ("--candidate", "tests.candidates:UnnamedAndFaulty")
    for implementation, out in ((("--impl", "hf"), hf), (faulty, other)):
        run = run_snap("trace", *implementation, "--case", "variant-04", "--out", out)
        assert run.code == 0, run.err
    run = run_snap("compare-traces", hf, other, "--json", "-")
    assert run.code == 1, run.out + run.err
    first = next(row for row in run.report["rows"] if row["beyond"])
    assert first["module"] == "model.vision_model.encoder.layers.1.mlp.fc2"
    assert first["partner"] == "vision_tower.base_model.encoder.layers.1.mlp.w2"


def test_a_prompt_traced_with_hugging_face_is_traced_again_without(
    snap: Snap, tmp_path: Path
) -> None:
    """The second trace takes its inputs and configuration from the first."""
    Image.linear_gradient("L").resize((60, 40)).save(tmp_path / "picture.png")
    run = snap(
        "trace", "--impl", "hf", "--checkpoint", CHECKPOINT, "--prompt", "What is this: <image>?",
        "--image", tmp_path / "picture.png", "--out", tmp_path / "hf",
    )  # fmt: skip
    assert run.code == 0, run.err
    run = snap(
        "trace", "--fms-path", CHECKOUT, "--checkpoint", CHECKPOINT, "--inputs", tmp_path / "hf",
        "--out", tmp_path / "fms",
    )  # fmt: skip
    assert run.code == 0, run.err
    run = snap("compare-traces", tmp_path / "hf", tmp_path / "fms", "--limit", 3)
    assert run.code == 0, run.err
    assert "PASS: 101 tensors agree" in run.out


def test_a_prompt_without_its_images_is_wrong_usage(snap: Snap, tmp_path: Path) -> None:
    """The placeholders and the files must be as many."""
    run = snap(
        "trace", "--impl", "hf", "--checkpoint", CHECKPOINT, "--prompt", "<image>",
        "--out", tmp_path / "hf",
    )  # fmt: skip
    assert run.code == 2
    assert "1 <image> in the prompt for 0 images" in run.err
    assert list(tmp_path.iterdir()) == []
