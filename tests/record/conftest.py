"""Golden sets that several test files read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.record.checkpoints import IDEFICS3, LLAMA, record_here

# transformers copies trusted code there; it reads the variable when it is imported.
_HOME = TemporaryDirectory(prefix="hf-home-")
os.environ["HF_HOME"] = _HOME.name


@pytest.fixture(scope="session")
def llama_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a small set of the tiny Llama."""
    goldens = tmp_path_factory.mktemp("llama") / "goldens"
    record_here(LLAMA, goldens)
    return goldens


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a small set of the embedded checkpoint."""
    goldens = tmp_path_factory.mktemp("small") / "goldens"
    record_here(IDEFICS3, goldens)
    return goldens


@pytest.fixture
def llama_copy(llama_set: Path, tmp_path: Path) -> Path:
    """Copy the Llama's set, to be changed."""
    return Path(shutil.copytree(llama_set, tmp_path / "goldens"))


@pytest.fixture
def small_copy(small: Path, tmp_path: Path) -> Path:
    """Copy the embedded checkpoint's set, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "goldens"))
