"""Naming the module of a fault from sketches alone, in small models of plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from snapshot_tool.base.localisation import ERROR_LIMIT, NO_NOISE, Localisation, noise_limit
from snapshot_tool.base.protocol import Side
from snapshot_tool.diagnose.localise import localise
from snapshot_tool.reports.text import localisation_lines
from snapshot_tool.taps.sketches import Tap, TapRecorder, shapes_of, sketch

_Pair = tuple[torch.Tensor, torch.Tensor]

X, A, B, C, OUT = (torch.full((1, 6), float(value)) for value in range(1, 6))
WRONG = torch.full((1, 6), 9.0)
BAD = (WRONG, WRONG)

# A block of three modules, between what comes before and after it, in the order they finish.
GOLDEN: Mapping[str, _Pair] = {
    "model.embed": (X, X + 0.5),
    "model.block.a": (X, A),
    "model.block.b": (A, B),
    "model.block.c": (B, C),
    "model.block": (X, C),
    "head": (C, OUT),
}
ALL_BAD = dict.fromkeys(("model.block.a", "model.block.b", "model.block.c", "model.block"), BAD)


def taps(pairs: Mapping[str, _Pair]) -> list[Tap]:
    """Sketch inputs and outputs."""
    return [
        Tap(name, sketch(given, seed=1), sketch(returned, seed=1))
        for name, (given, returned) in pairs.items()
    ]


def find(
    changes: Mapping[str, _Pair],
    *,
    golden: Mapping[str, _Pair] = GOLDEN,
    without: Sequence[str] = (),
    unfinished: Sequence[str] | None = None,
    failed: bool = False,
) -> Localisation:
    """Localise in a candidate whose modules are the golden's, but for some of them."""
    pairs = {**golden, **changes}
    candidate = {tap.module: tap for tap in taps(pairs) if tap.module not in without}
    names = {name: f"fms.{name}" for name in golden}
    return localise("case", taps(golden), candidate, names, unfinished=unfinished, failed=failed)


@pytest.mark.parametrize(
    ("changes", "module"),
    [
        # The parent differs as well, and the child is the inner one.
        ({"block.b": (A, WRONG), "block.c": BAD, "block": (X, WRONG)}, "model.block.b"),
        # The norm a recovers from a wrong input. What comes after it is not the first wrong one.
        ({**ALL_BAD, "block.a": (WRONG, A), "block.b": (A, WRONG)}, "model"),
        # The reference is given token ids, the candidate embeddings.
        ({"block": (X[..., None], WRONG)}, "model.block"),
        ({}, ""),
    ],
    ids=["inner", "recovers", "rank", "equal"],
)
def test_the_module_with_a_right_input_and_a_wrong_output_is_named(
    changes: Mapping[str, _Pair], module: str
) -> None:
    """Whatever comes after it is wrong, too."""
    named = {f"model.{name.removeprefix('model.')}": pair for name, pair in changes.items()}
    found = find({**named, "head": BAD} if changes else {})
    assert found.module == module
    assert (found.skipped, found.raised) == (False, False)
    assert found.between == (module == "model")


@pytest.mark.parametrize(
    ("changes", "without", "neighbours"),
    [
        ({"model.block.b": BAD, "model.block.c": BAD}, (), ("model.block.a", "model.block.b")),
        ({}, (), ("model.block.c", "")),
        # A function may do the work of b, which is then not called skipped.
        ({"model.block.c": BAD}, ("model.block.b",), ("model.block.a", "model.block.b")),
    ],
    ids=["between a and b", "after c", "in place of b"],
)
def test_own_code_is_named_with_the_modules_around_it(
    changes: Mapping[str, _Pair], without: Sequence[str], neighbours: tuple[str, str]
) -> None:
    """Every module is right by its input, and the block is not."""
    found = find({**changes, "model.block": (X, WRONG), "head": BAD}, without=without)
    assert (found.module, found.own_code, found.skipped) == ("model.block", True, False)
    assert found.neighbours == neighbours


@pytest.mark.parametrize(
    ("skipped", "changes"),
    [("a", {"b": (X, WRONG), "c": BAD}), ("b", {"c": (A, WRONG)}), ("c", {})],
)
def test_a_module_that_is_skipped_is_named(skipped: str, changes: Mapping[str, _Pair]) -> None:
    """The next module is given its input: it was not run."""
    name = f"model.block.{skipped}"
    after = {f"model.block.{child}": pair for child, pair in changes.items()}
    block = (X, WRONG if after else GOLDEN[name][0])
    found = find({**after, "model.block": block, "head": BAD}, without=(name,))
    assert (found.module, found.skipped, found.own_code) == (name, True, False)


def test_between_modules_the_closest_one_around_both_is_named() -> None:
    """The embedding is right, the block is given an error, and `model` itself is not compared."""
    found = find({**ALL_BAD, "head": BAD})
    assert (found.first_bad, found.between, found.module) == (None, True, "model")
    assert found.neighbours == ("model.embed", "model.block")


def test_a_module_that_runs_before_its_parent_is_named() -> None:
    """Token embeddings are named under the text model and feed it."""
    golden = {"text.embed": (X, A), "text.layer": (A, B), "text": (A, B)}
    changes = {"text.embed": (X, WRONG), "text.layer": BAD, "text": BAD}
    assert find(changes, golden=golden).module == "text.embed"


@pytest.mark.parametrize(
    ("changes", "without", "unfinished", "module", "raised"),
    [
        ({}, ("c", "block", "head"), ("block", "c"), "model.block.c", True),
        ({}, ("head",), (), "", True),
        ({"b": (A, WRONG)}, ("c", "block", "head"), ("block", "c"), "model.block.b", False),
    ],
    ids=["in c", "between modules", "after a fault"],
)
def test_the_module_that_raised_is_named_unless_a_fault_came_before(
    changes: Mapping[str, _Pair],
    without: Sequence[str],
    unfinished: Sequence[str],
    module: str,
    *,
    raised: bool,
) -> None:
    """The innermost one that was entered and not left; or none, if it raised between modules."""
    full = {"b": "model.block.b", "c": "model.block.c", "block": "model.block", "head": "head"}
    found = find(
        {full[name]: pair for name, pair in changes.items()},
        without=[full[name] for name in without],
        unfinished=[full[name] for name in unfinished],
    )
    assert (found.first_bad or "", found.raised, found.between) == (module, raised, not module)
    if found.between:
        assert found.neighbours == ("model.block", "head")


def test_a_module_is_named_also_if_a_residual_hides_its_error() -> None:
    """The first layer's residual covers what its norm gets wrong; the second one's does not."""
    residual = X * 1e4
    golden = {
        "layers.0.norm": (X, A),
        "layers.0": (X, residual),
        "layers.1.norm": (residual, A),
        "layers.1.mlp": (A, B),
        "layers.1": (residual, B),
    }
    second = {
        "layers.1.norm": (residual, WRONG),
        "layers.1.mlp": BAD,
        "layers.1": (residual, WRONG),
    }
    both = {"layers.0.norm": (X, A * 1.001), **second}
    assert find(second, golden=golden).module == "layers.1.norm"
    assert find(both, golden=golden).module == "layers.0.norm"


def test_own_code_is_named_also_if_a_residual_hides_its_error() -> None:
    """The MLP scales what it gives its second child, and a large residual is added to it."""
    residual = X * 1e4
    golden = {
        "layer.mlp.up": (X, A),
        "layer.mlp.down": (A, B),
        "layer.mlp": (X, B),
        "layer": (X, residual),
        "head": (residual, OUT),
    }
    changes = {
        "layer.mlp.down": (A * 1.001, B * 1.001),
        "layer.mlp": (X, B * 1.001),
        "head": (residual, OUT * 1.001),
    }
    found = find(changes, golden=golden)
    assert (found.module, found.own_code) == ("layer.mlp", True)
    assert found.neighbours == ("layer.mlp.up", "layer.mlp.down")


def test_a_module_that_is_laid_out_otherwise_is_passed_over() -> None:
    """It returns something else, and the module that takes it is given what the golden's is."""
    found = find({"model.block.a": (X, WRONG), "model.block": (X, WRONG), "head": BAD})
    assert found.module == "model.block.a"
    found = find({"model.block.a": (X, WRONG), "head": (C, WRONG)})
    assert found.module == "head"


def test_a_module_is_guessed_if_none_is_beyond_its_limit() -> None:
    """Where the error rises most, and only if an output fails; it is called a guess."""
    slight = {
        "model.block.b": (A * (1 + 1e-6), B * (1 + 2e-5)),
        "model.block.c": (B * (1 + 2e-5), C * (1 + 2e-5)),
        "model.block": (X, C * (1 + 2e-5)),
        "head": (C * (1 + 2e-5), OUT * (1 + 2e-5)),
    }
    found = find(slight, failed=True)
    assert (found.module, found.guess) == ("model.block.b", True)
    assert "a guess" in " ".join(localisation_lines(found))
    assert find(slight).module == find({}, failed=True).module == ""


def test_a_step_is_told_from_a_spike() -> None:
    """An error that reaches nothing is no fault of the model."""
    step = find({"model.block": (X, WRONG), "head": BAD})
    spike = find({"model.block": (X, WRONG)})
    assert (step.recovers, spike.recovers) == (False, True)
    assert "curve: a step that remains: a fault" in localisation_lines(step)
    assert any("a spike that" in line for line in localisation_lines(spike))


def record(recorder: TapRecorder, module: str, *tensors: torch.Tensor) -> None:
    """Record outputs of a module."""
    for tensor in tensors:
        recorder(module, Side.OUTPUT, tensor)


def test_ids_are_sketched_and_masks_are_not() -> None:
    """Position ids decide what an embedding returns; every implementation has its own masks."""
    recorder = TapRecorder(1, torch.ones(1, 3))
    for module, tensor in (("ids", torch.arange(3)[None]), ("mask", torch.ones(1, 3).bool())):
        recorder(module, Side.INPUT, tensor)
        record(recorder, module, torch.ones(1, 3, 2))
    found = recorder.by_module()
    assert found["ids"].input is not None
    assert found["mask"].input is None


def test_a_batch_in_parts_and_one_row_for_a_batch_are_compared_as_the_batch() -> None:
    """A candidate may run its tiles a few at a time, and one row of positions for all of them."""
    tiles, positions, mask = torch.rand(5, 3, 2), torch.rand(1, 3, 2), torch.ones(1, 9)
    whole = TapRecorder(1, mask)
    record(whole, "block", tiles)
    record(whole, "positions", positions.expand(5, 3, 2))
    for calls in (1, 3):
        parts = TapRecorder(1, mask, shapes_of(whole.taps()))
        record(parts, "positions", *[positions] * calls)
        record(parts, "block", tiles[:2], tiles[2:4], tiles[4:])
        found = localise("case", whole.taps(), parts.by_module(), {})
        assert [module.output_error for module in found.modules] == [0, 0]


def test_modules_that_were_entered_and_not_left_are_unfinished() -> None:
    """In the order in which they were entered."""
    recorder = TapRecorder(1, torch.ones(1, 3))
    for module in ("block", "block.a", "block.b"):
        recorder(module, Side.INPUT, torch.ones(1, 3))
    record(recorder, "block.a", torch.ones(1, 3))
    assert recorder.unfinished() == ["block", "block.b"]


def test_a_limit_is_a_multiple_of_the_noise_with_a_floor() -> None:
    """Without a sketch the limit is the one for sets without an oracle."""
    eps = torch.finfo(torch.float32).eps
    assert noise_limit(1e-6, eps=eps) == pytest.approx(8e-6)
    assert noise_limit(0.0, eps=eps) == pytest.approx(2 * eps)
    assert noise_limit(NO_NOISE, eps=eps) == ERROR_LIMIT


def scaled_tap(module: str, scale: float) -> Tap:
    """Return a tap whose output is off by a factor."""
    values = torch.randn(8, 32, generator=torch.Generator().manual_seed(len(module)))
    return Tap(module, sketch(values, seed=1), sketch(values * scale, seed=1))


def test_an_error_below_the_common_limit_is_named_by_the_modules_own() -> None:
    """And an error that rounding explains is not."""
    golden = [scaled_tap("first", 1.0), scaled_tap("second", 1.0)]
    candidate = {"first": scaled_tap("first", 1 + 1e-6), "second": scaled_tap("second", 1 + 1e-5)}
    names = {name: name for name in candidate}
    assert localise("case", golden, candidate, names).first_bad is None
    limits = dict.fromkeys(candidate, (4e-6, 4e-6))
    found = localise("case", golden, candidate, names, limits=limits)
    assert found.first_bad == "second"
