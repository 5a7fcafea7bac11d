"""A right port passes, compiled as a whole or in part; what is wrong with one is still named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from snapshot_tool.taps.hooks import plain_modules, plain_names, run_eagerly
from tests.conftest import CHECKOUT, Snap
from tests.mutants.corpus import edit_of
from tests.mutants.mutant import Edit, edit_file, plant

MODEL = "fms/models/idefics3_components/fms_model.py"
TEXT = "self.text_model = LLaMA(text, distributed_strategy)\n"
FORMS = {
    "whole": f'{TEXT}        self.compile(backend="eager")\n',
    "wrapped": TEXT.replace("LLaMA(", "torch.compile(LLaMA(").replace(
        ")\n", '), backend="eager")\n'
    ),
    "part": f'{TEXT}        self.text_model.base_model.compile(backend="eager")\n',
    "function": f'{TEXT}        self._embed = torch.compile(self._embed, backend="eager")\n',
}


def check(snap: Snap, fms: Path, *options: object) -> Any:
    """Check a port on a case with a few tiles; return its report."""
    case = ("--case", "variant-09")
    return json.loads(snap("check", "--fms-path", fms, *case, *options, "--json", "-").out)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_port_passes(snap: Snap, tmp_path: Path, form: str) -> None:
    """All its weights are there, it is said to do nothing wrong, and its modules are seen."""
    plant(Edit(MODEL, TEXT, FORMS[form]), checkout=CHECKOUT, out=tmp_path / "fms")
    report = check(snap, tmp_path / "fms", "--localise")
    assert report["verdict"] == "pass"
    assert all(text.startswith("transformers warned: ") for text in report["warnings"])
    unset = report["weights"]["unset"]
    assert {name.partition(".head.")[0] for name in unset} == {"vision_tower"}
    assert report["weights"]["not_compared"] == []
    assert all(
        m["output_error"] is not None for m in report["modules"] if ".layers." in m["module"]
    )


def test_a_fault_in_a_compiled_port_is_named(snap: Snap, tmp_path: Path) -> None:
    """Its modules run as they are written while they are looked at."""
    fms = tmp_path / "fms"
    plant(Edit(MODEL, TEXT, FORMS["wrapped"]), checkout=CHECKOUT, out=fms)
    edit_file(edit_of("hard-swish"), root=fms)
    report = check(snap, fms)
    assert report["verdict"] == "fail"
    assert report["first_divergence"]["module"] == "model.text_model.layers.0.mlp.act_fn"


def test_names_are_those_from_before_compilation() -> None:
    """A wrapper and the module inside have one name, which is the module's."""
    inner = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(inner)
    model[0] = torch.compile(inner, backend="eager")  # type: ignore[assignment]
    assert plain_modules(model)["0"] is inner
    assert set(plain_names(model.named_parameters())) == {"0.weight", "0.bias"}


def test_what_is_compiled_runs_as_written_inside_the_block() -> None:
    """Hooks that were not there when it was compiled are called."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.compile(backend="eager")
    model(torch.ones(1, 2))
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_given: seen.append(1))
    with run_eagerly():
        model(torch.ones(1, 2))
    assert seen == [1]
