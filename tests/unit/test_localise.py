"""Naming the place of a fault from sketches alone: small models whose modules are plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from snapshot_tool.base.localisation import Localisation
from snapshot_tool.base.sketch import sketch
from snapshot_tool.base.tap import Side, Sketchbook, Tap, shapes_of
from snapshot_tool.diagnose.localise import localise

_Pair = tuple[torch.Tensor, torch.Tensor]

X, A, B, C, OUT = (torch.full((1, 6), float(value)) for value in range(1, 6))
WRONG = torch.full((1, 6), 9.0)

# A block of three modules, between what comes before and after it, in the order they finish.
GOLDEN: Mapping[str, _Pair] = {
    "model.embed": (X, X + 0.5),
    "model.block.a": (X, A),
    "model.block.b": (A, B),
    "model.block.c": (B, C),
    "model.block": (X, C),
    "head": (C, OUT),
}


def taps(pairs: Mapping[str, _Pair]) -> list[Tap]:
    """Sketch inputs and outputs."""
    return [
        Tap(name, sketch(given, seed=1), sketch(returned, seed=1))
        for name, (given, returned) in pairs.items()
    ]


def find(
    changes: Mapping[str, _Pair], *, without: tuple[str, ...] = (), **options: Any
) -> Localisation:
    """Localise in a candidate whose modules are the golden's, but for some of them."""
    pairs = {**GOLDEN, **changes}
    candidate = {tap.module: tap for tap in taps(pairs) if tap.module not in without}
    names = {name: f"fms.{name}" for name in GOLDEN}
    return localise("case", taps(GOLDEN), candidate, names, **options)


def test_the_module_with_a_right_input_and_a_wrong_output_is_named() -> None:
    """The parent differs as well: the child is the inner one."""
    found = find(
        {
            "model.block.b": (A, WRONG),
            "model.block.c": (WRONG, WRONG),
            "model.block": (X, WRONG),
            "head": (WRONG, WRONG),
        }
    )
    assert found.module == "model.block.b"
    assert not found.own_code
    assert not found.skipped


def test_own_code_is_named_with_the_modules_around_it() -> None:
    """Between a and b nothing but the block's own code runs, and b is given an error."""
    found = find(
        {
            "model.block.b": (WRONG, WRONG),
            "model.block.c": (WRONG, WRONG),
            "model.block": (X, WRONG),
            "head": (WRONG, WRONG),
        }
    )
    assert (found.module, found.own_code) == ("model.block", True)
    assert found.neighbours == ("model.block.a", "model.block.b")


def test_own_code_after_the_last_module_has_no_module_after_it() -> None:
    """All three modules are right, and the block is not."""
    found = find({"model.block": (X, WRONG), "head": (WRONG, WRONG)})
    assert (found.module, found.own_code) == ("model.block", True)
    assert found.neighbours == ("model.block.c", "")


@pytest.mark.parametrize(
    ("skipped", "changes"),
    [
        ("a", {"b": (X, WRONG), "c": (WRONG, WRONG)}),
        ("b", {"c": (A, WRONG)}),
        ("c", {}),
    ],
)
def test_a_module_that_is_passed_over_is_named(skipped: str, changes: Mapping[str, _Pair]) -> None:
    """What follows is given what the module should have been given: it was not run."""
    name = f"model.block.{skipped}"
    given = GOLDEN[name][0]
    after = {f"model.block.{child}": pair for child, pair in changes.items()}
    whole = {"model.block": (X, WRONG if after else given), "head": (WRONG, WRONG)}
    found = find({**after, **whole}, without=(name,))
    assert (found.module, found.skipped, found.own_code) == (name, True, False)


def test_a_module_whose_work_is_done_elsewhere_is_not_called_skipped() -> None:
    """A function may do the work of b: when that goes wrong, the block's own code is named."""
    found = find(
        {"model.block.c": (WRONG, WRONG), "model.block": (X, WRONG), "head": (WRONG, WRONG)},
        without=("model.block.b",),
    )
    assert (found.module, found.skipped, found.own_code) == ("model.block", False, True)
    assert found.neighbours == ("model.block.a", "model.block.b")


def test_between_modules_the_closest_one_around_both_is_named() -> None:
    """The embedding is right, the block is given an error, and `model` itself is not compared."""
    found = find(
        {
            "model.block.a": (WRONG, WRONG),
            "model.block.b": (WRONG, WRONG),
            "model.block.c": (WRONG, WRONG),
            "model.block": (WRONG, WRONG),
            "head": (WRONG, WRONG),
        }
    )
    assert found.first_bad is None
    assert found.between
    assert found.neighbours == ("model.embed", "model.block")
    assert found.module == "model"


def test_a_module_that_recovers_from_a_wrong_input_hides_nothing() -> None:
    """A norm forgives a scaled input; what comes after it is not the first wrong one."""
    found = find(
        {
            "model.block.a": (WRONG, A),
            "model.block.b": (A, WRONG),
            "model.block.c": (WRONG, WRONG),
            "model.block": (WRONG, WRONG),
            "head": (WRONG, WRONG),
        }
    )
    assert (found.module, found.between) == ("model", True)


def test_a_module_that_runs_before_its_parent_is_named() -> None:
    """Token embeddings are named under the text model and feed what it is given."""
    golden = {"text.embed": (X, A), "text.layer": (A, B), "text": (A, B)}
    wrong = {"text.embed": (X, WRONG), "text.layer": (WRONG, WRONG), "text": (WRONG, WRONG)}
    candidate = {tap.module: tap for tap in taps(wrong)}
    assert localise("case", taps(golden), candidate, {}).module == "text.embed"


def test_nothing_is_named_where_all_agree() -> None:
    """No module, no own code, nothing between."""
    found = find({})
    assert (found.module, found.first_bad, found.between) == ("", None, False)


def test_the_innermost_running_module_is_named_when_the_candidate_raises() -> None:
    """What ran before is right; c was entered and never left."""
    left_out = ("model.block.c", "model.block", "head")
    found = find({}, without=left_out, unfinished=["model.block", "model.block.c"])
    assert (found.module, found.raised) == ("model.block.c", True)


def test_the_model_around_is_named_when_it_raises_between_modules() -> None:
    """The block was finished, the head was not entered."""
    found = find({}, without=("head",), unfinished=[])
    assert (found.first_bad, found.between, found.raised) == (None, True, True)
    assert found.neighbours == ("model.block", "head")


def test_a_fault_before_the_error_is_named_rather_than_what_raised() -> None:
    """Module b is wrong, and what it returns lets c raise."""
    left_out = ("model.block.c", "model.block", "head")
    found = find(
        {"model.block.b": (A, WRONG)}, without=left_out, unfinished=["model.block", "model.block.c"]
    )
    assert (found.module, found.raised) == ("model.block.b", False)


def test_an_input_of_another_rank_says_nothing() -> None:
    """Hugging Face is given token ids where the candidate is given embeddings."""
    found = find({"model.block": (X[..., None], WRONG), "head": (WRONG, WRONG)})
    assert found.module == "model.block"


def test_ids_are_sketched_and_masks_are_not() -> None:
    """Position ids decide what an embedding returns; a mask is laid out as each side likes."""
    book = Sketchbook(1, torch.ones(1, 3))
    for module, tensor in (("ids", torch.arange(3)[None]), ("mask", torch.ones(1, 3).bool())):
        book(module, Side.INPUT, tensor)
        book(module, Side.OUTPUT, torch.ones(1, 3, 2))
    found = book.by_module()
    assert found["ids"].input is not None
    assert found["mask"].input is None


def test_one_row_for_a_whole_batch_is_sketched_as_the_batch() -> None:
    """Position embeddings of one tile stand for all: they are compared all the same."""
    rows = torch.arange(6.0).reshape(1, 3, 2)
    mask = torch.ones(1, 9)
    whole = Sketchbook(1, mask)
    whole("positions", Side.OUTPUT, rows.expand(4, 3, 2))
    single = Sketchbook(1, mask, shapes_of(whole.taps()))
    single("positions", Side.OUTPUT, rows)
    assert localise("case", whole.taps(), single.by_module(), {}).modules[0].output_error == 0


def test_a_batch_that_comes_in_parts_is_put_together() -> None:
    """A candidate may run its tiles a few at a time, and one row of positions with each."""
    tiles, positions, mask = torch.rand(5, 3, 2), torch.rand(1, 3, 2), torch.ones(1, 9)
    whole = Sketchbook(1, mask)
    whole("block", Side.OUTPUT, tiles)
    whole("positions", Side.OUTPUT, positions.expand(5, 3, 2))
    parts = Sketchbook(1, mask, shapes_of(whole.taps()))
    for part in (tiles[:2], tiles[2:4], tiles[4:]):
        parts("positions", Side.OUTPUT, positions)
        parts("block", Side.OUTPUT, part)
    found = localise("case", whole.taps(), parts.by_module(), {})
    assert [module.output_error for module in found.modules] == [0, 0]


def test_modules_that_were_entered_and_not_left_are_unfinished() -> None:
    """In the order in which they were entered."""
    book = Sketchbook(1, torch.ones(1, 3))
    for module in ("block", "block.a", "block.b"):
        book(module, Side.INPUT, torch.ones(1, 3))
    book("block.a", Side.OUTPUT, torch.ones(1, 3))
    assert book.unfinished() == ["block", "block.b"]


def test_the_same_module_of_an_earlier_layer_is_named_if_it_errs_already() -> None:
    """The first layer's residual covers what its norm gets wrong; the second one's does not."""
    residual = X * 1e4
    golden = {
        "layers.0.norm": (X, A),
        "layers.0": (X, residual),
        "layers.1.norm": (residual, A),
        "layers.1.mlp": (A, B),
        "layers.1": (residual, B),
    }
    changes = {
        "layers.0.norm": (X, A * 1.001),
        "layers.1.norm": (residual, WRONG),
        "layers.1.mlp": (WRONG, WRONG),
        "layers.1": (residual, WRONG),
    }

    def found(changes: Mapping[str, _Pair]) -> str:
        pairs = {**golden, **changes}
        return localise("case", taps(golden), {t.module: t for t in taps(pairs)}, {}).module

    assert found(changes) == "layers.0.norm"
    del changes["layers.0.norm"]
    assert found(changes) == "layers.1.norm"
