"""`make paths`: plant faults in FMS's caches and paths, and write the table of docs/paths.md.

    python -m tests.mutants.paths [--out docs/paths.md] [--workers 2] [--results build/paths.json]

Each fault of paths.txt is checked on every path, in a process forked from this one. Then a right
FMS is given 1,000 derived questions on its paths. What was run already is kept in --results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# FMS imports these, in each forked process anew where they are not here already.
import torch._dynamo
import torch.distributed.checkpoint  # noqa: F401

from snapshot_tool.base.protocol import Phase, Progress
from snapshot_tool.check.request import CheckRequest
from snapshot_tool.check.workflow import check_paths
from tests.conftest import CHECKOUT, GOLDENS, ROOT
from tests.mutants.corpus import read_mutants
from tests.mutants.forked import Crash, run_forked
from tests.mutants.mutant import DERIVED, GENERATION, Edit, Mutant, plant_linked

PATHS = ("eager", "static", "paged", "chunked:50")
CASES = ("one-image", "variant-01", "variant-02")
# Masks and positions of `static` are those of FMS's pad_input_ids in a llama, not in an idefics3.
LLAMA, LLAMA_CASES = ROOT / "tests/families/goldens", ("one-sentence", "variant-03", "variant-04")
MODULES = ("model.text_model.layers.0.self_attn", "model.layers.0.self_attn")
FAULTS: Mapping[str, Mutant] = {
    fault.name: fault for fault in read_mutants(Path(__file__).parent / "paths.txt")
}
QUESTIONS, QUESTIONS_OF_A_FAULT = 1000, 28
_SECONDS = 1200


@dataclass(frozen=True, slots=True)
class Found:
    """What a check on each path finds: its first phase, and where the fault arises."""

    phases: Mapping[str, str]
    places: Mapping[str, str]

    def shows(self, fault: Mutant) -> bool:
        """Return whether each path that must show a fault names its place, and eager passes."""
        places = (GENERATION,) if fault.phase == Phase.GENERATE else (*MODULES, "raised")
        return not self.phases["eager"] and all(
            self.phases[path] and (fault.phase == DERIVED or self.places[path] in places)
            for path in fault.places
        )


def check_fault(fault: Mutant, paths: Sequence[str] = PATHS) -> Found:
    """Check an FMS with a fault on several paths, in a process of its own."""
    assert isinstance(fault.fault, Edit)
    phases, places = {}, {}
    goldens, cases = (LLAMA, LLAMA_CASES) if "static" in fault.places else (GOLDENS, CASES)
    with tempfile.TemporaryDirectory(dir=CHECKOUT.resolve().parent, prefix=".path-") as folder:
        plant_linked(fault.fault, checkout=CHECKOUT, out=Path(folder))
        request = CheckRequest(
            goldens,
            checkpoint="llama" if goldens == LLAMA else None,
            fms_path=folder,
            path=paths,
            case=cases if fault.phase != DERIVED else cases[1:],
            phase=("forward", "generate"),
            explore=QUESTIONS_OF_A_FAULT if fault.phase == DERIVED else None,
        )
        for one in check_paths(request, Progress()):
            assert one.report is not None, one.reason
            first = one.report.divergence
            derived = first is not None and first not in one.report.results
            phases[one.name] = DERIVED if derived else first.phase.value if first else ""
            places[one.name] = one.report.location
    return Found(phases, places)


def count_questions(path: str, count: int) -> tuple[int, int]:
    """Ask a right llama derived questions on a path; return how many, and how many fail."""
    request = CheckRequest(LLAMA, checkpoint="llama", path=[path], explore=count, case="*")
    (one,) = check_paths(request, Progress())
    assert one.report is not None
    assert one.report.exploration is not None
    explored = one.report.exploration
    return explored.asked, len(one.report.bad)


def write_table(page: Path, found: Mapping[str, Found], asked: int, alarms: int) -> None:
    """Replace the part of the page between the marks."""
    shown = sum(found[name].shows(FAULTS[name]) for name in found)
    lines = [
        f"{shown} of {len(found)} faults are found on every path that has them. If a recorded "
        f"case shows a fault, it is placed in the attention of the first layer or, if only tokens "
        f"differ, in the generation loop. A right FMS was given {asked} derived questions on its "
        f"paths: {alarms} false alarms.",
        "",
        f"| fault | {' | '.join(f'`{path}`' for path in PATHS)} |",
        f"| --- |{' --- |' * len(PATHS)}",
    ]
    for name, one in found.items():
        cells = [one.phases[path] or "pass" for path in PATHS]
        lines.append(f"| {FAULTS[name].what} | {' | '.join(cells)} |")
    text = page.read_text("utf-8")
    marks = re.compile(r"(?<=<!-- faults -->\n).*(?=\n<!-- end -->)", re.DOTALL)
    page.write_text(marks.sub(lambda _match: "\n".join(lines), text), "utf-8")


def main() -> int:
    """Read the arguments, plant the faults, ask the questions, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/paths.md"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("build/paths.json"))
    arguments = parser.parse_args()
    file: Path = arguments.results
    kept = json.loads(file.read_text("utf-8")) if file.exists() else {}
    results = {name: Found(**found) for name, found in kept.items()}
    jobs = {n: partial(check_fault, fault) for n, fault in FAULTS.items() if n not in results}
    crashed = False
    for name, result in run_forked(jobs, workers=arguments.workers, seconds=_SECONDS):
        if isinstance(result, Crash):
            crashed = True
            print(f"{name}: {result.why}", flush=True)
            continue
        results[name] = result
        file.write_text(json.dumps({n: asdict(found) for n, found in results.items()}), "utf-8")
        word = "found" if result.shows(FAULTS[name]) else "MISSED"
        print(f"{word} {name}: {dict(result.phases)} {dict(result.places)}", flush=True)
    paths = (*PATHS[1:], "chunked:5")
    counts = {path: partial(count_questions, path, QUESTIONS // len(paths)) for path in paths}
    asked = alarms = 0
    for path, counted in run_forked(counts, workers=arguments.workers, seconds=_SECONDS):
        print(f"{path}: {counted}", flush=True)
        if isinstance(counted, Crash):
            crashed = True
            continue
        asked, alarms = asked + counted[0], alarms + counted[1]
    found = {name: results[name] for name in FAULTS if name in results}
    if not crashed:
        write_table(arguments.out, found, asked, alarms)
    missed = [name for name, one in found.items() if not one.shows(FAULTS[name])]
    return int(crashed or bool(missed) or alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
