"""What differs between two golden sets, and what of it counts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from snapshot_tool.base.results import Verdict
from snapshot_tool.diagnose.diff import SetDiff, describe_diff, diff_goldens
from snapshot_tool.goldens.golden import open_golden
from snapshot_tool.goldens.layout import INPUTS
from snapshot_tool.goldens.manifest import SCHEMA_VERSION, load_manifest
from snapshot_tool.goldens.parts import STEP_LOGSUMEXP
from snapshot_tool.goldens.tensors import describe_file
from snapshot_tool.goldens.verify import set_file
from snapshot_tool.reports.diff import diff_lines, diff_to_html, diff_to_markdown
from snapshot_tool.reports.json import write_json
from tests.unit.factory import rewrite, write_golden, write_manifest

Change = Callable[[dict[str, torch.Tensor]], object]


def diff_after(tmp_path: Path, file: str, change: Change, **fields: object) -> SetDiff:
    """Change some tensors of a copy of a set (and manifest fields) and return what differs."""
    one = write_golden(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    other = tmp_path / "other" / one.relative_to(tmp_path / "one")
    rewrite(other, file, change, **fields)
    return diff_goldens(open_golden(one), open_golden(other))


def add(key: str, amount: float) -> Change:
    """Add to all elements of a tensor."""
    return lambda tensors: tensors.update({key: tensors[key] + amount})


@pytest.mark.parametrize(
    ("file", "key", "amount", "verdict"),
    [
        ("vision.safetensors", "two-images/last_hidden_state", 1e-4, Verdict.PASS),
        ("vision.safetensors", "two-images/last_hidden_state", 1e-2, Verdict.FAIL),
        ("forward.safetensors", "text-only/logits", 2e-5, Verdict.PASS),
        ("forward.safetensors", "text-only/logits", 1e-3, Verdict.FAIL),
        # Logits that generation keeps are judged as logits, its tokens exactly.
        ("generate.safetensors", "text-only/step_topk_values", 2e-5, Verdict.PASS),
        ("generate.safetensors", "text-only/step_topk_values", 1e-3, Verdict.FAIL),
        ("generate.safetensors", "text-only/token_ids", 1, Verdict.FAIL),
        # Which of two near-ties comes first says nothing by itself.
        ("generate.safetensors", "text-only/step_topk_ids", 1, Verdict.PASS),
        (INPUTS, "two-images/pixel_values", 1e-6, Verdict.FAIL),
        (INPUTS, "two-images/input_ids", 1, Verdict.FAIL),
    ],
)
def test_a_tensor_that_moved_is_judged_by_its_own_tolerance(
    tmp_path: Path, file: str, key: str, amount: float, verdict: Verdict
) -> None:
    """It alone is reported; the same values rewritten are no difference."""
    (diff,) = diff_after(tmp_path, file, add(key, amount)).moved
    assert (f"{diff.case}/{diff.tensor}", diff.verdict) == (key, verdict)
    assert diff_after(tmp_path / "again", file, add(key, 0)).moved == ()


def test_a_tensor_without_a_partner_is_a_difference(tmp_path: Path) -> None:
    """The reason says in which set it is missing."""
    key = "two-images/image_hidden_states"
    found = diff_after(tmp_path, "connector.safetensors", lambda tensors: tensors.pop(key))
    (diff,) = found.moved
    assert (diff.verdict, diff.reason) == (Verdict.FAIL, f"not in {found.other.folder}")
    (line,) = describe_diff(found)
    assert line.startswith("connector: 1 tensors moved, 1 beyond tolerance")


def test_a_part_has_its_worst_tensor_in_units_of_its_tolerance(tmp_path: Path) -> None:
    """A tolerance that is exceeded counts more than a large difference within another one."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["two-images/logits"] += 6e-5
        tensors["text-only/logits"] += 4.9e-4

    found = diff_after(tmp_path, "forward.safetensors", change)
    (part,) = found.parts
    assert (part.part, part.moved, part.beyond) == ("forward", 2, 1)
    worst = found.worst(part)
    assert worst.case == "text-only"
    assert part.largest == pytest.approx(4.9e-4, rel=1e-2)
    # |diff| / (atol + rtol * |expected|), by the definition of the tolerance.
    expected, actual = (
        float(number) for number in re.findall(r"(?:expected|actual) ([-\d.]+)", worst.reason)
    )
    (atol, rtol) = (5e-5, 5e-5)
    allowed = atol + rtol * abs(expected)
    assert part.tolerances == pytest.approx(abs(actual - expected) / allowed, rel=0.01)
    (line,) = describe_diff(found)
    assert line.endswith(f"{part.tolerances:.2g}x tolerance at worst")


def test_an_infinity_is_worse_than_any_number(tmp_path: Path) -> None:
    """It is in every report, and the JSON stays valid."""
    key = "text-only/logits"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["two-images/logits"] += 5
        tensors[key][3] = torch.inf

    found = diff_after(tmp_path, "forward.safetensors", change)
    (part,) = found.parts
    assert found.worst(part).case == "text-only"
    report = json.loads(write_json(found), parse_constant=pytest.fail)
    assert report["parts"][0]["largest"] == "inf"
    assert "1 Inf" in "\n".join(diff_lines(found))


def with_other_tokens(tmp_path: Path, text: str) -> SetDiff:
    """Return the difference of a set whose second token, and text, are others."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["text-only/token_ids"][1] = 9

    cases = tuple(
        msgspec.structs.replace(case, generated=text) if case.name == "text-only" else case
        for case in load_manifest(write_golden(tmp_path / "any")).cases
    )
    environment = {"torch": "2.13.0", "python": "3.11.9"}
    return diff_after(
        tmp_path, "generate.safetensors", change, cases=cases, environment=environment
    )


def test_tokens_that_moved_are_shown_as_text(tmp_path: Path) -> None:
    """From the first step that differs, before and after, with the versions that differ."""
    found = with_other_tokens(tmp_path, "kleiner")
    lines = diff_lines(found)
    place = lines.index("tokens of text-only change from step 1:")
    assert lines[place + 1 : place + 3] == ["  - 'größer'", "  + 'kleiner'"]
    assert "       torch: 2.6.0 -> 2.13.0" in lines
    assert describe_diff(found)[-1] == "tokens of text-only change from step 1"
    report = json.loads(write_json(found))
    assert report["tokens"] == [
        {"case": "text-only", "step": 1, "one": "größer", "other": "kleiner"}
    ]
    assert report["environment"] == {"torch": {"one": "2.6.0", "other": "2.13.0"}}


def test_the_page_shows_the_same_and_trusts_no_text(tmp_path: Path) -> None:
    """What a model said is text, not markup; nothing is loaded from anywhere."""
    page = diff_to_html(with_other_tokens(tmp_path, "<script>alert(1)</script>"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "text-only, from step 1" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)


def test_sets_with_other_cases_are_compared_by_what_both_have(tmp_path: Path) -> None:
    """The cases of one set alone are named once, and are a difference."""
    one = write_golden(tmp_path / "one")
    other = write_golden(tmp_path / "other")
    manifest = load_manifest(other)
    files = {}
    for name in manifest.files:
        path = set_file(other, name)
        kept = {k: v for k, v in load_file(path).items() if k.startswith("text-only/")}
        if kept:
            save_file(kept, path)
            files[name] = describe_file(path)
    cases = tuple(case for case in manifest.cases if case.name == "text-only")
    write_manifest(other, msgspec.structs.replace(manifest, files=files, cases=cases))
    found = diff_goldens(open_golden(one), open_golden(other))
    assert found.moved == ()
    assert (found.only_in_one, found.only_in_other) == (("two-images",), ())
    assert not found.same
    assert not found.within
    (line,) = (line for line in diff_lines(found) if "two-images" in line)
    assert f"1 cases only in {one}: two-images" in line


def test_the_markdown_has_what_moved_by_part_and_by_case(tmp_path: Path) -> None:
    """For reviewing an update case by case; what the sets say stays text."""
    found = diff_after(tmp_path, "forward.safetensors", add("text-only/logits", 1e-3))
    text = diff_to_markdown(found)
    assert "| forward | " in text
    assert "| text-only | forward | forward / logits |" in text
    assert "two-images" not in text
    same = diff_to_markdown(diff_after(tmp_path / "same", INPUTS, lambda _tensors: None))
    assert same.rstrip().endswith("every tensor has the same bytes.")


def test_an_older_set_is_compared_in_what_it_keeps(tmp_path: Path) -> None:
    """It has fewer of the greatest logits, and no log-sum-exp of steps."""

    def as_before(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "step_topk" in key]:
            tensors[key] = tensors[key][:, :8].contiguous()
        for key in [key for key in tensors if key.endswith(STEP_LOGSUMEXP)]:
            del tensors[key]

    file = "generate.safetensors"
    found = diff_after(tmp_path, file, as_before, schema_version=SCHEMA_VERSION - 1)
    assert found.within
    assert any("schema" in line for line in found.files)
    same_schema = diff_after(tmp_path / "again", file, as_before)
    assert not same_schema.within
