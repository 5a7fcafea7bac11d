"""How the process of `snap` ends: at once, but never with anything left undone."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python ends as always")

PROGRAM = """
import atexit, sys
{before}
from snapshot_tool.cli.ending import Ending

class Loud:
    def __del__(self):
        sys.stdout.write("taken apart\\n")

ending = Ending()
atexit.register(sys.stdout.write, "registered\\n")
sys.modules["torch"] = None  # as if it had been imported: without it, nothing takes long
loud = Loud()
sys.stdout.write("told\\n")
{more}
ending.code = 7
sys.exit(7)
"""


def end(
    more: str = "", *, before: str = "", passed: Sequence[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program that ends as `snap` does, with code 7, after `more`."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(more=more, before=before)],
        capture_output=True,
        text=True,
        check=False,
        pass_fds=passed,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )


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
        ended = end(passed=[file.fileno()])
    assert (ended.returncode, ended.stdout) == (7, "told\nregistered\n")


def test_what_was_printed_past_sys_stdout_comes_out() -> None:
    """By C, and by the stream that a candidate put another one in the place of."""
    c = end("import ctypes; ctypes.CDLL(None).printf(b'by C\\n')")
    assert sorted(c.stdout.splitlines()) == ["by C", "registered", "told"]
    replaced = end("import io; sys.stdout = io.StringIO()")
    assert replaced.stdout == "told\nregistered\n"
    assert (c.returncode, replaced.returncode) == (7, 7)


def test_where_the_c_library_cannot_be_asked_python_ends_as_always() -> None:
    """Whoever prints by C has it flushed then."""
    ended = end(
        "import ctypes; ctypes.CDLL(None).printf(b'by C\\n')\n"
        "from snapshot_tool import c_library; c_library.function_of_c = lambda name: None"
    )
    assert sorted(ended.stdout.splitlines()) == ["by C", "registered", "taken apart", "told"]
    assert (ended.returncode, ended.stderr) == (7, "")


def test_output_that_nobody_takes_is_told_by_python() -> None:
    """A full disk: the code is Python's own, not that of a check that passed."""
    ended = end("sys.stdout = open('/dev/full', 'w'); print('lost')")
    assert ended.returncode == 120
    assert "No space left on device" in ended.stderr


def test_a_stream_of_a_candidates_own_is_no_trouble() -> None:
    """It has what print needs, and no more."""
    tee = "sys.stdout = type('Tee', (), {'write': sys.stdout.write, 'flush': sys.stdout.flush})()"
    ended = end(tee)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "told\nregistered\n", "")


def test_what_others_registered_before_runs_as_well() -> None:
    """Coverage of a subprocess, say: its tool was imported with Python."""
    ended = end(before="atexit.register(print, 'measured')")
    assert ended.stdout == "told\nregistered\nmeasured\ntaken apart\n"


def test_without_torch_python_ends_as_always() -> None:
    """What takes no time is left as it is."""
    assert end("del sys.modules['torch']").stdout.endswith("taken apart\n")
