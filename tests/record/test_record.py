"""`snap record` with the real Hugging Face stack: bytes, recipes, resuming, replacing, refusing."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import snapshot_tool
from snapshot_tool.base.protocol import Phase
from tests.conftest import (
    CHECKPOINT,
    GOLDENS,
    ROOT,
    Run,
    Snap,
    contents,
    error_lines,
    run_snap,
    set_folder,
)
from tests.record.checkpoints import (
    LLAMA,
    ROBERTA,
    SMALL,
    Notes,
    manifest_of,
    record_here,
)
from tests.unit.hub import COMMIT, REPOSITORY, serve_hub

pytestmark = pytest.mark.record


def record(snap: Snap, goldens: Path, *options: object) -> Run:
    """Record the tiny Llama."""
    return snap("record", "--checkpoint", LLAMA, "--goldens", goldens, *options)


@pytest.mark.parametrize(
    ("source", "cases"),
    [
        (GOLDENS, ("--case", "variant-0[24],variant-11")),  # few tiles, none, padding
        (ROOT / "tests" / "compact-goldens", ()),
    ],
    ids=["full", "compact"],
)
def test_committed_goldens_are_what_the_reference_says(
    snap: Snap, tmp_path: Path, source: Path, cases: tuple[str, ...]
) -> None:
    """Recorded again from their recipes, they are the same, within the processor's rounding.

    `make goldens` records all cases of the full set.
    """
    goldens = Path(
        shutil.copytree(source, tmp_path / "goldens", ignore=shutil.ignore_patterns(".snap"))
    )
    options = ("--update", "--reason", "again", "--yes", *cases)
    run = snap("record", "--checkpoint", CHECKPOINT, "--goldens", goldens, *options)
    assert run.code == 0, run.err
    assert manifest_of(goldens).get("storage") == manifest_of(source).get("storage")
    if run.out.startswith("unchanged"):
        assert contents(goldens) == contents(source)
        return
    # Another processor rounds differently; nothing may move beyond tolerance.
    assert manifest_of(goldens)["golden_version"] == manifest_of(source)["golden_version"] + 1
    diff = snap("diff", set_folder(source), set_folder(goldens))
    assert diff.code == 0, diff.out


def test_another_seed_draws_other_variants(small: Path, tmp_path: Path) -> None:
    """The fixed cases stay, the variants change."""
    record_here(CHECKPOINT, tmp_path / "goldens", seed=7, phase=(Phase.GENERATE,))
    one, other = (
        {case["name"]: case["recipe"] for case in manifest_of(goldens)["cases"]}
        for goldens in (small, tmp_path / "goldens")
    )
    assert list(one) == ["one-image", "two-images", "variant-01", "variant-02", "end-token"]
    same = {name for name in one if one[name] == other[name]}
    assert same == {"one-image", "two-images", "end-token"}


def test_recording_over_a_golden_needs_update_and_a_reason(snap: Snap, llama_copy: Path) -> None:
    """Nothing is lost by a second `snap record`, and equal bytes are no new version."""
    before = contents(llama_copy)
    again = record(snap, llama_copy, *SMALL)
    assert again.code == 3
    assert "is recorded already in" in error_lines(again)[0]
    assert "--update --reason TEXT" in error_lines(again)[1]
    assert record(snap, llama_copy, "--update").code == 2
    assert contents(llama_copy) == before
    assert record(snap, llama_copy, "--update", "--reason", "try").out.startswith("unchanged: ")
    assert contents(llama_copy) == before


def test_one_phase_can_be_recorded_again_alone(snap: Snap, llama_copy: Path) -> None:
    """The files of the other phases stay as they were."""
    before = contents(llama_copy)
    options = ("--phase", "generate", "--max-new-tokens", 6, "--yes")
    run = record(snap, llama_copy, "--update", "--reason", "tokens", *options)
    assert run.code == 0, run.err
    after = contents(llama_copy)
    changed = {name.rpartition("/")[2] for name in before if before[name] != after[name]}
    assert changed == {"generate.safetensors", "manifest.json"}
    assert snap("verify", "--goldens", llama_copy).code == 0


class InterruptsAtTheThirdCase(Notes):
    """Interrupts a recording as Ctrl-C does."""

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Iterator[int]]:
        """Count the cases that are recorded."""
        with super().stage(title, total) as steps:
            yield self._interrupted(steps) if title == "recording cases" else steps

    def _interrupted(self, steps: Iterator[int]) -> Iterator[int]:
        for step in steps:
            if step > 2:
                raise KeyboardInterrupt
            yield step


def test_an_interrupted_recording_goes_on_where_it_stopped(
    snap: Snap, llama_set: Path, tmp_path: Path
) -> None:
    """If it is told to, with the same settings, and to the same bytes; nothing is there before."""
    goldens = tmp_path / "goldens"
    notes = InterruptsAtTheThirdCase()
    with pytest.raises(KeyboardInterrupt):
        record_here(LLAMA, goldens, notes=notes)
    assert notes.lines == ["cases kept: 3; continue with the same command and --resume"]
    assert contents(goldens) == {}
    assert snap("list", "--goldens", goldens).out.startswith("no golden set")
    refused = record(snap, goldens, *SMALL)
    assert refused.code == 3
    assert "go on with --resume, or throw it away with --fresh" in error_lines(refused)[1]
    other = record(snap, goldens, "--resume", "--variants", 2, "--max-new-tokens", 5)
    assert other.code == 2
    assert "another max_new_tokens: it was 4, is 5" in error_lines(other)[0]
    marked = tmp_path / "marked"
    shutil.copytree(goldens, marked)
    (staged,) = marked.glob(".snap/*/*/*/parts/one-sentence/generate.txt")
    staged.write_text("staged before", encoding="utf-8")
    assert record(snap, marked, "--resume", *SMALL).code == 0
    generated = {case["name"]: case["generated"] for case in manifest_of(marked)["cases"]}
    assert generated["one-sentence"] == "staged before"
    assert record(snap, goldens, "--resume", *SMALL).code == 0
    assert contents(goldens) == contents(llama_set)
    assert not list(goldens.glob(".snap/*/*/cpu-float32"))


def test_a_recording_ends_with_the_command_that_checks_it(snap: Snap, tmp_path: Path) -> None:
    """It names the set if there are several."""
    options = ("--variants", 0, "--goldens", tmp_path)
    first = snap("record", "--checkpoint", LLAMA, *options).out.splitlines()[-1]
    second = snap("record", "--checkpoint", ROBERTA, *options).out.splitlines()[-1]
    line = f"snap check --fms-path CHECKOUT --goldens {tmp_path}"
    assert first.endswith(line)
    name = second.partition("--checkpoint ")[2].split()[0]
    assert snap("show", name, "--goldens", tmp_path).out.startswith("local/roberta at ")


def test_the_manifest_has_the_command_that_records_it_again(small: Path, tmp_path: Path) -> None:
    """With snap's version; in another process it gives the same bytes, the manifest's included."""
    entry = manifest_of(small)["history"][0]
    assert entry["snap"] == snapshot_tool.__version__
    words = shlex.split(entry["command"].replace("local/tiny-idefics3", str(CHECKPOINT)))
    assert words[:2] == ["snap", "record"]
    run = run_snap(*words[1:], "--goldens", tmp_path / "again")
    assert run.code == 0, run.err
    assert contents(tmp_path / "again") == contents(small)
    assert len(contents(small)) == 9


def test_fresh_throws_an_unfinished_recording_away(snap: Snap, llama_copy: Path) -> None:
    """Only if it is passed; and without an unfinished recording there is nothing to resume."""
    update = ("--update", "--reason", "x")
    nothing = record(snap, llama_copy, *update, "--resume")
    assert nothing.code == 2
    assert "there is no unfinished recording" in error_lines(nothing)[0]
    revision = set_folder(llama_copy).parent.name
    staging = llama_copy / ".snap" / "local--llama" / revision / "cpu-float32"
    (staging / "parts").mkdir(parents=True)
    (staging / "plan.json").write_text("{", encoding="utf-8")
    assert "is not a valid plan" in error_lines(record(snap, llama_copy, *update, "--resume"))[0]
    assert record(snap, llama_copy, *update, "--fresh").out.startswith("unchanged")


def test_a_second_recorder_is_refused_while_the_first_one_lives(
    snap: Snap, llama_copy: Path
) -> None:
    """One set, one recorder; the lock of a dead one does not count."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from snapshot_tool.goldens.layout import SetLocation\n"
        "from snapshot_tool.goldens.transaction import recording_lock\n"
        "location = SetLocation(Path(sys.argv[1]), 'local/llama', sys.argv[2], 'cpu', '')\n"
        "with recording_lock(location):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    revision = set_folder(llama_copy).parent.name
    command = [sys.executable, "-c", program, str(llama_copy), revision]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        second = record(snap, llama_copy, "--update", "--reason", "x")
        assert second.code == 3
        assert "another process is recording local/llama" in error_lines(second)[0]
        holder.kill()
    assert record(snap, llama_copy, "--update", "--reason", "x").code == 0


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["--checkpoint", "/nowhere"], 3, "checkpoint /nowhere"),
        (["--checkpoint", "docs"], 3, "checkpoint docs has no config.json"),
        (["--checkpoint", str(CHECKPOINT), "--revision", "0123456789"], 3, "not 0123456789"),
        (["--checkpoint", "owner/name"], 3, "cannot be resolved to a commit"),
        (["--checkpoint", str(CHECKPOINT), "--storage", "compact", "--oracle"], 2, "no oracle"),
        (["--device", "cuda"], 3, "finds no GPU"),
        (["--variants", "-1"], 2, "'--variants'"),
    ],
)
def test_what_cannot_be_recorded_says_why(
    snap: Snap, tmp_path: Path, options: list[str], code: int, problem: str
) -> None:
    """A clear message and nothing written."""
    run = snap("record", "--goldens", tmp_path / "goldens", *options)
    assert run.code == code
    assert problem in run.err
    if code == 3:
        error_lines(run)
    assert contents(tmp_path) == {}


def test_a_hub_checkpoint_is_recorded_at_the_commit_of_a_branch(snap: Snap, tmp_path: Path) -> None:
    """The branch is resolved and reported; the golden is kept, and checked again, by its commit."""
    files = {path.name: path.read_bytes() for path in LLAMA.iterdir()}
    goldens = tmp_path / "goldens"
    with serve_hub(files) as endpoint:
        run = snap(
            "record", "--checkpoint", REPOSITORY, "--revision", "main", "--goldens", goldens,
            *SMALL, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
    assert run.code == 0, run.err
    assert f"main is commit {COMMIT}" in run.err
    assert set_folder(goldens) == goldens / "owner--model" / COMMIT[:12] / "cpu-float32"
    checkpoint = manifest_of(goldens)["checkpoint"]
    assert (checkpoint["name"], checkpoint["revision"]) == (REPOSITORY, COMMIT)
    assert checkpoint["location"] is None
    # With the hub gone, the commit is found in the cache: what is lacking here is FMS alone.
    again = snap("check", "--goldens", goldens, HF_HOME=str(tmp_path / "home"))
    assert (again.code, "FMS is not installed here" in again.err) == (3, True)


def test_an_unwritable_goldens_folder_is_an_error_of_two_lines(snap: Snap, tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "goldens").write_text("", encoding="utf-8")
    run = record(snap, tmp_path / "goldens" / "inside", *SMALL)
    assert run.code == 3
    assert "cannot create" in error_lines(run)[0]


def test_only_recording_loads_transformers() -> None:
    """Even if it is installed, check and the others never import it."""
    program = (
        "import sys\n"
        "from snapshot_tool.cli import main\n"
        "for command in ('list', 'verify', 'doctor', 'check --phase vision'):\n"
        "    try:\n"
        "        main(command.split())\n"
        "    except SystemExit:\n"
        "        assert 'transformers' not in sys.modules, command\n"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_a_connector_can_be_recorded_without_the_vision_that_feeds_it(
    snap: Snap, tmp_path: Path
) -> None:
    """A set of one phase is whole."""
    goldens = tmp_path / "goldens"
    where = ("--checkpoint", CHECKPOINT, "--goldens", goldens)
    run = snap("record", *where, *SMALL, "--phase", "connector")
    assert run.code == 0, run.err
    names = {path.name for path in set_folder(goldens).iterdir()}
    parts = ("connector", "taps", "probes")
    assert names == {"manifest.json", *(f"{part}.safetensors" for part in parts)}
    assert snap("verify", "--goldens", goldens).code == 0


def on_a_terminal(goldens: Path, answers: str, *options: str) -> tuple[int, str]:
    """Record on a terminal where a person types; return the exit code and what was shown."""
    command = [sys.executable, "-m", "snapshot_tool", "record", "--checkpoint", str(LLAMA)]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*command, "--goldens", str(goldens), *options],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.write(ours, answers.encode())
        shown = b""
        # Linux ends a terminal whose other side is closed with an error, other systems with b"".
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown += data
    os.close(ours)
    return process.returncode, shown.decode()


def test_an_update_is_reviewed_before_it_is_written(snap: Snap, llama_copy: Path) -> None:
    """Without a terminal it is shown and not written; on a terminal the answer decides."""
    before = contents(llama_copy)
    longer = ("--max-new-tokens", "6")
    shown = record(snap, llama_copy, "--update", "--reason", "why not", *longer)
    assert shown.code == 3
    assert re.search(r"^generate +\d+ +\d+ +\d+  ", shown.out, re.MULTILINE)
    assert "tokens of one-sentence change from step 4:" in shown.out
    problem, remedy = error_lines(shown)
    assert "golden version 1 is unchanged; the new outputs are kept" in problem
    assert "--resume --update --yes --reason TEXT" in remedy
    assert contents(llama_copy) == before
    options = ("--resume", "--update", *longer)
    code, screen = on_a_terminal(llama_copy, "y\nlonger answers\n", *options)
    assert code == 0, screen
    assert "golden version 2? [y/N]" in screen
    (_, entry) = manifest_of(llama_copy)["history"]
    assert (entry["version"], entry["reason"]) == (2, "longer answers")
    moved, *tokens = entry["moved"]
    assert moved.startswith("generate: ")
    assert "tokens of one-sentence change from step 4" in tokens
    assert snap("verify", "--goldens", llama_copy).code == 0
