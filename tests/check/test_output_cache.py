"""The encoder runs once for each tile of a case, and nothing else is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from snapshot_tool.base.protocol import Phase, Progress
from snapshot_tool.base.results import Verdict
from snapshot_tool.candidates import output_cache
from snapshot_tool.candidates.output_cache import OutputCache
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import open_session
from snapshot_tool.goldens.golden import open_golden
from tests.candidates import CHECKOUT
from tests.conftest import GOLDENS, set_folder

TILES = torch.rand(5, 3, 8, 8)


@contextmanager
def counted(**modules: Any) -> Iterator[Counter[str]]:
    """Count the runs of modules that see more than one token."""
    runs: Counter[str] = Counter()

    def count_as(name: str) -> Any:
        def count(_module: Any, given: tuple[torch.Tensor, ...], _options: Any) -> None:
            runs[name] += given[0].shape[1] > 1

        return count

    handles = [
        module.register_forward_pre_hook(count_as(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def checked(*, quick: bool = False, repeat: int = 1, case: str = "two-images") -> Counter[str]:
    """Check the checkout, see it pass, and return how often encoder and decoder worked."""
    golden = open_golden(set_folder(GOLDENS))
    request = CheckRequest(GOLDENS, fms_path=CHECKOUT, case=case, quick=quick, repeat=repeat)
    checker = open_session(request, golden, Progress())
    model: Any = checker.candidate.modules()
    # Inside of the encoder, whose own forward is replaced.
    with counted(
        encoder=model.vision_tower.base_model.post_layernorm,
        decoder=model.text_model.base_model.dec_norm,
    ) as runs:
        results = [r for phase in Phase for r in checker.run(golden.case(case), phase)]
    assert len(results) > 5
    assert {result.verdict for result in results} == {Verdict.PASS}
    return runs


def test_all_phases_of_a_case_take_one_pass_of_the_encoder() -> None:
    """Forward runs without a key-value cache, generate with one: the decoder runs in both."""
    assert checked() == {"encoder": 1, "decoder": 2}


def test_quick_verifies_forward_and_generate_in_one_pass() -> None:
    """The pass over prompt and golden tokens is forward's as well."""
    assert checked(quick=True) == {"encoder": 1, "decoder": 1}


def test_what_is_repeated_is_computed_each_time() -> None:
    """--repeat looks for outputs that differ between runs: none comes from the cache."""
    assert checked(repeat=2) == {"encoder": 6, "decoder": 4}


def test_an_overwritten_input_changes_no_later_phase() -> None:
    """The next phase gets what was recorded, also if the input was reshaped in place."""
    golden = open_golden(set_folder(GOLDENS))
    request = CheckRequest(GOLDENS, candidate="tests.candidates:SpoilsItsInputs")
    session = open_session(request, golden, Progress())
    for phase in (Phase.VISION, Phase.FORWARD, Phase.VISION):
        results = session.run(golden.case("one-image"), phase)
        assert {result.verdict for result in results} == {Verdict.PASS}
    assert "vision overwrote its input pixel_values" in session.candidate.warnings


class Encoder(torch.nn.Module):
    """Returns (features, None), and remembers how many tiles it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.batches: list[int] = []

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.batches.append(len(tiles))
        return self.linear(tiles).flatten(1), None


def test_the_cache_returns_copies_and_only_for_equal_bits() -> None:
    """What a caller writes into an output, or another input, changes no later output."""
    encoder = Encoder()
    expected = encoder(TILES)[0]
    cache = OutputCache(encoder)
    with torch.inference_mode(), cache.for_case("a case"):
        encoder(TILES)[0].zero_()
        encoder(TILES.clone())[0].zero_()
        assert torch.equal(encoder(TILES)[0], expected)
        nearly = TILES.clone()
        nearly[-1, -1, -1, -1] += 1e-6
        assert not torch.equal(encoder(nearly)[0], expected)
        transposed = TILES.transpose(1, 2).contiguous().transpose(1, 2)
        encoder(transposed)
    assert encoder.batches == [5, 5, 5, 5]
    encoder(TILES)
    assert encoder.batches[4:] == [5]


def test_large_tiles_go_through_the_encoder_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles' worth at once, known tiles not again; unless tiles know their neighbours."""
    monkeypatch.setattr(output_cache, "_CHUNK", 2 * TILES[0].numel())
    apart, whole = Encoder(), Encoder()
    expected = apart(TILES)[0]
    with OutputCache(apart, tiles_apart=True).for_case("a case"):
        assert torch.equal(apart(TILES)[0], expected)
        apart(TILES[2:])
    with OutputCache(whole).for_case("a case"):
        whole(TILES)
    assert apart.batches == [5, 2, 2, 1]
    assert whole.batches == [5]


class Laid(Encoder):
    """Answers (tiles, 4, 2, 3) with its dimensions in memory in another order."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, None]:
        answer = super().forward(tiles)[0][:, :24].reshape(len(tiles), 4, 2, 3)
        inverse = [self.order.index(d) for d in range(4)]
        return answer.permute(self.order).contiguous().permute(inverse), None


@pytest.mark.parametrize(
    ("order", "at_once"),
    [
        (order, at_once)
        for order in ((0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1))
        for at_once in (1, 2, 9)
    ]
    + [((1, 2, 0, 3), 2), ((3, 2, 1, 0), 9)],
)
def test_cached_outputs_have_the_memory_layout_of_the_encoders(
    order: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that views a transposed output as a contiguous one raises, cached or not."""
    monkeypatch.setattr(output_cache, "_CHUNK", at_once * TILES[0].numel())
    encoder = Laid(order)
    with torch.inference_mode():
        expected = encoder(TILES)[0]
        with OutputCache(encoder, tiles_apart=True).for_case("a case"):
            first, second = encoder(TILES)[0], encoder(TILES)[0]
    for served in (first, second):
        assert torch.equal(served, expected)
        assert served.stride() == expected.stride()
    assert first.data_ptr() != second.data_ptr()


class Scaled(Encoder):
    """Returns a number beside its features."""

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(tiles)[0], torch.tensor(2.0)


@pytest.mark.parametrize(("at_once", "batches"), [(1, [1, 1, 1, 1, 1, 5]), (5, [5])])
def test_an_output_with_a_number_in_it_is_computed_for_all_tiles(
    at_once: int, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers cannot be joined; the output for all tiles is cached."""
    monkeypatch.setattr(output_cache, "_CHUNK", at_once * TILES[0].numel())
    encoder = Scaled()
    with torch.inference_mode():
        expected = encoder(TILES)[0]
        encoder.batches.clear()
        with OutputCache(encoder, tiles_apart=True).for_case("a case"):
            for _ in range(2):
                features, scale = encoder(TILES)
                assert torch.equal(features, expected)
                assert scale == 2.0
    assert encoder.batches == batches


def test_joined_outputs_keep_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that switches gradients on gets a warning, as without the cache."""
    monkeypatch.setattr(output_cache, "_CHUNK", TILES[0].numel())
    encoder = Encoder()
    with torch.enable_grad(), OutputCache(encoder, tiles_apart=True).for_case("a case"):
        assert encoder(TILES)[0].requires_grad
    assert encoder.batches == [1] * 5


class Named(Encoder):
    """Returns its features by name."""

    def forward(self, tiles: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"features": super().forward(tiles)[0]}


def test_outputs_that_cannot_be_joined_are_computed_for_all_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An encoder that returns a mapping runs on the whole batch."""
    monkeypatch.setattr(output_cache, "_CHUNK", TILES[0].numel())
    encoder = Named()
    expected = encoder(TILES)["features"]
    with OutputCache(encoder, tiles_apart=True).for_case("a case"):
        assert torch.equal(encoder(TILES)["features"], expected)


def test_another_case_finds_the_cache_empty() -> None:
    """What one case computed is forgotten when the next one is run."""
    encoder = Encoder()
    cache = OutputCache(encoder)
    runs = []
    for case in ("first", "first", "second", "first"):
        with torch.inference_mode(), cache.for_case(case):
            encoder(TILES)
        runs.append(len(encoder.batches))
    assert runs == [1, 1, 2, 3]


def test_a_default_that_is_passed_is_the_same_call() -> None:
    """One phase passes no mask, another one None: the encoder cannot tell them apart."""

    class Masked(Encoder):
        def forward(
            self, tiles: torch.Tensor, mask: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, None]:
            return super().forward(tiles if mask is None else tiles * mask)

    encoder = Masked()
    with torch.inference_mode(), OutputCache(encoder).for_case("a case"):
        encoder(TILES)
        encoder(TILES, None)
        encoder(TILES, mask=None)
        encoder(TILES, mask=torch.ones(1))
    assert encoder.batches == [5, 5]


def test_an_encoder_that_is_called_by_keyword_is_cached() -> None:
    """Mistral 3's forward names the pixels that it gives its encoder."""
    encoder = torch.nn.Conv2d(3, 4, 2)
    with torch.inference_mode(), OutputCache(encoder).for_case("a case"):
        assert torch.equal(encoder(input=TILES), encoder(TILES))


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_encoder_computes(*, whole: bool) -> None:
    """Nothing of the cache is traced, whether the encoder or what holds it is compiled."""
    encoder = torch.nn.Conv2d(3, 4, 2)
    model = torch.nn.Sequential(encoder, torch.nn.ReLU())
    expected = model(TILES).detach()
    compiled = model if whole else encoder
    compiled.compile(backend="aot_eager")
    cache = OutputCache(encoder)
    for case in ("first", "second"):
        with torch.inference_mode(), cache.for_case(case):
            assert torch.equal(model(TILES), expected)
            assert torch.equal(model(TILES), expected)
    assert torch.equal(model(TILES), expected)


class Masked(Encoder):
    """Takes a mask of each tile, as FMS's SigLIP takes patch masks."""

    def forward(  # type: ignore[override]
        self, tiles: torch.Tensor, patch_attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return super().forward(tiles)[0] * patch_attention_mask[:, None], None


def test_a_mask_is_split_with_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are encoded a few at a time; those under another mask are encoded again."""
    monkeypatch.setattr(output_cache, "_CHUNK", TILES[0].numel())
    encoder, mask = Masked(), torch.ones(len(TILES))
    other = mask.clone()
    other[0] = 0
    with torch.inference_mode():
        expected = [encoder(TILES, patch_attention_mask=m)[0] for m in (mask, other)]
        encoder.batches.clear()
        with OutputCache(encoder, tiles_apart=True).for_case("a case"):
            for given, answer in zip((mask, other, mask), [*expected, expected[0]], strict=True):
                assert torch.equal(encoder(TILES, patch_attention_mask=given)[0], answer)
    assert encoder.batches == [1] * (len(TILES) + 1)
