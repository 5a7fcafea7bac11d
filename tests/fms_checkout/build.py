"""Build an FMS checkout with idefics3: the installed `fms`, fms.patch, the overlay, and a commit.

    python tests/fms_checkout/build.py [--out build/fms-checkout]

Run it with a Python that has ibm-fms. The result looks like a checkout of foundation-model-stack
on a branch with idefics3, for `--fms-path`. It is built again only if the overlay, the patch, this
script or the installed FMS changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
OVERLAY = HERE / "overlay"
PATCH = HERE / "fms.patch"
STAMP = ".overlay-digest"

PYPROJECT = """\
[project]
name = "ibm-fms"
version = "0"
description = "foundation-model-stack {version} with idefics3, laid out for tests"
"""

# Fixed, so that the same content has the same commit.
IDENTITY = {
    "GIT_AUTHOR_NAME": "fms-checkout",
    "GIT_AUTHOR_EMAIL": "fms-checkout@localhost",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "fms-checkout",
    "GIT_COMMITTER_EMAIL": "fms-checkout@localhost",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def installed_fms() -> Path:
    """Return the folder of the installed package."""
    try:
        found = importlib.metadata.distribution("ibm-fms").locate_file("fms")
    except importlib.metadata.PackageNotFoundError:
        sys.exit("no ibm-fms in this environment: pip install --no-deps ibm-fms")
    return Path(str(found))


def digest() -> str:
    """Return a digest of all that the checkout is made of."""
    total = hashlib.sha256(importlib.metadata.version("ibm-fms").encode())
    for path in sorted([Path(__file__), PATCH, *OVERLAY.rglob("*.py")]):
        total.update(path.read_bytes())
    return total.hexdigest()


def git(root: Path, *arguments: str) -> None:
    """Run git in a checkout, independent of the user's configuration."""
    command = ["git", "-C", str(root), *arguments]
    subprocess.run(command, check=True, env={**os.environ, **IDENTITY})


def lay_out(root: Path, stamp: str) -> None:
    """Fill an empty folder with the checkout; fail if FMS no longer has what the patch changes."""
    shutil.copytree(
        installed_fms(), root / "fms", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    shutil.copytree(OVERLAY, root, dirs_exist_ok=True)
    version = importlib.metadata.version("ibm-fms")
    (root / "pyproject.toml").write_text(PYPROJECT.format(version=version), encoding="utf-8")
    (root / ".gitignore").write_text(f"__pycache__/\n{STAMP}\n", encoding="utf-8")
    git(root, "init", "--quiet", "--initial-branch=idefics3")
    git(root, "apply", str(PATCH))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "Add idefics3")
    (root / STAMP).write_text(stamp, encoding="utf-8")


def build(out: Path) -> None:
    """Build the checkout unless it is current; never leave half of one."""
    stamp = digest()
    if (out / STAMP).is_file() and (out / STAMP).read_text(encoding="utf-8") == stamp:
        print(f"{out} is current")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".fms-checkout-") as staging:
        root = Path(staging) / "checkout"
        root.mkdir()
        lay_out(root, stamp)
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)
    print(f"built {out}")


def main() -> None:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/fms-checkout"))
    build(parser.parse_args().out)


if __name__ == "__main__":
    main()
