"""How the process of `snap` ends: at once, but never with anything left undone."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python ends as always")

PROGRAM = """
import atexit, sys
from snapshot_tool.cli.ending import Ending

class Loud:
    def __del__(self):
        sys.stdout.write("taken apart\\n")

ending = Ending()
atexit.register(sys.stdout.write, "registered\\n")
loud = Loud()
sys.stdout.write("told\\n")
{more}
ending.code = 7
sys.exit(7)
"""


def end(more: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program that ends as `snap` does, with code 7, after `more`."""
    command = [sys.executable, "-c", PROGRAM.format(more=more)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_process_ends_with_its_code_and_is_not_taken_apart() -> None:
    """What was written, and what is registered to run at exit, comes first."""
    ended = end()
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "told\nregistered\n", "")


def test_a_file_that_nobody_closed_holds_what_was_written(tmp_path: Path) -> None:
    """A candidate's log: Python writes it when it takes itself apart."""
    log = tmp_path / "log"
    ended = end(f"log = open({str(log)!r}, 'w'); log.write('the last line')")
    assert (ended.returncode, log.read_text(encoding="utf-8")) == (7, "the last line")
    assert ended.stdout.endswith("taken apart\n")


def test_a_file_that_is_only_read_and_the_null_device_hold_nothing_up() -> None:
    """Golden files stay open to the end, and torch opens the null device."""
    ended = end("import os; read, null = open('/proc/self/stat'), open(os.devnull, 'w')")
    assert (ended.returncode, ended.stdout) == (7, "told\nregistered\n")


def test_a_descriptor_that_the_caller_left_open_holds_nothing_up(tmp_path: Path) -> None:
    """A shell's own: nothing of ours is in it."""
    with (tmp_path / "shells").open("w") as file:
        command = [sys.executable, "-c", PROGRAM.format(more="")]
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, pass_fds=[file.fileno()]
        )
    assert (ended.returncode, ended.stdout) == (7, "told\nregistered\n")


def test_output_that_nobody_takes_is_told_by_python() -> None:
    """A full disk: the code is Python's own, not that of a check that passed."""
    program = PROGRAM.format(more="sys.stdout = open('/dev/full', 'w'); print('lost')")
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 120
    assert "No space left on device" in ended.stderr
