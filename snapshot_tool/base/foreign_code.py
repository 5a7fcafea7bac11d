"""Run code that is not snap's: ending the process is an error, changes to the process are undone.

A candidate's file, a factory, a phase and all that they import may call sys.exit, change the
working folder, close standard output or leave an exit handler behind. None of it may end a check
without a verdict, or send its report elsewhere.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from snapshot_tool.base.errors import EndedProcess

_STREAMS = {"stdout": 1, "stderr": 2}


class _State:
    """Whether foreign code is running in this process, and the folder that it moved to."""

    running = False
    folder = ""  # "": none


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Run code that is not snap's inside the block; `what` names it in errors.

    Its output goes to standard error, sys.argv has no arguments, and its working folder is kept
    from block to block.

    Raises EndedProcess if the code tries to end the process, or raises something that is not an
    Exception. KeyboardInterrupt is raised only if the user has interrupted.
    """
    if _State.running:  # foreign code that calls snap
        yield
        return
    _State.running = True
    folder, arguments = _working_folder(), sys.argv[:]
    interrupts = _Interrupts()
    try:
        sys.argv[:] = sys.argv[:1]
        _change_folder(_State.folder)
        with _streams_kept(), interrupts, _no_exits(what), redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt as error:
        if interrupts.seen:
            raise
        raise EndedProcess(f"{what} raised KeyboardInterrupt") from error
    except SystemExit as error:
        raise EndedProcess(f"{what} ended the process: sys.exit({error.code!r})") from error
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        raise EndedProcess(f"{what} raised {type(error).__name__}: {error}") from error
    finally:
        _State.running = False
        now = _working_folder()
        _State.folder = now if now != folder else ""
        _change_folder(folder)
        sys.argv[:] = arguments
    if interrupts.seen:  # foreign code caught it
        raise KeyboardInterrupt


class _Interrupts:
    """Notes whether the user interrupts, and puts back every signal handler."""

    def __init__(self) -> None:
        self.seen = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's
        self._handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        if callable(previous := self._handlers.get(signal.SIGINT)):

            def note(number: int, frame: FrameType | None) -> None:
                self.seen = True
                previous(number, frame)

            signal.signal(signal.SIGINT, note)

    def __exit__(self, *_raised: object) -> None:
        for number, handler in self._handlers.items():
            # None: not set from Python, and nothing to put back.
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


@contextmanager
def _no_exits(what: str) -> Iterator[None]:
    """Let os._exit and os.exec raise, in the block and in exit handlers that it registers.

    Both end the process at once, with a code of the caller's choice.
    """
    originals = {name: getattr(os, name) for name in ("_exit", "execv", "execve")}
    register, process = atexit.register, os.getpid()

    def refuse(name: str, *given: Any) -> NoReturn:
        if os.getpid() != process:  # a child of fork may end as it likes
            originals[name](*given)
        raise EndedProcess(f"{what} ended the process: os.{name}({given[0]!r})")

    def register_harmless(
        function: Callable[..., Any], /, *given: Any, **options: Any
    ) -> Callable[..., Any]:
        register(functools.partial(_run_at_exit, what, function), *given, **options)
        return function

    for name in originals:
        setattr(os, name, functools.partial(refuse, name))
    atexit.register = register_harmless
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        atexit.register = register


def _run_at_exit(what: str, function: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Run an exit handler of foreign code, which must not change the exit code."""
    with contextlib.suppress(EndedProcess, SystemExit), _no_exits(what):
        function(*given, **options)


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it was removed
        return ""


def _change_folder(folder: str) -> None:
    if folder:
        with contextlib.suppress(OSError):
            os.chdir(folder)


@contextmanager
def _streams_kept() -> Iterator[None]:
    """Put standard output and error back after the block, and open them if they were closed."""
    streams = {name: getattr(sys, name) for name in _STREAMS}
    copies: dict[int, int] = {}
    for number in _STREAMS.values():
        with contextlib.suppress(OSError):  # closed by whoever started us
            copies[number] = os.dup(number)
    try:
        yield
    finally:
        for name, stream in streams.items():
            number = _STREAMS[name]
            copy = copies.get(number)
            if copy is not None and not _is_same_file(number, copy):
                os.dup2(copy, number)
            setattr(sys, name, stream)
            if copy is not None and getattr(stream, "closed", False):
                reopened = os.fdopen(os.dup(copy), "w", encoding="utf-8", errors="replace")
                setattr(sys, name, reopened)
        for copy in copies.values():
            os.close(copy)


def _is_same_file(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False
