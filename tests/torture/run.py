"""The long tests of faults: `make torture` runs them and writes docs/reliability.md.

    python -m tests.torture.run PART …      each part writes build/torture/PART.json

Parts: hostile, sharing, concurrency (check environment), recording (record environment), report
(writes the page).
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.conftest import ROOT
from tests.torture.conftest import memory_folder

FIGURES = ROOT / "build" / "torture"
BATCH = 250
MUTATED, CONFIGURED, PICTURED = 2_000, 250, 500  # sets
READERS, ROUNDS = 4, 400
_EVERY_OTHER_KIND = 9  # each other kind of fault is tried at every ninth point that is killed
_PAGE = """# Reliability

What was tried to break golden sets. `make torture` writes this page; `make test` runs seeded
samples of the same faults.

| tried | times | survived |
| --- | --- | --- |
{rows}

**Writing.** During a recording, a resumed recording, an update or a pull, the process was killed or
interrupted, or the system refused an operation (disk full, read-only, failing), at writes, syncs,
renames, links and removals. A run survived if all files are those before or all those after, they
verify, the error has one or two lines, and continuing gives the bytes of an undisturbed run. A
commit is two renames. If the process is killed between them, the old set is missing: other commands
report this, and the next `snap record` or `snap pull` of that revision restores it.

**Reading during a recording.** A recorder replaced a set repeatedly while others read it. A read
survived if it returned one whole version and reported no damage. Commands that read (`list`,
`show`, `verify`, `diff`, `check`, `doctor`, pytest) write nothing below the goldens folder.

**Untrusted golden sets.** `list`, `show`, `verify`, `diff`, `check` and `doctor` ran on mutated
manifests, headers, tensors and images, links, pipes, decompression bombs and configurations for
FMS to build. A set survived if it was read, or refused in two lines with exit code 3, without a
traceback, a control character, a write, a process, half a minute of processor time or a gigabyte of
memory{memory}.
{failures}"""

Figures = dict[str, Any]


def kill_points(makers: Sequence[Callable[[Path], Any]], *, every: int = 1) -> Figures:
    """Fail scenarios by kill -9, the first at every point and the others at every `every`-th.

    Each other kind of fault is tried at fewer points, spread over the whole run in the same way.
    """
    from tests.torture.kill_points import run_undisturbed, try_points
    from tests.torture.saboteur import Kind

    rows: list[Figures] = []
    failures: list[str] = []
    for make in makers:
        with TemporaryDirectory(dir=memory_folder()) as folder:
            workplace = Path(folder)
            scenario = make(workplace / "start")
            whole = run_undisturbed(scenario, workplace)
            points = range(1, len(whole.operations) + 1)
            tried = failed = 0
            for kind in Kind:
                step = (every if rows else 1) if kind is Kind.KILL else _EVERY_OTHER_KIND * every
                survival = try_points(
                    scenario, whole, points[::step], workplace / "tried", kind=kind
                )
                tried += survival.tried
                failed += len(survival.failures)
                failures += survival.failures
                print(scenario.name, kind, dict(survival.found), file=sys.stderr, flush=True)
            rows.append({"what": scenario.name, "tried": tried, "survived": tried - failed})
    return {"rows": rows, "failures": failures}


def recording() -> Figures:
    """Kill recordings, with the real reference's answers."""
    from tests.torture.kill_points import RECORDING

    return kill_points(RECORDING, every=3)


def sharing() -> Figures:
    """Kill pulls."""
    from tests.torture.kill_points import SHARING

    return kill_points(SHARING)


def concurrency() -> Figures:
    """Let a recorder replace a set under its readers."""
    from tests.torture.concurrency import meet

    with TemporaryDirectory(dir=memory_folder()) as folder:
        meeting = meet(Path(folder), readers=READERS, rounds=ROUNDS)
    reads = sum(meeting.versions.values())
    row = {"what": f"reads while a set was replaced {meeting.replaced} times", "tried": reads}
    return {"rows": [{**row, "survived": reads}], "failures": meeting.failures}


def hostile() -> Figures:
    """Try mutated sets, configurations, pictures and bombs."""
    from tests.torture.configurations import mutate_configuration
    from tests.torture.pictures import BOMBS, mutate_picture
    from tests.torture.trial import BUILT, Outcome, run_batch, run_prepared
    from tests.torture.trial import PICTURED as PACKED

    rows: list[Figures] = []
    total = Outcome()

    def try_all(what: str, jobs: Sequence[Callable[[Path], Outcome]]) -> None:
        outcome = Outcome()
        with (
            TemporaryDirectory(dir=memory_folder()) as folder,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for one in pool.map(lambda n: jobs[n](Path(folder) / str(n)), range(len(jobs))):
                outcome.add(one)
        survived = outcome.inputs - len(outcome.violations)
        rows.append({"what": what, "tried": outcome.inputs, "survived": survived})
        print(rows[-1], dict(outcome.codes), file=sys.stderr, flush=True)
        total.add(outcome)

    def batches(count: int, **options: Any) -> list[Callable[[Path], Outcome]]:
        starts = range(0, count, BATCH)
        return [partial(run_batch, range(n, n + BATCH), **options) for n in starts]

    try_all("mutated sets", batches(MUTATED))
    built = {"mutate": mutate_configuration, "ground": BUILT}
    try_all("sets with another configuration", batches(CONFIGURED, **built))
    try_all("sets with a spoilt PNG", batches(PICTURED, mutate=mutate_picture, ground=PACKED))
    try_all("bombs", [partial(run_prepared, spoil, name=name) for name, spoil in BOMBS.items()])
    return {"rows": rows, "failures": total.violations, "memory_mb": round(total.grown / 1e6)}


def report() -> Figures:
    """Write docs/reliability.md from the figures of the other parts."""
    names = ("recording", "sharing", "concurrency", "hostile")
    figures: list[Figures] = []
    for name in names:
        path = FIGURES / f"{name}.json"
        not_run: Figures = {
            "rows": [{"what": name, "tried": "not run", "survived": ""}],
            "failures": [],
        }
        figures.append(json.loads(path.read_text("utf-8")) if path.exists() else not_run)
    (ROOT / "docs" / "reliability.md").write_text(_page(figures), encoding="utf-8")
    return {"failures": []}


def _page(figures: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {row['what']} | {row['tried']} | {row['survived']} |"
        for found in figures
        for row in found["rows"]
    ]
    memory = [f" (at most {found['memory_mb']} MB)" for found in figures if "memory_mb" in found]
    failures = [
        f"\n    NOT SURVIVED: {' '.join(str(failure).split())[:400]}\n"
        for found in figures
        for failure in found["failures"][:20]
    ]
    return _PAGE.format(rows="\n".join(rows), memory="".join(memory), failures="".join(failures))


PARTS = {p.__name__: p for p in (hostile, sharing, recording, concurrency, report)}


def main(names: Sequence[str]) -> int:
    """Run parts and keep their figures; return 1 if something did not survive."""
    import torch

    torch.set_num_threads(1)  # processes are forked
    random.seed(0)
    FIGURES.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in names:
        figures = PARTS[name]()
        text = json.dumps(figures, indent=2, sort_keys=True)
        (FIGURES / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for failure in figures["failures"][:20]:
            print(failure, file=sys.stderr, flush=True)
        failed = failed or bool(figures["failures"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
