"""Loading torch's library on a thread of its own, and what is imported meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

MAPPED = "any('libtorch_cpu.so' in line for line in open('/proc/self/maps'))"


def _run(code: str, *, path: Path | None = None) -> str:
    """Return what a process that has not imported torch prints."""
    first = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else "import sys\n"
    command = [sys.executable, "-c", f"{first}from snapshot_tool.torch_library import *\n{code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _fake_torch(folder: Path, *libraries: str) -> Path:
    """Write a package that has libraries which are none."""
    (folder / "torch" / "lib").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    for name in libraries:
        (folder / "torch" / "lib" / name).write_text("no library", encoding="utf-8")
    return folder


def test_the_library_is_loaded_without_importing_torch() -> None:
    """And torch works with it afterwards, on the other thread."""
    told = _run(
        "from threading import Thread\n"
        "thread = Thread(target=load_library)\n"
        "thread.start(); thread.join()\n"
        f"print({MAPPED}, 'torch' in sys.modules)\n"
        "import torch\n"
        "print(torch.ones(1000, 1000).matmul(torch.ones(1000, 2)).sum().item())"
    )
    of_cpu = torch.version.cuda is None and torch.version.hip is None
    assert told.split() == [str(of_cpu), "False", "2000000.0"]


def test_what_is_imported_meanwhile_waits_for_no_library() -> None:
    """The system's loader serves one at a time: an extension module would wait for torch's."""
    told = _run(
        "import snapshot_tool.opening\n"
        "from importlib.machinery import EXTENSION_SUFFIXES\n"
        "before = set(sys.modules)\n"
        "import_meanwhile()\n"
        "new = [sys.modules[name] for name in set(sys.modules) - before]\n"
        "files = [str(getattr(module, '__file__', '')) for module in new]\n"
        "print(len(new) > 100, [f for f in files if f.endswith(tuple(EXTENSION_SUFFIXES))])"
    )
    assert told == "True []"


def test_a_torch_for_gpus_loads_its_libraries_itself(tmp_path: Path) -> None:
    """It finds them in an order of its own."""
    seen = (
        "import snapshot_tool.torch_library as library\n"
        "library.function_of_c = lambda name: lambda *given: print(name, *given)\n"
        "load_library()"
    )
    assert "libtorch_cpu.so" in _run(seen, path=_fake_torch(tmp_path / "cpu", "libtorch_cpu.so"))
    both = _fake_torch(tmp_path / "gpu", "libtorch_cpu.so", "libtorch_cuda.so")
    assert _run(seen, path=both) == ""
    assert _run(f"import torch\n{seen}", path=tmp_path / "cpu") == ""


@pytest.mark.parametrize("libraries", [(), ("libtorch_cpu.so",)])
def test_a_library_that_cannot_be_loaded_is_left_to_the_import(
    tmp_path: Path, libraries: tuple[str, ...]
) -> None:
    """Who imports torch is told what is wrong."""
    told = _run(f"load_library(); print({MAPPED})", path=_fake_torch(tmp_path, *libraries))
    assert told == "False"
