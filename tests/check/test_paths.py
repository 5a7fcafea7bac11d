"""`snap check --path`: the same golden questions on the paths on which FMS runs in production."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from tests.conftest import CHECKOUT, ROOT, Snap, error_lines, run_snap
from tests.families.test_families import broken_fms
from tests.mutants.mutant import Edit
from tests.mutants.paths import FAULTS, PATHS

FAMILIES = ROOT / "tests" / "families"
LLAMA = ("--goldens", FAMILIES / "goldens", "--checkpoint", "llama")
PAGED_FILE = "fms/utils/spyre/paged.py"
# The blocks of the cache are read from the last to the first.
WRONG_BLOCKS = Edit(
    PAGED_FILE,
    """\
        attn_kwargs["current_tkv_mask"],
        attn_kwargs["left_padded_prompt_mask"],
        attn_kwargs["block_table"],
    )


def __spyre_paged_compute_sinks_op(""",
    """\
        attn_kwargs["current_tkv_mask"],
        attn_kwargs["left_padded_prompt_mask"],
        attn_kwargs["block_table"].flip(1),
    )


def __spyre_paged_compute_sinks_op(""",
)


def check(snap: Snap, *options: object) -> Any:
    """Check FMS; return the report."""
    run = snap("check", *options, "--json", "-")
    return run.report


@pytest.mark.parametrize("path", ["static", "paged", "chunked", "chunked:5"])
def test_a_right_llama_passes_on_every_path(snap: Snap, path: str) -> None:
    """Forward, generate and derived questions: padding, batches, prompts in two parts."""
    report = check(snap, *LLAMA, "--path", path, "--explore", 35, "--seed", 3, "--localise")
    assert (report["verdict"], report["counts"]["skip"]) == ("pass", 0)
    assert report["path"] == ("chunked:64" if path == "chunked" else path)
    assert f"--path {path}" in report["command"]
    layers = [module for module in report["modules"] if ".layers." in module["module"]]
    assert all(module["output_error"] is not None for module in layers)


@pytest.mark.parametrize("path", ["static", "paged", "chunked:50"])
def test_a_right_idefics3_passes_on_every_path(snap: Snap, path: str) -> None:
    """With images before and after the end of a chunk, and with padding of its own."""
    cases = ("--case", "one-image,two-images,variant-01,variant-02")
    report = check(snap, "--fms-path", CHECKOUT, "--path", path, *cases)
    assert report["verdict"] == "pass"
    ran = {result["phase"] for result in report["results"] if result["verdict"] == "pass"}
    assert ran >= {"vision", "connector", "forward", "generate"}


def test_a_compiled_llama_passes_and_says_what_was_compiled(snap: Snap) -> None:
    """Cases of the same static shape need no further graph."""
    options = ("--case", "one-sentence,left-padded", "--phase", "forward")
    report = check(snap, *LLAMA, "--path", "compiled:eager", *options)
    assert (report["verdict"], report["path"]) == ("pass", "compiled:eager")
    (note,) = report["environment"]["candidate"]["notes"]
    assert re.fullmatch(
        r"torch.compile: [1-9]\d* graphs, 0 graph breaks, \d+ graphs compiled again after .*", note
    )


def test_a_fault_of_the_compiler_is_not_in_a_module(snap: Snap) -> None:
    """Modules run eagerly while they are compared, and agree."""
    options = ("--case", "one-sentence", "--phase", "forward")
    with wrong_backend("doubling"):
        report = check(snap, *LLAMA, "--path", "compiled:doubling", *options)
    assert report["first_divergence"]["phase"] == "forward"
    assert report["first_divergence"]["place"] == "the compiled code"


@contextmanager
def wrong_backend(name: str) -> Iterator[None]:
    """Register a backend of torch.compile that doubles the first output of every graph."""

    def double(module: torch.fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        return lambda *given: (2 * (found := module(*given))[0], *found[1:])

    torch._dynamo.register_backend(double, name=name)
    yield
    torch.compiler.reset()


def test_a_fault_in_the_cache_is_found_on_its_paths_alone(tmp_path: Path) -> None:
    """Each path has a line in the table, a report, and its difference from the first path."""
    fms, reports = broken_fms(WRONG_BLOCKS, tmp_path / "fms"), tmp_path / "reports"
    # In a process of its own: torch keeps the last operation of a name.
    run = run_snap(
        "check", *LLAMA, "--fms-path", fms, "--path", "eager,static,chunked:16", "--json", reports
    )
    assert run.code == 1
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in reports.iterdir()}
    verdicts = {name: report["verdict"] for name, report in found.items()}
    assert verdicts == {"eager": "pass", "static": "pass", "chunked-16": "fail"}
    assert found["eager"]["path_difference"] is None
    assert 0 < found["static"]["path_difference"]["share"] < 1
    wrong = found["chunked-16"]
    assert wrong["path_difference"]["share"] > 1
    assert wrong["first_divergence"]["module"] == "model.layers.0.self_attn"
    table = run.out.splitlines()[-5:]
    assert [line.split()[0] for line in table] == ["path", "eager", "static", "chunked:16", "FAIL:"]
    assert "forward / model.layers.0.self_attn" in table[3]
    assert "from eager: " in table[3]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_of_the_table_can_be_planted(name: str) -> None:
    """`make paths` plants them; a file that changed is found here."""
    fault = FAULTS[name].fault
    assert isinstance(fault, Edit)
    assert (CHECKOUT / fault.file).read_text("utf-8").count(fault.old) == 1
    assert set(FAULTS[name].places) <= set(PATHS)


@pytest.mark.parametrize("several", [("--all",), ("--path", "eager,static")])
def test_several_checks_write_into_folders(
    snap: Snap, tmp_path: Path, several: tuple[str, ...]
) -> None:
    """One that exists is used; a path that cannot be one is refused before any check."""
    options = (*LLAMA, *several, "--case", "one-sentence", "--phase", "forward")
    for file in ("-", tmp_path / "file"):
        (tmp_path / "file").touch()
        run = snap("check", *options, "--markdown", file)
        assert run.code in (2, 3)
        assert "forward" not in run.out
    assert snap("check", *options, "--json", tmp_path).code == 0
    assert len(list(tmp_path.glob("*.json"))) >= 1


def test_each_path_has_its_own_last_failures(tmp_path: Path) -> None:
    """A path that passes afterwards does not hide them."""
    fault = FAULTS["last-logits-one-early"].fault
    assert isinstance(fault, Edit)
    options = ("--fms-path", broken_fms(fault, tmp_path / "fms"), "--case", "one-sentence")
    reports = tmp_path / "reports"
    for last_failed in ([], ["--last-failed"]):
        run_snap(
            *("check", *LLAMA, *options, "--path", "static,eager", "--json", reports, *last_failed),
            XDG_CACHE_HOME=str(tmp_path),
        )
    results = json.loads((reports / "static.json").read_text("utf-8"))["results"]
    assert {result["phase"] for result in results} == {"generate"}


def test_a_fault_of_padded_prompts_is_found_on_the_static_path_alone(tmp_path: Path) -> None:
    """Without padding there is no mask, and the head runs on all positions."""
    fault = FAULTS["last-logits-one-early"].fault
    assert isinstance(fault, Edit)
    options = ("--fms-path", broken_fms(fault, tmp_path / "fms"), "--case", "one-sentence")
    run_snap("check", *LLAMA, *options, "--path", "eager,static", "--json", tmp_path / "reports")
    first = {
        path: json.loads((tmp_path / "reports" / f"{path}.json").read_text())["first_divergence"]
        for path in ("eager", "static")
    }
    assert first["eager"] is None
    assert (first["static"]["phase"], first["static"]["place"]) == (
        "generate",
        "the generation loop",
    )


def test_a_fault_of_a_module_has_the_same_name_on_a_path(tmp_path: Path) -> None:
    """The pieces of a prompt are put together before they are compared."""
    edit = Edit("fms/models/llama.py", "self.config.activation_fn", '"relu"')
    fms = broken_fms(edit, tmp_path / "fms")
    run = run_snap("check", *LLAMA, "--fms-path", fms, "--path", "chunked:7", "--json", "-")
    assert run.report["first_divergence"]["module"] == "model.layers.0.mlp.act_fn"


def test_an_exception_on_a_path_is_placed_in_the_module_that_raised(tmp_path: Path) -> None:
    """Also if it is raised before the prompt has been run to its end."""
    call = "    return torch.ops.spyre.paged_attn_compute("
    edit = Edit(PAGED_FILE, call, f"    raise RuntimeError\n{call}")
    options = ("--fms-path", broken_fms(edit, tmp_path / "fms"), "--case", "variant-04")
    run = run_snap("check", *LLAMA, *options, "--path", "chunked:7", "--json", "-")
    assert run.report["first_divergence"]["verdict"] == "error"
    assert run.report["first_divergence"]["module"] == "model.layers.0.self_attn"


def test_a_chunk_of_any_size_is_tried_and_the_failure_is_shrunk(tmp_path: Path) -> None:
    """Recorded cases have chunks of one size; the smallest question that fails runs again."""
    edit = Edit(
        "fms/modules/positions.py",
        "        if self.partial_rope != 1.0:\n            q_rope",
        "        if 1 < q.shape[1] < 9:\n"
        "            position_ids = position_ids - position_ids[:, :1]\n"
        "        if self.partial_rope != 1.0:\n            q_rope",
    )
    options = (*LLAMA, "--fms-path", broken_fms(edit, tmp_path / "fms"), "--path", "paged")
    run = run_snap("check", *options, "--explore", 150, "--phase", "forward", "--json", "-")
    kinds = {kind["kind"]: kind for kind in run.report["exploration"]["kinds"]}
    assert [result["verdict"] for result in run.report["results"][:1]] == ["pass"]
    assert (kinds["prefix"]["verdict"], kinds["chunks"]["verdict"]) == ("pass", "fail")
    smallest = kinds["chunks"]["smallest_failure"]
    assert re.fullmatch(r"chunks:[\w-]+@\d+:[2-8]:0", smallest)
    again = run_snap("check", *options, "--replay", smallest, "--json", "-")
    assert again.report["first_divergence"]["tensor"] == smallest


def test_what_a_family_cannot_do_is_a_skip_with_its_reason(snap: Snap) -> None:
    """An encoder has no cache; a skip alone is not a success."""
    options = ("--goldens", FAMILIES / "goldens", "--checkpoint", "roberta", "--json", "-")
    run = snap("check", *options, "--path", "paged")
    assert run.code == 3
    reasons = {result["reason"] for result in run.report["results"]}
    assert reasons == {"roberta runs on the eager path only: it is not a decoder"}


def test_an_fms_without_paged_attention_skips_the_path(tmp_path: Path) -> None:
    """The static path needs nothing of it."""
    edit = Edit(PAGED_FILE, "import math\nfrom typing", "raise ImportError\nfrom typing")
    fms = broken_fms(edit, tmp_path / "fms")
    run = run_snap("check", *LLAMA, "--fms-path", fms, "--path", "static", "--path", "paged")
    assert run.code == 3
    assert run.out.splitlines()[-1] == "PASS: 2 paths: 1 pass, 1 skip"
    assert "FMS has no paged attention" in run.out


@pytest.mark.parametrize(
    "options",
    [
        ("--path", "pages"),
        ("--path", "chunked:0"),
        ("--path", "static:64"),
        ("--path", "compiled:a b"),
        ("--path", "paged", "--graft", "model.layers.0"),
        ("--path", "paged", "--candidate", "tests.candidates:make"),
        ("--path", "eager,paged", "--json", "-"),
    ],
)
def test_a_path_that_cannot_be_checked_is_wrong_usage(snap: Snap, options: tuple[str, ...]) -> None:
    """Nothing runs."""
    run = snap("check", *LLAMA, *options)
    assert (run.code, run.out) == (2, "")
    error_lines(run)
