"""`snap record` with the real Hugging Face stack: bytes, recipes, resuming, replacing, refusing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKPOINT, GOLDENS, ROOT, Run, Snap, error_lines, set_folder
from tests.unit.hub import COMMIT, REPOSITORY, serve_hub

pytestmark = pytest.mark.record

SMALL = ("--variants", "2", "--max-new-tokens", "4")


def record(snap: Snap, goldens: Path, *options: object) -> Run:
    """Record the embedded checkpoint."""
    return snap("record", "--checkpoint", CHECKPOINT, "--goldens", goldens, *options)


def contents(goldens: Path) -> dict[str, bytes]:
    """Return every file of the golden sets, by relative path."""
    return {
        path.relative_to(goldens).as_posix(): path.read_bytes()
        for path in sorted(goldens.rglob("*"))
        if path.is_file() and ".snap" not in path.parts
    }


def manifest_of(goldens: Path) -> Any:
    """Return the one set's manifest."""
    return json.loads((set_folder(goldens) / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(snap: Snap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a small set once."""
    goldens = tmp_path_factory.mktemp("small") / "goldens"
    run = record(snap, goldens, *SMALL)
    assert run.code == 0, run.err
    return goldens


@pytest.fixture
def small_copy(small: Path, tmp_path: Path) -> Path:
    """Copy the small set, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "goldens"))


def test_the_committed_goldens_are_what_the_reference_says(snap: Snap, tmp_path: Path) -> None:
    """Recorded again from their recipes, they are the same, within the processor's rounding."""
    shutil.copytree(GOLDENS, tmp_path / "goldens", ignore=shutil.ignore_patterns(".snap"))
    run = record(snap, tmp_path / "goldens", "--update", "--reason", "again", "--yes")
    assert run.code == 0, run.err
    if run.out.startswith("unchanged"):
        assert contents(tmp_path / "goldens") == contents(GOLDENS)
        return
    # Another processor rounds differently; nothing may move beyond tolerance.
    version = manifest_of(GOLDENS)["golden_version"]
    assert manifest_of(tmp_path / "goldens")["golden_version"] == version + 1
    diff = snap("diff", set_folder(GOLDENS), set_folder(tmp_path / "goldens"))
    assert diff.code == 0, diff.out


def test_the_compact_goldens_are_what_the_reference_says(snap: Snap, tmp_path: Path) -> None:
    """Recorded again, in the storage that they have: the same, within the processor's rounding."""
    source = ROOT / "tests" / "compact-goldens"
    shutil.copytree(source, tmp_path / "goldens", ignore=shutil.ignore_patterns(".snap"))
    run = record(snap, tmp_path / "goldens", "--update", "--reason", "again", "--yes")
    assert run.code == 0, run.err
    assert manifest_of(tmp_path / "goldens")["storage"] == "compact"
    if run.out.startswith("unchanged"):
        return
    diff = snap("diff", set_folder(source), set_folder(tmp_path / "goldens"))
    assert diff.code == 0, diff.out


def test_a_compact_set_has_no_oracle(snap: Snap, tmp_path: Path) -> None:
    """It belongs to whole tensors: refused in a line, not left out."""
    run = record(snap, tmp_path / "goldens", "--storage", "compact", "--oracle")
    assert run.code == 2
    assert "a compact golden set has no oracle" in error_lines(run)[0]


def test_recording_twice_gives_the_same_bytes(snap: Snap, tmp_path: Path) -> None:
    """Every file, the manifest included, on the same day on the same machine."""
    today = str(int(time.time()))
    for name in ("one", "two"):
        run = snap(
            "record", "--checkpoint", CHECKPOINT, "--goldens", tmp_path / name, *SMALL,
            "--seed", 5, SOURCE_DATE_EPOCH=today,
        )  # fmt: skip
        assert run.code == 0, run.err
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 8


def test_another_seed_draws_other_variants(snap: Snap, small: Path, tmp_path: Path) -> None:
    """The fixed cases stay, the variants change."""
    run = record(snap, tmp_path / "goldens", *SMALL, "--seed", 7)
    assert run.code == 0
    recipes = [
        {case["name"]: case["recipe"] for case in manifest_of(goldens)["cases"]}
        for goldens in (small, tmp_path / "goldens")
    ]
    names = ["one-image", "two-images", "variant-01", "variant-02", "end-token"]
    assert list(recipes[0]) == names
    same = {name for name in recipes[0] if recipes[0][name] == recipes[1][name]}
    assert same == {"one-image", "two-images", "end-token"}


def test_recording_over_a_golden_needs_update_and_a_reason(snap: Snap, small_copy: Path) -> None:
    """Nothing is lost by a second `snap record`."""
    before = contents(small_copy)
    again = record(snap, small_copy, *SMALL)
    assert again.code == 3
    assert "is recorded already in" in error_lines(again)[0]
    assert "--update --reason TEXT" in error_lines(again)[1]
    no_reason = record(snap, small_copy, "--update")
    assert (no_reason.code, "--update needs --reason" in no_reason.err) == (2, True)
    assert contents(small_copy) == before


def test_an_update_that_changes_nothing_makes_no_new_version(snap: Snap, small_copy: Path) -> None:
    """Cases come from the stored recipes, and equal bytes are no update."""
    before = contents(small_copy)
    run = record(snap, small_copy, "--update", "--reason", "try")
    assert run.code == 0
    assert run.out.startswith("unchanged: ")
    assert contents(small_copy) == before


def test_one_phase_can_be_recorded_again_alone(snap: Snap, small_copy: Path) -> None:
    """The files of the other phases stay as they were."""
    before = contents(small_copy)
    options = ("--phase", "generate", "--max-new-tokens", 6, "--yes")
    run = record(snap, small_copy, "--update", "--reason", "tokens", *options)
    assert run.code == 0, run.err
    after = contents(small_copy)
    changed = {name.rpartition("/")[2] for name in before if before[name] != after[name]}
    assert changed == {"generate.safetensors", "manifest.json"}
    assert snap("verify", "--goldens", small_copy).code == 0


def test_a_killed_recording_leaves_the_old_set_and_can_be_resumed(
    snap: Snap, tmp_path: Path
) -> None:
    """Killed amid its cases, it goes on where it stopped, to the same bytes."""
    goldens = tmp_path / "goldens"
    options = ["--checkpoint", str(CHECKPOINT), "--goldens", str(goldens), *SMALL]
    command = [sys.executable, "-m", "snapshot_tool", "record", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    parts = goldens / ".snap"
    deadline = time.monotonic() + 120
    while not list(parts.glob("*/*/*/parts/one-image/generate.safetensors")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
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
    (staged,) = marked.glob(".snap/*/*/*/parts/one-image/generate.txt")
    staged.write_text("staged before the kill", encoding="utf-8")
    assert record(snap, marked, "--resume", *SMALL).code == 0
    manifest = json.loads((set_folder(marked) / "manifest.json").read_text(encoding="utf-8"))
    generated = {case["name"]: case["generated"] for case in manifest["cases"]}
    assert generated["one-image"] == "staged before the kill"
    resumed = record(snap, goldens, "--resume", *SMALL)
    assert resumed.code == 0, resumed.err
    fresh = record(snap, tmp_path / "fresh", *SMALL)
    assert fresh.code == 0
    assert contents(goldens) == contents(tmp_path / "fresh")
    assert not list(parts.glob("*/*/cpu-float32"))


def test_fresh_throws_an_unfinished_recording_away(snap: Snap, small_copy: Path) -> None:
    """Only when asked for; and there is nothing to resume where nothing is unfinished."""
    nothing = record(snap, small_copy, "--update", "--reason", "x", "--resume")
    assert nothing.code == 2
    assert "there is no unfinished recording" in error_lines(nothing)[0]
    revision = set_folder(small_copy).parent.name
    staging = small_copy / ".snap" / "local--tiny-idefics3" / revision / "cpu-float32"
    (staging / "parts").mkdir(parents=True)
    (staging / "plan.json").write_text("{", encoding="utf-8")
    run = record(snap, small_copy, "--update", "--reason", "x", "--fresh")
    assert run.code == 0, run.err
    assert run.out.startswith("unchanged")


def test_a_second_recorder_is_told_to_wait(snap: Snap, small_copy: Path) -> None:
    """One set, one recorder; the lock of a dead one does not count."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from snapshot_tool.goldens.layout import SetLocation\n"
        "from snapshot_tool.goldens.transaction import recording_lock\n"
        "location = SetLocation(Path(sys.argv[1]), 'local/tiny-idefics3', sys.argv[2], 'cpu', '')\n"
        "with recording_lock(location):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    revision = set_folder(small_copy).parent.name
    command = [sys.executable, "-c", program, str(small_copy), revision]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        second = record(snap, small_copy, "--update", "--reason", "x")
        assert second.code == 3
        assert "another process is recording local/tiny-idefics3" in error_lines(second)[0]
        holder.kill()
    assert record(snap, small_copy, "--update", "--reason", "x").code == 0


def test_inputs_that_the_reference_refuses_are_drawn_again_and_counted(snap: Snap) -> None:
    """The committed goldens' draws met refusals, and have all their variants all the same."""
    draws = json.loads(snap("show", "--json").out)["draws"]
    assert draws["refused"] == sum(draws["reasons"].values()) > 0
    assert "ValueError: Unable to infer channel dimension format" in draws["reasons"]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        (["--checkpoint", "/nowhere"], 3, "checkpoint /nowhere is no folder here"),
        (["--checkpoint", "docs"], 3, "checkpoint docs has no config.json"),
        (["--checkpoint", str(CHECKPOINT), "--revision", "0123456789"], 3, "not 0123456789"),
        (["--checkpoint", "owner/name"], 2, "--revision is needed for owner/name"),
        (["--checkpoint", "owner/name", "--revision", "main"], 3, "offline mode is on"),
        (["--revision", "0" * 40], 3, "HuggingFaceTB/SmolVLM-256M-Instruct at 0000"),
        (["--device", "cuda"], 3, "sees no GPU here"),
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
    """The branch is resolved and said; the golden is kept, and checked again, by its commit."""
    files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
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


def test_a_checkpoint_with_a_missing_weight_is_refused(snap: Snap, tmp_path: Path) -> None:
    """Transformers would go on with a random one."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.text_model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = snap("record", "--checkpoint", folder, "--goldens", tmp_path / "goldens")
    assert run.code == 3
    assert "does not have: model.text_model.norm.weight" in error_lines(run)[0]


def test_an_unwritable_goldens_folder_is_an_error_of_two_lines(snap: Snap, tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "goldens").write_text("", encoding="utf-8")
    run = record(snap, tmp_path / "goldens" / "inside", *SMALL)
    assert run.code == 3
    assert "cannot create" in error_lines(run)[0]


def test_only_the_reference_loads_transformers_when_recording_is_not_asked_for() -> None:
    """Even where it is installed, check and the others never import it."""
    program = (
        "import sys\n"
        "from snapshot_tool.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'transformers' not in sys.modules\n"
    )
    for arguments in (["list"], ["verify"], ["doctor"], ["check", "--phase", "vision"]):
        answer = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "AssertionError" not in answer.stderr, arguments


def test_a_golden_of_one_phase_alone_says_what_is_missing(snap: Snap, tmp_path: Path) -> None:
    """A connector without the vision features that feed it can be recorded, and is whole."""
    goldens = tmp_path / "goldens"
    run = record(snap, goldens, *SMALL, "--phase", "connector")
    assert run.code == 0, run.err
    names = {path.name for path in set_folder(goldens).iterdir()}
    assert names == {"connector.safetensors", "taps.safetensors", "manifest.json"}
    assert snap("verify", "--goldens", goldens).code == 0


def on_a_terminal(goldens: Path, answers: str, *options: str) -> tuple[int, str]:
    """Record on a terminal where a person types; return the exit code and what was shown."""
    command = [sys.executable, "-m", "snapshot_tool", "record", "--checkpoint", str(CHECKPOINT)]
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


def test_an_update_is_reviewed_before_it_is_written(snap: Snap, small_copy: Path) -> None:
    """Where nobody can be asked it is shown and not written; on a terminal the answer decides."""
    before = contents(small_copy)
    longer = ("--max-new-tokens", "6")
    shown = record(snap, small_copy, "--update", "--reason", "why not", *longer)
    assert shown.code == 3
    assert re.search(r"^generate +\d+ +\d+ +\d+  ", shown.out, re.MULTILINE)
    assert "tokens of one-image change from step 4:" in shown.out
    problem, remedy = error_lines(shown)
    assert "golden version 1 stays as it is; the new answers are kept" in problem
    assert "--resume --update --yes --reason TEXT" in remedy
    assert contents(small_copy) == before
    options = ("--resume", "--update", *longer)
    code, screen = on_a_terminal(small_copy, "y\nlonger answers\n", *options)
    assert code == 0, screen
    assert "golden version 2? [y/N]" in screen
    (_, entry) = manifest_of(small_copy)["history"]
    assert (entry["version"], entry["reason"]) == (2, "longer answers")
    moved, *tokens = entry["moved"]
    assert moved.startswith("generate: ")
    assert "tokens of one-image change from step 4" in tokens
    assert snap("verify", "--goldens", small_copy).code == 0
