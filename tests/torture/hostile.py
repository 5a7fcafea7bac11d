"""The long run over golden sets from strangers: in batches, each kept when it is done.

A run that is broken off goes on with the batches that are not kept; `make torture` begins anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.torture.bombs import BOMBS
from tests.torture.configurations import mutate_configuration
from tests.torture.pictures import mutate_picture_by_seed
from tests.torture.trial import BUILT, PICTURED, Outcome, run_batch, run_prepared

_MUTATED, _BATCH = 100_000, 2_000
_DRAWN, _DRAWN_BATCH = 5_000, 1_000
_CONFIGURATIONS, _BUILT_BATCH = 3_000, 250
_PICTURED, _PICTURED_BATCH = 4_000, 500

Job = Callable[[], Outcome]


def try_hostile_sets(kept: Path, workplace: Path) -> dict[str, Any]:
    """Try mutated sets, drawn manifests, configurations and bombs; return the figures.

    Args:
        kept: folder of the batches that are done.
        workplace: where sets are written.
    """
    kept.mkdir(parents=True, exist_ok=True)
    found = {
        "mutated": _all(kept, _mutated(workplace)),
        "drawn": _all(kept, _drawn(workplace), at_once=1),  # hypothesis likes one thread
        "built": _all(kept, _built(workplace)),
        "pictured": _all(kept, _pictured(workplace)),
    }
    bombs = _all(kept, _bombs(workplace), at_once=1)
    total = _sum([*found.values(), bombs])
    return {
        **{kind: outcome.inputs for kind, outcome in found.items()},
        "bombs": bombs.inputs,
        "runs": total.runs,
        "codes": dict(total.codes),
        "mutations": dict(total.mutations),
        "memory_mb": round(max(outcome.grown for outcome in found.values()) / 1e6),
        "bomb_memory_mb": round(bombs.grown / 1e6),
        "failures": total.violations,
    }


def _mutated(workplace: Path) -> dict[str, Job]:
    def job(start: int) -> Job:
        seeds = range(start, start + _BATCH)
        return lambda: run_batch(seeds, workplace / f"mutated-{start}")

    return {f"mutated-{start:06}": job(start) for start in range(0, _MUTATED, _BATCH)}


def _built(workplace: Path) -> dict[str, Job]:
    def job(start: int) -> Job:
        seeds, place = range(start, start + _BUILT_BATCH), workplace / f"built-{start}"
        return lambda: run_batch(seeds, place, mutate=mutate_configuration, ground=BUILT)

    return {f"built-{start:06}": job(start) for start in range(0, _CONFIGURATIONS, _BUILT_BATCH)}


def _pictured(workplace: Path) -> dict[str, Job]:
    def job(start: int) -> Job:
        seeds, place = range(start, start + _PICTURED_BATCH), workplace / f"pictured-{start}"
        return lambda: run_batch(seeds, place, mutate=mutate_picture_by_seed, ground=PICTURED)

    return {f"pictured-{start:06}": job(start) for start in range(0, _PICTURED, _PICTURED_BATCH)}


def _drawn(workplace: Path) -> dict[str, Job]:
    def job(seed: int) -> Job:
        return lambda: _try_drawn_manifests(_DRAWN_BATCH, workplace / "drawn", seed=seed)

    return {f"drawn-{seed:06}": job(seed) for seed in range(0, _DRAWN, _DRAWN_BATCH)}


def _bombs(workplace: Path) -> dict[str, Job]:
    def job(name: str) -> Job:
        return lambda: run_prepared(BOMBS[name], workplace / "bomb", name=name)

    return {f"bomb {name}": job(name) for name in BOMBS}


def _all(kept: Path, jobs: Mapping[str, Job], *, at_once: int | None = None) -> Outcome:
    with ThreadPoolExecutor(at_once or os.cpu_count()) as pool:
        outcomes = pool.map(lambda name: _kept(kept / f"{name}.json", jobs[name]), jobs)
        return _sum(outcomes)


def _kept(path: Path, job: Job) -> Outcome:
    """Return what a batch came to, from the file of an earlier run where there is one."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        counts = {name: Counter(found[name]) for name in ("codes", "mutations")}
        return Outcome(**{**found, **counts})
    outcome = job()
    # Part by part: a killed run leaves no half of a file.
    partial = path.with_suffix(".partial")
    found = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)
    line = f"{path.stem}: {outcome.runs} runs, {outcome.grown / 1e6:.0f} MB, {outcome.violations}"
    print(line, file=sys.stderr, flush=True)
    return outcome


def _sum(outcomes: Iterable[Outcome]) -> Outcome:
    total = Outcome()
    for outcome in outcomes:
        total.add(outcome)
    return total


def _try_drawn_manifests(count: int, workplace: Path, *, seed: int) -> Outcome:
    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    from snapshot_tool.goldens.manifest import Manifest, encode
    from tests.torture.schema import manifests

    drawn: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(manifests())
    def draw(manifest: Manifest) -> None:
        drawn.append(encode(manifest))

    draw()

    def put(folder: Path, index: int) -> str:
        (folder / "manifest.json").unlink()
        (folder / "manifest.json").write_bytes(drawn[index])
        return "drawn from the schema"

    return run_batch(range(len(drawn)), workplace, mutate=put)
