"""Benign changes: other ways to compute the same, which must raise no alarm."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from snapshot_tool.base.protocol import Progress
from snapshot_tool.base.report import CheckReport
from snapshot_tool.base.results import Verdict
from snapshot_tool.candidates.fms import candidate as fms
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.session import check
from snapshot_tool.families import family_of_config
from snapshot_tool.families.family import Family
from tests.mutants.candidates import SPEC, Planted, plant_candidate
from tests.mutants.measure import Setup, fails_by_oracle, rules_that_fail

Attention = Literal["default", "math", "flash", "eager"]
Weights = Literal["fused", "unfused on loading", "unfused in memory"]
Layout = Literal["contiguous", "channels last", "strided"]
_THREADS = (1, 2, 4)
QUESTIONS = 9  # derived ones, one of each kind
_TILES = (0, 1, 4)


@dataclass(frozen=True, slots=True)
class Benign:
    """One way to run the unchanged port.

    Args:
        seed: of the derived questions.
        threads: torch's.
        attention: how scaled dot-product attention is computed; eager is written out below.
        weights: whether query, key and value, and gate and up, are fused.
        tiles: how many go through the vision encoder at once; 0 for all.
        layout: memory layout of the inputs of vision and connector.
        compiled: whether torch.compile compiles encoder and text model.
    """

    seed: int
    threads: int = 1
    attention: Attention = "default"
    weights: Weights = "fused"
    tiles: int = 0
    layout: Layout = "contiguous"
    compiled: bool = False

    def __str__(self) -> str:
        """Describe the run in words."""
        tiles = f"{self.tiles} tiles" if self.tiles else "all tiles"
        return (
            f"threads {self.threads}, attention {self.attention}, weights {self.weights}, "
            f"{tiles} at once, inputs {self.layout}{', compiled' if self.compiled else ''}"
        )


def benign_runs(count: int, *, seed: int = 0) -> list[Benign]:
    """Return `count` different ways: each change alone, two compiled, and drawn mixtures."""
    plain = Benign(0)
    alone = [
        *(replace(plain, threads=threads) for threads in _THREADS),
        *(replace(plain, attention=attention) for attention in get_args(Attention)[1:]),
        *(replace(plain, weights=weights) for weights in get_args(Weights)[1:]),
        *(replace(plain, tiles=tiles) for tiles in _TILES[1:]),
        *(replace(plain, layout=layout) for layout in get_args(Layout)[1:]),
        replace(plain, compiled=True),
        replace(plain, compiled=True, tiles=4),
    ]
    ways = itertools.product(
        _THREADS, get_args(Attention), get_args(Weights), _TILES, get_args(Layout)
    )
    mixed = [w for w in (Benign(0, *way) for way in ways) if w not in alone]
    drawn = random.Random(seed).sample(mixed, max(0, count - len(alone)))
    return [replace(way, seed=place) for place, way in enumerate([*alone, *drawn][:count])]


@dataclass(frozen=True, slots=True)
class Alarms:
    """The alarm that a benign run raised, by the table or in a module, and by the oracle.

    `rules` are the rules of other projects that raise one; None if they were not tried.
    """

    table: str = ""
    oracle: str = ""
    rules: tuple[str, ...] | None = None


def run_benign(benign: Benign, setup: Setup) -> Alarms:
    """Check the unchanged port in this way, in a process of its own."""
    torch.set_num_threads(benign.threads)
    with ExitStack() as stack:
        _set_attention(benign.attention, stack)
        if benign.weights == "unfused on loading":
            stack.enter_context(mock.patch.object(fms, "family_of_config", _unfused_family))
        plan = Planted(setup.checkout, lambda candidate: _alter(candidate, benign))
        plant_candidate(plan)
        request = CheckRequest(
            setup.goldens, candidate=SPEC, localise=True, explore=QUESTIONS, seed=benign.seed
        )
        report = check(request, Progress())
        rules = rules_that_fail(plan, setup, is_right=True)
    return Alarms(_table_alarm(report), fails_by_oracle(report.results), rules)


def _table_alarm(report: CheckReport) -> str:
    if report.divergence:
        first = report.divergence
        return f"{first.phase} {first.case} {first.tensor}: {first.reason}"
    if report.verdict is not Verdict.PASS:
        return f"verdict {report.verdict}"
    found = report.localisation
    named = found and (found.first_bad or found.between)
    return f"names {found.module or 'the model'}" if found and named else ""


def _unfused_family(config: Mapping[str, Any]) -> Family:
    """Return the family with a configuration for unfused weights."""
    family = family_of_config(config)

    def unfused(config: Mapping[str, Any]) -> dict[str, Any]:
        fields = family.fms.config(config)
        parts = {n: {**fields[n], "fused_weights": False} for n in ("vision_config", "text_config")}
        return {**fields, **parts}

    return replace(family, fms=replace(family.fms, config=unfused))


def _alter(candidate: FmsCandidate, benign: Benign) -> FmsCandidate:
    model = candidate.model
    if benign.weights == "unfused in memory":
        from fms.utils.fusion import apply_unfuse_weights

        apply_unfuse_weights(model)
    tower, connector = model.vision_tower, model.connector
    if benign.layout != "contiguous":
        tower.forward = _laid_out(tower.forward, benign.layout)
        connector.forward = _laid_out(connector.forward, benign.layout)
    if benign.tiles:
        encoder = tower.base_model.encoder
        encoder.forward = _in_parts(encoder.forward, benign.tiles)
    if benign.compiled:
        tower.compile(dynamic=True)
        model.text_model.base_model.compile(dynamic=True)
    return candidate


def _laid_out(forward: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    def run(tensor: torch.Tensor, **keywords: Any) -> Any:
        if layout == "channels last" and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        else:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return forward(tensor, **keywords)

    return run


def _in_parts(forward: Callable[..., Any], tiles: int) -> Callable[..., Any]:
    def run(inputs_embeds: torch.Tensor, **keywords: Any) -> Any:
        parts = [
            forward(inputs_embeds=part, **keywords) for part in torch.split(inputs_embeds, tiles)
        ]
        return torch.cat([part[0] for part in parts]), ()

    return run


def _set_attention(attention: Attention, stack: ExitStack) -> None:
    backends = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    if attention in backends:
        # Flash attention on a CPU refuses some masks: math computes these, as by default.
        stack.enter_context(sdpa_kernel([backends[attention], SDPBackend.MATH], set_priority=True))
    elif attention == "eager":
        functional = torch.nn.functional
        patch = mock.patch.object(functional, "scaled_dot_product_attention", _eager_attention)
        stack.enter_context(patch)


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Compute attention step by step, as models did before torch had it in one call."""
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
