"""Releases of FMS from PyPI, each in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def install(version: str, folder: Path) -> Path:
    """Install a release of FMS by itself into a folder, if it is not there yet."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(part), f"ibm-fms=={version}"], check=True)
        part.rename(folder)
    return folder
