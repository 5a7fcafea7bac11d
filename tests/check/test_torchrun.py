"""`torchrun -m snapshot_tool check`: FMS split over two processes, on the committed goldens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, ROOT, Snap
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import Edit, plant

LLAMA = ("--goldens", "tests/families/goldens", "--checkpoint", "tests/families/checkpoints/llama")
IDEFICS3 = ("--case", "one-image", "--phase", "vision", "--phase", "forward")


@dataclass(frozen=True, slots=True)
class Launch:
    """What came of a check on two ranks; `report` is None where none was written."""

    code: int
    out: str
    err: str
    report: Any


def launch(folder: Path, *options: object) -> Launch:
    """Run `snap check` on two ranks."""
    file = folder / "report.json"
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "snapshot_tool", "check", *map(str, options), "--json", str(file)),
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    report = json.loads(file.read_text()) if file.exists() else None
    return Launch(answer.returncode, answer.stdout, answer.stderr, report)


def verdicts(report: Any) -> list[tuple[str, ...]]:
    """Return what was said of each tensor."""
    return [(r["case"], r["phase"], r["tensor"], r["verdict"]) for r in report["results"]]


def said(run: Launch) -> list[str]:
    """Return what snap itself wrote to standard error."""
    return [line for line in run.err.splitlines() if line.startswith("snap: ")]


def test_a_split_llama_has_the_verdicts_of_a_whole_one(snap: Snap, tmp_path: Path) -> None:
    """Rank 0 alone reports, on standard output too, and the note says how it ran."""
    whole = snap("check", *LLAMA, "--json", "-").report
    split = launch(tmp_path, *LLAMA, "--explore", 7)
    assert split.code == whole["exit_code"] == 0
    recorded = [verdict for verdict in verdicts(split.report) if ":" not in verdict[2]]
    assert recorded == verdicts(whole)
    assert split.report["weights"] == whole["weights"]
    assert {k["verdict"] for k in split.report["exploration"]["kinds"]} == {"pass"}
    assert split.out.count("PASS: ") == 1
    assert split.out.startswith("golden ")
    (note,) = split.report["environment"]["candidate"]["notes"]
    assert note == "on 2 ranks (gloo)"


def test_a_split_llama_passes_with_paged_attention(tmp_path: Path) -> None:
    """Each rank has the heads of its own keys and values in its cache."""
    run = launch(tmp_path, *LLAMA, "--path", "chunked:16", "--explore", 7)
    assert (run.code, run.report["path"], run.report["counts"]["skip"]) == (0, "chunked:16", 0)


def test_a_split_idefics3_passes_and_all_of_its_modules_are_compared(tmp_path: Path) -> None:
    """Inputs and outputs inside of attention and MLP are gathered, in forward and by themselves."""
    run = launch(tmp_path, "--fms-path", CHECKOUT, *IDEFICS3, "--localise")
    assert (run.code, run.report["verdict"]) == (0, "pass")
    layer = "model.text_model.layers.0"
    compared = {m["module"] for m in run.report["modules"] if m["output_error"] is not None}
    inside = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.act_fn")
    assert {layer, f"{layer}.mlp", *(f"{layer}.{name}" for name in inside)} <= compared
    assert not any(layer in name for name in run.report["module_mapping"]["not_compared"])
    trials = run.report["probes"]
    assert trials["tried"] > 0
    assert (trials["wrong"], trials["not_tried"]) == ([], [])


def test_a_fault_is_found_in_the_module_in_which_one_process_finds_it(tmp_path: Path) -> None:
    """Inside of a split module, too. The launcher fails with the check, and the report is whole."""
    fms = tmp_path / "fms"
    plant(edit_of("gelu-gate"), checkout=CHECKOUT, out=fms)
    run = launch(tmp_path, "--fms-path", fms, *IDEFICS3)
    first = run.report["first_divergence"]
    assert (run.code, run.report["exit_code"], first["phase"]) == (1, 1, "forward")
    assert first["module"] == "model.text_model.layers.0.mlp.act_fn"


SHARD = "self.rank // max(1, self.world_size // replication)"
JOINED = "tensor = torch.cat(tensors_to_cat, dim=dim)\n"
FUSED = {"attn.in_proj.qkv_fused", "ff_sub_layer.wg1_fused"}
SPLIT = FUSED | {"attn.dense", "ff_sub_layer.w2"}


@pytest.mark.parametrize(
    ("edit", "weights", "ranks", "phase"),
    [
        ((SHARD, "0"), SPLIT, {1}, "forward"),
        ((SHARD, "(self.rank + (weight_i > 0)) % 2"), FUSED, {0, 1}, "forward"),
        ((JOINED, f"{JOINED}            tensor += 1e-7 * self.rank\n"), SPLIT, {1}, None),
    ],
    ids=["the shards of rank 0", "keys and values of the other rank", "nearly the same numbers"],
)
def test_a_wrong_shard_is_found_and_its_rank_is_named(
    tmp_path: Path, edit: tuple[str, str], weights: set[str], ranks: set[int], phase: str | None
) -> None:
    """Each rank compares its own shards exactly, whether or not they change an output."""
    fms = tmp_path / "fms"
    plant(Edit("fms/modules/tp.py", *edit), checkout=CHECKOUT, out=fms)
    run = launch(tmp_path, "--fms-path", fms, *LLAMA, "--case", "one-sentence")
    first, found = run.report["first_divergence"], run.report["weights"]
    assert (run.code, first and first["phase"], found["not_compared"]) == (1, phase, [])
    expected = {f"base_model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in weights}
    assert {weight["name"] for weight in found["differing"]} == expected
    assert {weight["rank"] for weight in found["differing"]} == ranks


def test_a_model_that_fms_does_not_split_is_refused_in_one_line(tmp_path: Path) -> None:
    """Every rank would hold all of it: nothing is gained."""
    fms = tmp_path / "fms"
    file = "fms/models/idefics3_components/fms_model.py"
    edit = Edit(file, "LLaMA(text, distributed_strategy)", "LLaMA(text)")
    plant(edit, checkout=CHECKOUT, out=fms)
    run = launch(tmp_path, "--fms-path", fms, *IDEFICS3)
    assert (run.code, run.report) == (1, None)
    assert said(run) == ["snap: FMS does not split idefics3: every rank would hold the whole model"]
    assert "exitcode  : 3" in run.err


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (
            "RaisesBefore",
            "not all 2 ranks ended forward, rank 1 ended it with ValueError: rank one",
        ),
        ("Dies", None),
    ],
)
def test_a_rank_that_goes_wrong_alone_ends_the_check(
    tmp_path: Path, candidate: str, message: str | None
) -> None:
    """The other one waits for it inside the model: it must not wait for ever."""
    spec = f"tests.check.rank_candidates:{candidate}"
    run = launch(tmp_path, *LLAMA, "--candidate", spec, "--phase", "forward")
    assert (run.code, run.report) == (1, None)
    found = [line for line in said(run) if message and message in line]
    assert message is None or "tests/check/rank_candidates.py:" in found[0]


def test_what_one_rank_raises_after_all_have_met_is_an_error_of_the_phase(tmp_path: Path) -> None:
    """The ranks are in step, so the check goes on to its end."""
    spec = "tests.check.rank_candidates:RaisesAfterwards"
    run = launch(tmp_path, *LLAMA, "--candidate", spec, "--phase", "forward")
    results = run.report["results"]
    assert run.code == 1
    assert {(r["phase"], r["verdict"]) for r in results} == {("forward", "error")}
    assert "on rank 1 with ValueError: rank one is out of sorts" in results[0]["reason"]
    assert "tests/check/rank_candidates.py:" in results[0]["reason"]
