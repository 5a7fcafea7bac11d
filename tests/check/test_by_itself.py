"""FMS's modules by themselves: probes and `--isolate` name what is wrong, several at once."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from snapshot_tool.base.errors import GoldenNotFound
from snapshot_tool.base.localisation import ModuleTrials
from snapshot_tool.base.protocol import CandidateRequest, Side
from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate
from snapshot_tool.diagnose.modules import (
    Isolator,
    can_isolate,
    isolate,
    isolate_modules,
    probe_modules,
)
from snapshot_tool.goldens.golden import Golden, open_golden
from snapshot_tool.numerics.compare import compare_weights
from snapshot_tool.taps.sketches import probe_input
from tests.candidates import CHECKOUT
from tests.conftest import ROOT, Snap, set_folder
from tests.mutants.corpus import MUTANTS
from tests.mutants.mutant import Change, weight_of

_CASE = "variant-04"
_SAME_CODE = 1e-6  # both runs are of one port: any error is a fault's


@contextmanager
def changed(candidate: FmsCandidate, faults: list[Change]) -> Iterator[None]:
    """Plant faults in the loaded model, and take them out again."""
    model = candidate.model
    before = []
    for fault in faults:
        weight = weight_of(model, fault.weight)
        before.append((weight, weight.clone()))
        fault.apply(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in reversed(before):
                weight.copy_(kept)


@pytest.fixture(scope="module")
def recorded(golden: Golden, candidate: FmsCandidate) -> dict[tuple[str, Side], torch.Tensor]:
    """Keep what the unchanged port's modules take and return."""
    kept: dict[tuple[str, Side], torch.Tensor] = {}

    def keep(module: str, side: Side, tensor: torch.Tensor) -> None:
        if can_isolate(tensor):
            kept.setdefault((module, side), tensor.clone())

    with torch.inference_mode():
        candidate.observe_forward(golden.inputs(_CASE), keep)
    return kept


# Faults in one weight, which one module has alone.
_SINGLE = {
    name: mutant
    for name, mutant in MUTANTS.items()
    if isinstance(mutant.fault, Change)
    and not mutant.fault.how.startswith(("set to", "swapped with"))
    and mutant.fault.weight != "all weights"
    and mutant.fault.how not in ("[7, 7] is NaN", "transposed")
    and name not in ("vision-key-bias-zeroed", "unused-embedding-doubled", "last-position-moved")
}


def run_isolated(
    golden: Golden,
    candidate: FmsCandidate,
    recorded: dict[tuple[str, Side], torch.Tensor],
) -> ModuleTrials:
    """Run the candidate's modules on what was recorded."""
    inputs = golden.inputs(_CASE)
    isolator = Isolator(recorded, golden.manifest.taps.seed, inputs.attention_mask)
    limits = dict.fromkeys(recorded, _SAME_CODE)
    return isolate(candidate, inputs, isolator, limits)


@pytest.mark.parametrize("seed", range(6))
def test_every_fault_of_a_young_port_is_named(
    golden: Golden,
    candidate: FmsCandidate,
    recorded: dict[tuple[str, Side], torch.Tensor],
    seed: int,
) -> None:
    """Two to five faults of the corpus at once, in fused weights as well: all named, no others."""
    draw = random.Random(seed)
    chosen = [_SINGLE[name] for name in draw.sample(sorted(_SINGLE), draw.randint(2, 5))]
    with changed(candidate, [m.fault for m in chosen if isinstance(m.fault, Change)]):
        found = run_isolated(golden, candidate, recorded)
    assert {t.module for t in found.wrong} == {mutant.places[0] for mutant in chosen}
    assert run_isolated(golden, candidate, recorded).wrong == ()


# A set of the tiny Llama, recorded by Hugging Face with `--oracle --modules one-sentence`.
_RECORDED = ROOT / "tests" / "module-goldens"


@pytest.fixture(scope="module")
def llama() -> tuple[Golden, FmsCandidate]:
    """Open the set, and load FMS's model of it."""
    recorded = open_golden(set_folder(_RECORDED))
    folder = ROOT / "tests" / "families" / "checkpoints" / "llama"
    request = CandidateRequest(folder, recorded.manifest.checkpoint.config, "cpu", "float32")
    return recorded, load_fms_candidate(request, fms_path=CHECKOUT)


def wrong(llama: tuple[Golden, FmsCandidate], *, isolated: bool = False) -> set[str]:
    """Return the modules that probes, or isolation, find wrong."""
    recorded, port = llama
    if isolated:
        return {t.module for t in isolate_modules(port, recorded, dtype="float32").wrong}
    found = probe_modules(port, recorded, dtype="float32")
    assert found is not None
    assert (found.tried, found.not_tried) == (23, ())
    return {trial.module for trial in found.wrong}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_module_of_a_right_port_is_wrong_by_itself(
    llama: tuple[Golden, FmsCandidate], dtype: str
) -> None:
    """Neither on seeded inputs of any size nor on recorded ones, in any dtype."""
    recorded, port = llama
    request = replace(port.request, dtype=dtype)
    computed = load_fms_candidate(request, fms_path=CHECKOUT)
    probed = probe_modules(computed, recorded, dtype=dtype)
    assert probed is not None
    assert probed.wrong == isolate_modules(computed, recorded, dtype=dtype).wrong == ()


@pytest.mark.parametrize("norm", ["layers.0.ln", "layers.1.ff_ln", "dec_norm"])
def test_an_epsilon_shows_by_itself(
    llama: tuple[Golden, FmsCandidate], norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recorded input is small enough to show it."""
    names = {"layers.0.ln": "layers.0.input_layernorm", "dec_norm": "norm"}
    names["layers.1.ff_ln"] = "layers.1.post_attention_layernorm"
    module = llama[1].model.base_model.get_submodule(norm)
    monkeypatch.setattr(module, "eps", 1.1e-6)
    assert wrong(llama) == {f"model.{names[norm]}"}


def test_what_is_wrong_by_itself_is_named_before_what_shows_later(snap: Snap) -> None:
    """On the recorded inputs, the error of this norm is beyond a limit only after attention."""
    port = "tests.candidates:with_another_epsilon"
    run = snap("check", "--candidate", port, "--tolerance", "oracle", "--json", "-")
    assert run.code == 1
    first = run.report["first_divergence"]
    named = first["module"], first["place"], run.report["localisation"]["culprit"]
    assert named == ("model.text_model.layers.2.input_layernorm",) * 3
    assert not first["guess"]


def test_a_bias_the_tail_of_an_activation_and_an_unused_row_show_by_themselves(
    llama: tuple[Golden, FmsCandidate],
) -> None:
    """A bias of 9e-6, a clamp at 30, and an embedding that no prompt has."""
    model = llama[1].model.base_model
    hooks = [
        model.layers[0].attn.dense.register_forward_hook(lambda _m, _g, answer: answer + 9e-6),
        model.layers[1].ff_sub_layer.a.register_forward_hook(lambda _m, _g, a: a.clamp(max=30)),
    ]
    try:
        assert wrong(llama) == {"model.layers.0.self_attn.o_proj", "model.layers.1.mlp.act_fn"}
    finally:
        for hook in hooks:
            hook.remove()
    assert wrong(llama) == set()
    with changed(llama[1], [Change("base_model.embedding.weight", "row 0 doubled")]):
        assert wrong(llama) == {"model.embed_tokens"}


def test_a_module_that_takes_or_returns_something_else_is_not_tried(
    llama: tuple[Golden, FmsCandidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is listed by name, and no other module is wrong."""
    recorded, port = llama
    layer = port.model.base_model.layers[0]

    def take_nothing() -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(layer.ln, "forward", take_nothing)
    monkeypatch.setattr(layer.attn.dense, "forward", lambda given: given[..., :3])
    found = probe_modules(port, recorded, dtype="float32")
    assert found is not None
    assert found.wrong == ()
    assert found.not_tried == (
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.o_proj",
    )


def test_the_input_of_a_probe_is_the_same_everywhere() -> None:
    """It is made from a seed, since no file holds it."""
    one, other = (probe_input((1, 4, 8), 1e-4, seed=3) for _ in range(2))
    assert torch.equal(one, other)
    assert 1e-5 < one.std() < 1e-3
    assert probe_input((1, 5), 0, seed=3).tolist() == [[0, 1, 2, 3, 4]]


def test_isolation_names_each_fault_of_several_and_a_modules_own_code(
    llama: tuple[Golden, FmsCandidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight, an epsilon and the scale of attention, which is no module's but its own."""
    model = llama[1].model.base_model
    fault = Change("base_model.layers.0.ff_sub_layer.w2.weight", "times 1.001")
    monkeypatch.setattr(model.layers[1].attn, "scale_factor", 0.26)
    monkeypatch.setattr(model.layers[0].ln, "eps", 1e-3)
    with changed(llama[1], [fault]):
        assert wrong(llama, isolated=True) == {
            "model.layers.0.input_layernorm",
            "model.layers.0.mlp.down_proj",
            "model.layers.1.self_attn",
        }
    assert wrong(llama) == {"model.layers.0.input_layernorm"}


def test_a_set_without_probes_is_checked_as_before(candidate: FmsCandidate) -> None:
    """Nothing is tried, and a case for isolation is missing."""
    golden = open_golden(set_folder(ROOT / "tests" / "compact-goldens"))
    assert golden.probes() == []
    assert probe_modules(candidate, golden, dtype="float32") is None
    with pytest.raises(GoldenNotFound) as refused:
        isolate_modules(candidate, golden, dtype="float32")
    assert "--modules" in refused.value.remedy


def test_a_fault_of_the_adapter_shows_in_the_weights(
    llama: tuple[Golden, FmsCandidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the loaded weight and in the adapted one: the checkpoint's own shows it."""
    from fms.utils import serialization

    adapt = serialization.get_adapted

    @functools.wraps(adapt)  # snap calls it by its signature, which releases of FMS change
    def spoiled(*given: Any, **options: Any) -> Any:
        adapted = dict(adapt(*given, **options))
        for name, weight in adapted.items():
            if name.endswith("embedding.weight"):
                adapted[name] = weight.clone()
                adapted[name][0] *= 2
        return adapted

    monkeypatch.setattr(serialization, "get_adapted", spoiled)
    with changed(llama[1], [Change("base_model.embedding.weight", "row 0 doubled")]):
        found = compare_weights(llama[1].weights())
    assert [weight.name for weight in found.differing] == ["base_model.embedding.weight"]
