"""Fixtures of the tests that fork processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch


def memory_folder() -> str | None:
    """Return a folder in memory, if there is one with room: nothing here needs a disk."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 2**30 else None


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Have temporary folders in memory: hundreds of sets are written, and each is synced."""
    with TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Have no threads where processes are forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
