"""The commands of the README and of docs/ run, and print what the pages show.

In a block of `console` lines a command comes after `$ `, with its output below. `...` stands for
any text, and figures that depend on rounding match any figure. The commands run in a copy of the
repository, page by page; pages that record are tests of the record environment. A block that begins
with `# elsewhere: why` does not run, and is listed below.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, ROOT, Run, run_snap_here

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_RECORDING = ("snap record", "snap trace --impl hf")  # what needs Hugging Face
_SHELL = set("|&;<>$*?")  # what a shell does something with
ELSEWHERE = {
    "snap record --revision 7e3e67edbbed1bf9888184d9df282b700a323964",
    "accelerate launch --multi_gpu --num_processes 2 -m snapshot_tool record --revision "
    "7e3e67edbbed1bf9888184d9df282b700a323964 --device cuda --variants 1000",
    "snap record --checkpoint meta-llama/Llama-3.1-70B --revision SHA --device cuda "
    "--device-map auto --variants 9997",
    "torchrun --standalone --nproc-per-node=8 -m snapshot_tool check --device cuda --shard 1/4 "
    "--json shard-1.json",
    "snap check --loading own --fms-path ../foundation-model-stack",
    "snap check --fms-path broken --isolate",
    "snap bisect --fms-path ../foundation-model-stack --good v1.0 --bad HEAD -- --case one-image",
}
# Sizes of differences (one processor's rounding may leave none), how many elements differ, and the
# place of the worst one.
FIGURES = re.compile(
    r"(?<=pass )(?:equal|[\d.]+(?:e[-+]\d+)?x)"
    r"|\d+(?:\.\d+)?(?:e[-+]\d+)?(?=x\b)|\d+\.\d{3,}|\d+(?:\.\d+)?e[-+]\d+"
    r"|\d+(?= of \d+ differ)|(?<=differ \()[\d.]+(?=%)|(?<=worst at \[)[\d, ]+"
)
MATCHES = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
COPIED = ("benchmarks", "goldens", "tests", "Makefile", "pyproject.toml", ".ci")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a page: its text, what is shown below it, and whether it can run here."""

    text: str
    shown: str
    elsewhere: bool

    @property
    def exit_code(self) -> int:
        """What it must exit with: 1 where the page shows that something fails."""
        return 1 if re.search(r"^FAIL", self.shown, re.MULTILINE) else 0


def commands(page: Path) -> list[Command]:
    """Return the commands of a page in their order."""
    found = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```", page.read_text("utf-8")):
        elsewhere = block.startswith("# elsewhere: ")
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            text, _, shown = part.partition("\n")
            found.append(Command(text, shown, elsewhere))
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy of the repository what the commands use, as a repository of its own."""
    ignored = shutil.ignore_patterns(".snap", "__pycache__")
    root = tmp_path / "repository"
    root.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=ignored)
        else:
            shutil.copy(source, root)
    # With compiled files, without the lock of a git that another test runs there.
    locks = shutil.ignore_patterns("*.lock")
    shutil.copytree(CHECKOUT, root / CHECKOUT.relative_to(ROOT), ignore=locks)
    for name in (".venv-check", ".venv-record"):
        (root / name).symlink_to(ROOT / name)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def run(command: str, *, cwd: Path) -> Run:
    """Run a command in the environment that it is for; make only says what it would do."""
    environment = ROOT / (".venv-record" if command.startswith(_RECORDING) else ".venv-check")
    here = Path(sys.prefix).resolve() == environment.resolve()
    if here and command.startswith("snap ") and not _SHELL & set(re.sub('"[^"]*"', "", command)):
        return run_snap_here(*shlex.split(command)[1:], cwd=cwd)
    variables = {"PATH": f"{environment}/bin:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(
        ["bash", "-c", re.sub(r"^make ", "make --dry-run ", command)],
        cwd=cwd, env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Run(answer.returncode, answer.stdout, answer.stderr)


def pages() -> list[Any]:
    """Return the pages that have commands; those that record are for the record environment."""
    found = []
    for page in PAGES:
        texts = [command.text for command in commands(page) if not command.elsewhere]
        records = any(text.startswith(_RECORDING) for text in texts)
        if texts:
            marks = [pytest.mark.record] if records else []
            found.append(pytest.param(page, id=page.name, marks=marks))
    return found


@pytest.mark.parametrize("page", pages())
def test_every_command_does_what_the_page_shows(
    page: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exits as the page says, and its output is the one shown."""
    # Readers do not have what the tests set.
    monkeypatch.delenv("IDEFICS3_PREPROCESSOR", raising=False)
    shared = copy.parent / "shared"
    if page.name == "ci.md":  # a repository in whose CI the goldens are pulled has pushed them
        assert run(f"snap push file://{shared} && rm -r goldens", cwd=copy).code == 0
    for command in commands(page):
        if command.elsewhere:
            continue
        answer = run(command.text.replace("/tmp/snap-goldens", str(shared)), cwd=copy)
        printed = answer.out.replace(str(shared), "/tmp/snap-goldens")
        assert answer.code == command.exit_code, f"{command.text}\n{printed}{answer.err}"
        if command.shown.strip():
            # A line of dots stands for no line, too.
            shown = re.sub(r"(?m)\s*^\.\.\.\s*", "...", command.shown)
            shown, seen = (FIGURES.sub("N", text) for text in (shown, printed))
            assert doctest.OutputChecker().check_output(shown, seen, MATCHES), (
                f"$ {command.text}\n{printed}\nis not what {page.name} shows:\n{command.shown}"
            )


def test_commands_that_cannot_run_here_are_marked_and_listed() -> None:
    """None is left out in silence, and none is listed that is gone."""
    marked = {command.text for page in PAGES for command in commands(page) if command.elsewhere}
    assert marked == ELSEWHERE


def test_no_page_has_commands_that_nobody_runs() -> None:
    """A line that begins with `$ ` stands in a console block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        prompts = re.findall(r"^\$ ", text, re.MULTILINE)
        assert len(prompts) == len(commands(page)), page


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    """Pages, pictures and headings that are linked exist."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in index
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
        for link in re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
            target, _, heading = "".join(link).partition("#")
            if "://" in target:
                continue
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name} links to {target}"
            if heading:
                headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
                names = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert heading in names, f"{page.name} links to #{heading}"
