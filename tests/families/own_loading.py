"""Check every family as FMS's users load it, by get_model("hf_pretrained"): a column of the page.

It needs transformers: 4.57.6, which ibm-fms 1.13.1 asks for, or 5.24.0 for what that cannot read.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.families.findings import FINDINGS_OWN

ROOT = Path(__file__).parent.parent.parent
NEWER, NEWEST = (ROOT / name / "bin" / "python" for name in (".venv-record-4.57", ".venv-record-5"))
FMS = "1.13.1"


@dataclass(frozen=True, slots=True)
class OwnLoading:
    """What came out: a cell of the table, and what is behind it if something differs."""

    cell: str
    problems: tuple[str, ...] = ()


def install(version: str, folder: Path) -> Path:
    """Install a release of FMS from PyPI by itself into a folder, if it is not there yet."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(part), f"ibm-fms=={version}"], check=True)
        part.rename(folder)
    return folder


def check_own_loading(name: str, release: str, out: Path, *, candidate: str = "") -> OwnLoading:
    """Check one golden set below `out`, recorded with a release, by the installed FMS or a repair.

    The cases with one image or one sentence are enough: other cases load the same model.
    """
    fms = install(FMS, ROOT / "build" / "versions" / FMS)
    which = ["--candidate", candidate] if candidate else ["--fms-path", str(fms)]
    where = ["--goldens", str(out / "goldens"), "--checkpoint", str(out / "checkpoints" / name)]
    python = NEWEST if release.startswith("5.") else NEWER
    return _check(python, [*where, *which], pythonpath=str(fms))


def check_checkout() -> OwnLoading:
    """Check the embedded checkpoint on the tests' FMS checkout."""
    return _check(NEWER, ["--fms-path", "build/fms-checkout"])


def _check(python: Path, options: Sequence[str], *, pythonpath: str = "") -> OwnLoading:
    command = [str(python), "-m", "snapshot_tool", "check", "--loading", "own", "--json", "-"]
    answer = subprocess.run(
        [*command, "--case", "one-*", *options],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode in (0, 1):
        fields = json.loads(answer.stdout)["environment"]["candidate"]["mapping"]
        wrong = tuple(_words(field) for field in fields if not field["harmless"])
        return OwnLoading("**differs**", wrong) if wrong else OwnLoading("agrees")
    (line,) = (line for line in answer.stderr.splitlines() if line.startswith("snap: "))
    problem = line.removeprefix("snap: ").replace(f"{ROOT}/", "")
    # A repair is loaded from a temporary folder.
    problem = re.sub(r"\S*/snap-repair-\w+", "the repaired checkpoint", problem)
    return OwnLoading("**fails**", tuple(problem.split("; ")))


def _words(field: Any) -> str:
    source = f", from Hugging Face's {', '.join(field['sources'])}" if field["sources"] else ""
    return f"{field['field']} {field['actual']}, expected {field['expected']}{source}"


def problem_lines(found: Sequence[tuple[str, OwnLoading]]) -> list[str]:
    """Say of each checkpoint what FMS's own loading does otherwise."""
    return [
        line
        for name, own in found
        if own.problems
        for line in (_heading(name), *(f"  - `{problem}`" for problem in own.problems))
    ]


def _heading(name: str) -> str:
    words = FINDINGS_OWN.get(name)
    return f"- **{name}**: {words}." if words else f"- **{name}**:"
