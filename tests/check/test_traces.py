"""`snap trace` and `snap compare-traces` where Hugging Face is not: FMS, candidates, bad files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from snapshot_tool.base.errors import SnapError, UsageError
from snapshot_tool.base.localisation import ERROR_LIMIT, TraceComparison
from snapshot_tool.base.protocol import Progress
from snapshot_tool.goldens.find import GoldenChoice
from snapshot_tool.traces.compare import compare_traces, read_map
from snapshot_tool.traces.trace import TraceHeader, open_trace
from snapshot_tool.traces.workflow import Mode, TraceOptions, subject_of_golden, trace_candidate
from tests.conftest import CHECKOUT, GOLDENS, Snap, error_lines
from tests.unit.factory import flip_bit, truncate, write_raw

TEXT_CASE = "variant-02"
FMS = ("--impl", "fms", "--fms-path", CHECKOUT)


def trace_fms(out: Path, options: TraceOptions, *, candidate: str = "fms") -> TraceHeader:
    """Trace FMS on the case without images, in this process."""
    subject = subject_of_golden(GoldenChoice(GOLDENS, None, None, "cpu"), TEXT_CASE)
    path = CHECKOUT if candidate == "fms" else None
    return trace_candidate(out, subject, options, Progress(), candidate=candidate, fms_path=path)


def compare(one: Path, two: Path, *, limit: float = ERROR_LIMIT) -> TraceComparison:
    """Compare the outputs of two traces in this process."""
    return compare_traces(one, two, limit=limit)


@pytest.fixture(scope="module")
def trace(snap: Snap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trace FMS once, as a user does; a few tensors are too large to be kept whole."""
    out = tmp_path_factory.mktemp("trace") / "fms.safetensors"
    run = snap("trace", *FMS, "--case", TEXT_CASE, "--max-elements", 800, "--out", out)
    assert run.code == 0, run.err
    return out


def header_of(path: Path) -> Any:
    """Return what a trace says of itself, read as any reader would."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["snap-trace"])


def test_a_trace_holds_every_module_in_order_of_execution(trace: Path) -> None:
    """Under FMS's own names, children before their parents, with inputs and outputs."""
    header = header_of(trace)
    names = [call["module"] for call in header["calls"]]
    layer = "text_model.base_model.layers.1"
    assert names.index(f"{layer}.attn.in_proj") < names.index(f"{layer}.attn") < names.index(layer)
    assert names.index(layer) < names.index("text_model.base_model")
    assert names[-1] == "text_model.head"
    assert {call["run"] for call in header["calls"]} == {0}
    assert all(call["inputs"] and call["outputs"] for call in header["calls"])
    assert header["impl"] == "fms"
    assert header["environment"]["torch"] == torch.__version__
    assert header["question"] == f"case {TEXT_CASE}"


def test_a_trace_keeps_small_tensors_whole_and_sketches_of_others(trace: Path) -> None:
    """And it is a safetensors file that any reader opens."""
    tensors = load_file(trace)
    for call in header_of(trace)["calls"]:
        for kept in (*call["inputs"], *call["outputs"]):
            numel = torch.Size(kept["shape"]).numel()
            assert ("key" in kept) == (numel <= 800), kept
            assert ("sketch" in kept) == (numel > 800), kept
            if "key" in kept:
                assert list(tensors[kept["key"]].shape) == kept["shape"]
    assert tensors["inputs/input_ids"].shape == (1, 8)
    assert len(tensors["sketches/shapes"]) > 0


def test_all_outputs_of_a_fused_module_are_kept_and_named_after_the_familys_twins(
    trace: Path,
) -> None:
    """Queries and keys also in Hugging Face's order, the fused gate also in its two parts."""
    calls = {call["module"]: call for call in header_of(trace)["calls"]}
    layer = "text_model.base_model.layers.0"
    outputs = calls[f"{layer}.attn.in_proj"]["outputs"]
    assert [tensor["name"] for tensor in outputs if tensor["name"]] == ["0", "1", "2"]
    assert {tensor.get("twin", "").rpartition(".")[2] for tensor in outputs} == {
        "", "q_proj", "k_proj", "v_proj",
    }  # fmt: skip
    gate = calls[f"{layer}.ff_sub_layer.wg1_fused"]["outputs"]
    assert [tensor["shape"][-1] for tensor in gate] == [384, 192, 192]


def test_a_generation_is_traced_pass_by_pass(tmp_path: Path) -> None:
    """One pass for each token; the first alone where that is asked for."""
    options = TraceOptions(Mode.GENERATE, max_elements=0, max_new_tokens=3)
    header = trace_fms(tmp_path / "all", options)
    assert header.runs == 3
    heads = [call.run for call in header.calls if call.module == "text_model.head"]
    assert heads == [0, 1, 2]
    first = TraceOptions(Mode.GENERATE, first_pass_only=True, max_elements=0, max_new_tokens=3)
    assert trace_fms(tmp_path / "first", first).runs == 1


def test_a_candidate_that_raises_leaves_no_file(tmp_path: Path) -> None:
    """Nor a part of one."""
    with pytest.raises(ValueError, match="in the middle"):
        trace_fms(tmp_path / "out", TraceOptions(), candidate="tests.candidates:RaisesInForward")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_by_force(snap: Snap, trace: Path) -> None:
    """And refused before anything runs."""
    before = trace.read_bytes()
    run = snap("trace", *FMS, "--case", TEXT_CASE, "--out", trace)
    assert run.code == 3
    assert error_lines(run)[0].endswith("already exists")
    assert trace.read_bytes() == before


def test_a_trace_of_a_folder_wants_to_be_told_where_it_is(snap: Snap, trace: Path) -> None:
    """A trace may travel without its checkpoint: two lines, and nothing is looked for on a hub."""
    run = snap("trace", "--fms-path", CHECKOUT, "--inputs", trace, "--out", "nowhere.safetensors")
    assert run.code == 3
    assert error_lines(run)[0].endswith("does not say where the folder of local/tiny-idefics3 is")


def test_a_candidate_that_shows_no_modules_is_refused(snap: Snap, tmp_path: Path) -> None:
    """With the method that it lacks."""
    out = tmp_path / "out"
    run = snap(
        "trace", "--candidate", "tests.candidates:Wrapped", "--case", TEXT_CASE, "--out", out
    )
    assert run.code == 3
    assert "modules()" in error_lines(run)[1]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["--case", "nonsense"], 2, "no case nonsense"),
        ([], 2, "one of --case, --inputs and --prompt"),
        (["--case", TEXT_CASE, "--prompt", "x"], 2, "needs Hugging Face's processor"),
        (["--inputs", "nowhere"], 3, "is missing"),
        (["--impl", "hf", "--case", TEXT_CASE], 3, "needs transformers and accelerate"),
        (["--impl", "hf", "--case", TEXT_CASE, "--candidate", "a:b"], 2, "need --impl fms"),
    ],
    ids=["case", "nothing", "prompt", "inputs", "hugging-face", "candidate"],
)
def test_what_cannot_be_traced_says_why(
    snap: Snap, tmp_path: Path, options: list[str], code: int, problem: str
) -> None:
    """In two lines, and no file is written."""
    run = snap("trace", *options, "--out", tmp_path / "out")
    assert run.code == code
    assert problem in " ".join(error_lines(run))
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_traced_twice_is_equal_by_its_own_names(
    snap: Snap, trace: Path, tmp_path: Path
) -> None:
    """Whole tensors against sketches: what is kept on one side alone is sketched to compare."""
    trace_fms(tmp_path / "sketches", TraceOptions(max_elements=0))
    run = snap("compare-traces", trace, tmp_path / "sketches", "--json", "-")
    assert run.code == 0, run.out
    assert run.report["mapping"] == "modules matched by equal names"
    errors = [row["relative_error"] for row in run.report["rows"]]
    assert len(errors) > 50
    assert set(errors) == {0.0}
    assert all(row["sampled"] for row in run.report["rows"])
    assert run.report["reference_alone"] == run.report["other_alone"] == []


Change = Callable[[Any, dict[str, torch.Tensor]], None]


def spoilt(trace: Path, target: Path, change: Change) -> Path:
    """Write a copy of a trace with something changed in its header or its tensors."""
    header, tensors = header_of(trace), load_file(trace)
    change(header, tensors)
    save_file(tensors, target, metadata={"snap-trace": json.dumps(header)})
    return target


def test_a_second_output_that_differs_is_found(snap: Snap, trace: Path, tmp_path: Path) -> None:
    """Not only the first one of a module is compared: here the key's cache is."""

    def change(header: Any, tensors: dict[str, torch.Tensor]) -> None:
        call = next(c for c in header["calls"] if c["module"].endswith("layers.2.attn.in_proj"))
        tensors[call["outputs"][2]["key"]][0, 3, 5] += 1

    other = spoilt(trace, tmp_path / "other", change)
    run = snap("compare-traces", trace, other)
    assert run.code == 1
    assert "FAIL: 1 of " in run.out
    assert "the first is text_model.base_model.layers.2.attn.in_proj output 2" in run.out
    assert snap("compare-traces", trace, other, "--compare", "inputs").code == 0
    assert snap("compare-traces", trace, other, "--error-limit", 10).code == 0


def test_metrics_are_what_they_say(trace: Path, tmp_path: Path) -> None:
    """One element of 256 off by two; the cosine is of the whole vectors."""

    def change(header: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[header["calls"][5]["outputs"][0]["key"]].view(-1)[7] += 2

    (row,) = compare(trace, spoilt(trace, tmp_path / "o", change)).differing
    assert row.cosine is not None
    numel = torch.Size(row.shape).numel()
    assert row.max_abs == pytest.approx(2, rel=1e-5)
    assert row.sum_abs == pytest.approx(2, rel=1e-5)
    assert row.mean_abs == pytest.approx(2 / numel, rel=1e-5)
    assert row.cosine < 1
    whole = load_file(trace)[header_of(trace)["calls"][5]["outputs"][0]["key"]]
    rms = float(whole.square().mean().sqrt())
    assert row.relative_error == pytest.approx(2 / numel**0.5 / rms, rel=1e-4)


def test_nan_is_beyond_every_limit(trace: Path, tmp_path: Path) -> None:
    """It is no small number."""

    def change(header: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[header["calls"][5]["outputs"][0]["key"]].view(-1)[7] = torch.nan

    assert compare(trace, spoilt(trace, tmp_path / "o", change), limit=1e9).exit_code == 1


def test_a_call_or_module_that_is_missing_fails_by_name(trace: Path, tmp_path: Path) -> None:
    """Two traces of one implementation have the same modules."""
    gone = "text_model.base_model.layers.3.attn.dense"

    def change(header: Any, tensors: dict[str, torch.Tensor]) -> None:
        header["calls"] = [call for call in header["calls"] if call["module"] != gone]

    found = compare(trace, spoilt(trace, tmp_path / "o", change))
    assert found.exit_code == 1
    assert found.missing == (f"module {gone}",)


def test_a_map_matches_by_prefix_and_says_what_it_leaves_alone(
    snap: Snap, trace: Path, tmp_path: Path
) -> None:
    """A star is one part of a name; an entry that matches nothing is wrong usage."""
    path = tmp_path / "map.json"
    path.write_text(
        json.dumps({"text_model.base_model.layers.*": "text_model.base_model.layers.*"})
    )
    run = snap("compare-traces", trace, trace, "--map", path)
    assert run.code == 0, run.err
    assert "modules matched by --map" in run.out
    assert "of the reference without a match: text_model.base_model.embedding" in run.out
    path.write_text(json.dumps({"text_model.head": "text_model.nonsense"}))
    run = snap("compare-traces", trace, trace, "--map", path)
    assert run.code == 2
    assert "matches no modules" in error_lines(run)[0]


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "{", "[" * 100_000])
def test_a_map_that_is_none_is_wrong_usage(tmp_path: Path, text: str) -> None:
    """Whatever is in the file."""
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UsageError, match="--map"):
        read_map(tmp_path / "map.json")


def test_traces_of_different_inputs_are_not_compared(
    snap: Snap, trace: Path, tmp_path: Path
) -> None:
    """Figures of them would mean nothing."""

    def change(header: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors["inputs/input_ids"][0, 2] += 1

    run = snap("compare-traces", trace, spoilt(trace, tmp_path / "o", change))
    assert run.code == 2
    assert "different inputs" in error_lines(run)[0]


def _change_header(change: Callable[[Any], None]) -> Callable[[Path, Path], None]:
    return lambda trace, target: void(spoilt(trace, target, lambda header, _: change(header)))


def void(_: object) -> None:
    """Return nothing."""


def _drop(key: str) -> Callable[[Path, Path], None]:
    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    return lambda trace, target: void(spoilt(trace, target, change))


def _cut(key: str) -> Callable[[Path, Path], None]:
    def change(_: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = tensors[key][..., :-1].contiguous()

    return lambda trace, target: void(spoilt(trace, target, change))


def _cut_short(trace: Path, target: Path) -> None:
    shutil.copy(trace, target)
    truncate(target, size=-9)


def _long_header(trace: Path, target: Path) -> None:
    shutil.copy(trace, target)
    flip_bit(target, byte=7)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "cut": _cut_short,
    "empty": lambda _, target: void(target.write_bytes(b"")),
    "length": _long_header,
    "no trace": lambda _, target: void(write_raw(target, {})),
    "metadata": lambda _, target: void(write_raw(target, {"__metadata__": {"snap-trace": 5}})),
    "json": lambda _, target: void(write_raw(target, {"__metadata__": {"snap-trace": "{" * 999}})),
    "schema": _change_header(lambda header: header.update(schema="snap-trace/9")),
    "field": _change_header(lambda header: header.update(extra=1)),
    "row": _change_header(lambda header: header["calls"][0]["outputs"][0].update(sketch=10**9)),
    "key": _change_header(lambda header: header["calls"][0]["outputs"][0].update(key="nowhere")),
    "shape": _change_header(lambda header: header["calls"][5]["outputs"][0].update(shape=[1])),
    "sketches": _drop("sketches/moments"),
    "sketch width": _cut("sketches/projection"),
    "inputs": _drop("inputs/input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_trace_is_refused(
    trace: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    """By an error with exit code 3, on one or two lines."""
    target = tmp_path / "bad.safetensors"
    damage(trace, target)
    with pytest.raises(SnapError) as caught:
        open_trace(target)
    assert caught.value.exit_code == 3
    assert 1 <= len(str(caught.value).splitlines()) <= 2
    assert str(target) in caught.value.problem


def test_a_damaged_trace_ends_the_command_with_3(snap: Snap, trace: Path, tmp_path: Path) -> None:
    """In two lines."""
    DAMAGES["cut"](trace, tmp_path / "bad")
    run = snap("compare-traces", trace, tmp_path / "bad")
    assert run.code == 3
    assert "cut short" in error_lines(run)[0]
