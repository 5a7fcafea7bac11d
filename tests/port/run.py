"""Check all commits of FMS's pull request 503, run the parity suite beside it, write the page.

    .venv-check/bin/python -m tests.port.run --fms-repo CLONE [--suite CLONE] [--smolvlm DIR]

Each commit is checked out in a worktree of the clone below build/port. Exits with 1 if a verdict
differs from tests/port/commits.py, or if a derived question fails for an unknown reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.families.own_loading import install
from tests.port.commits import COMMITS, HEAD, LAST_OF_SUITE, Commit, fault_of
from tests.port.page import Process, Row, TrueShape, write

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = ROOT / "tests" / "checkpoints" / "tiny-idefics3"
CHECK, RECORD = (ROOT / name / "bin" / "python" for name in (".venv-check", ".venv-record"))
QUESTIONS = 200
BUILD = ROOT / "build" / "port"


def run(*command: object, **environment: str) -> Process:
    """Run a process to its end, with further environment variables."""
    began = time.perf_counter()
    log = BUILD / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    text = log.read_text(encoding="utf-8", errors="replace")
    return Process(os.waitstatus_to_exitcode(status), text, seconds, usage.ru_maxrss * 1024)


def worktree(repository: Path, sha: str) -> Path:
    """Return a checkout of a commit, in a worktree of the clone."""
    folder = BUILD / sha
    if not (folder / "fms").is_dir():
        subprocess.run(
            ["git", "-C", repository, "worktree", "add", "--force", "--detach", folder, sha],
            check=True,
            capture_output=True,
        )
    return folder


def check(python: Path, fms: Path, *options: object) -> tuple[Any, Process]:
    """Return the JSON of a check, and its process."""
    target = BUILD / "run.json"
    target.unlink(missing_ok=True)
    finished = run(
        python, "-m", "snapshot_tool", "check", "--fms-path", fms, "--json", target, *options
    )
    if not target.exists():
        sys.exit(f"snap check of {fms} wrote no report:\n{finished.out}")
    return json.loads(target.read_bytes()), finished


def run_suite(suite: Path, fms: Path, checkpoint: Path) -> tuple[str, Process]:
    """Return the suite's verdict: its result, or the exception that ended it."""
    # FMS reads its version from the metadata of an installed ibm-fms, which goes behind --fms-path.
    installed = install("1.13.1", BUILD / "ibm-fms")
    command = (suite / "test_parity.py", "--fms-path", fms, "--checkpoint", checkpoint)
    finished = run(RECORD, *command, PYTHONPATH=str(installed))
    lines = [line.strip() for line in finished.out.splitlines() if line.strip()]
    result = [line for line in lines if line.startswith("RESULT:")]
    return (result or lines)[-1].removeprefix("RESULT: ").lower(), finished


def wrong_verdicts(commit: Commit, report: Any) -> list[str]:
    """Return how a report differs from the expected one."""
    first = report["first_divergence"]
    phase, place = (first["phase"], first["place"]) if first else ("", "")
    failed = {r["case"] for r in report["results"] if r["verdict"] not in ("pass", "skip")}
    found = [
        f"{commit.sha}: {what} {actual or 'none'}, expected {expected or 'none'}"
        for what, actual, expected in (
            ("first phase that fails", phase, commit.phase),
            ("module", place, commit.place),
        )
        if actual != expected
    ]
    if commit.cases != len(failed):
        found.append(f"{commit.sha}: {len(failed)} cases fail, expected {commit.cases}")
    return found


def compare_interfaces(fms: Path) -> list[str]:
    """Return where the tests' checkout has another interface than FMS's own idefics3."""
    described = []
    for path in (ROOT / "build" / "fms-checkout", fms):
        out = subprocess.run(
            [RECORD, "-m", "tests.port.interface", path],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stdout
        described.append(json.loads(out.splitlines()[-1]))
    double, own = described
    return [
        f"{name}: {double.get(name)}, FMS has {own[name]}"
        for name in own
        if double.get(name) != own[name]
    ]


def check_commit(commit: Commit, fms: Path, suite: Path | None) -> tuple[Row, list[str]]:
    """Check one commit; return its row of the page, and the problems."""
    report, _ = check(CHECK, fms)
    with_transformers, _ = check(RECORD, fms, "--phase", "preprocessing")
    explored, _ = check(CHECK, fms, "--explore", QUESTIONS)
    problems, faults = wrong_verdicts(commit, report), {}
    for kind in explored["exploration"]["kinds"]:
        if failure := kind["smallest_failure"]:
            faults[kind["kind"]] = fault_of(commit.sha, kind["kind"])
            if not faults[kind["kind"]]:
                problems.append(f"{commit.sha}: {failure} fails for an unknown reason")
    verdict = run_suite(suite, fms, CHECKPOINT)[0] if suite else "not run"
    return Row(commit.sha, verdict, report, with_transformers["verdict"], faults), problems


def check_true_shape(fms_repo: Path, suite: Path | None, checkpoint: Path) -> list[TrueShape]:
    """Record the checkpoint once, then check it at two commits, beside the suite."""
    goldens = BUILD / "goldens"
    if not goldens.exists():
        part = BUILD / "goldens.part"
        recorded = run(
            RECORD, "-m", "snapshot_tool", "record", "--checkpoint", checkpoint,
            "--variants", 3, "--goldens", part, "--fresh",
        )  # fmt: skip
        if recorded.code:
            sys.exit(recorded.out)
        part.rename(goldens)
    own = ("--goldens", goldens, "--checkpoint", checkpoint)
    beside = None
    if suite:
        verdict, beside = run_suite(suite, worktree(fms_repo, LAST_OF_SUITE), checkpoint)
        print(f"suite at {LAST_OF_SUITE}: {verdict}", flush=True)
    found = []
    for sha in (LAST_OF_SUITE, HEAD):
        fms = worktree(fms_repo, sha)
        report, _ = check(CHECK, fms, *own)
        _, process = check(CHECK, fms, *own, "--case", "*-image*")
        found.append(TrueShape(sha, report, process, beside))
        print(f"{sha}: {report['verdict']}, {process.seconds:.0f} s", flush=True)
    return found


def main() -> int:
    """Parse the arguments, check, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fms-repo", type=Path, required=True, help="with refs/pull/503")
    parser.add_argument("--suite", type=Path, help="a clone of toddllm/hf-fms-parity-public")
    parser.add_argument("--smolvlm", type=Path, help="SmolVLM-256M-Instruct, or its double")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "port-503.md")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    rows, problems = [], compare_interfaces(worktree(arguments.fms_repo, HEAD))
    for commit in COMMITS:
        row, wrong = check_commit(commit, worktree(arguments.fms_repo, commit.sha), arguments.suite)
        print(f"{row.sha}: {row.verdict}; suite: {row.suite}", flush=True)
        rows.append(row)
        problems += wrong
    found = []
    if arguments.smolvlm:
        found = check_true_shape(arguments.fms_repo, arguments.suite, arguments.smolvlm)
    write(arguments.docs, rows, found)
    print("\n".join(problems) or f"all as expected; written to {arguments.docs}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
