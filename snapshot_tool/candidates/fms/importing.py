"""Import FMS, the installed one or a checkout given by its folder, and name it."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.base.environment import package_version
from snapshot_tool.base.errors import CandidateUnavailable, describe_error, is_out_of_memory
from snapshot_tool.base.foreign_code import foreign_code

DISTRIBUTION = "ibm-fms"


@dataclass(frozen=True, slots=True)
class FmsSource:
    """Where the imported `fms` package came from.

    Args:
        path: the folder that holds the package.
        version: of a release that pip installed; "" for a checkout.
        commit: of a checkout; "" outside of git.
        dirty: whether the checkout has changes; None outside of git.
        changed: the files that do.
    """

    path: Path
    version: str
    commit: str
    dirty: bool | None
    changed: tuple[str, ...] = ()


def import_fms(fms_path: Path | None) -> FmsSource:
    """Import `fms.models` from the checkout at `fms_path`, or the installed FMS; return its source.

    Raises CandidateUnavailable if there is none, or if it cannot be imported.
    """
    if fms_path is not None:
        _put_first(fms_path)
    try:
        with foreign_code("FMS"):
            importlib.import_module("fms.models")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == "fms":
            raise CandidateUnavailable(
                "FMS is not installed here and no --fms-path was given",
                f"pip install --no-deps {DISTRIBUTION}, or pass --fms-path DIR",
            ) from error
        where = f"FMS at {fms_path}" if fms_path else "the installed FMS"
        remedy = "install what it needs, or repair the checkout"
        if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            remedy = "check it in the record environment, which has transformers"
        raise CandidateUnavailable(
            f"{where} cannot be imported: {describe_error(error)}", remedy
        ) from error
    package = Path(str(sys.modules["fms"].__file__)).resolve().parent
    if fms_path is not None and package.parent != fms_path.resolve():
        raise CandidateUnavailable(
            f"fms was imported from {package.parent} before --fms-path {fms_path} could be used",
            "run one FMS in one process",
        )
    return _source_of(package.parent)


def _put_first(fms_path: Path) -> None:
    if not (fms_path / "fms" / "__init__.py").is_file():
        inside = " (give the folder that holds fms/)" if fms_path.name == "fms" else ""
        raise CandidateUnavailable(
            f"--fms-path {fms_path} is not an FMS checkout: it has no fms/__init__.py{inside}",
            "pass the root of a foundation-model-stack checkout",
        )
    root = str(fms_path.resolve())
    if sys.path[:1] == [root]:  # imported before
        return
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    if not package_version(DISTRIBUTION):
        # fms/__init__.py reads the version of "ibm-fms", which a plain checkout does not have.
        sys.meta_path.append(_CheckoutFinder())


def _source_of(root: Path) -> FmsSource:
    # fms.__version__ is, for a checkout, that of whatever else is installed.
    for metadata in sorted(root.glob("ibm_fms-*.dist-info")):  # laid out by pip
        return FmsSource(root, importlib.metadata.Distribution.at(metadata).version, "", None)
    top, _, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").partition("\n")
    if top != str(root):
        return FmsSource(root, "", "", None)
    changes = _git(root, "status", "--porcelain", "--", "fms").splitlines()
    changed = tuple(line.split(maxsplit=1)[-1] for line in changes)
    return FmsSource(root, "", commit, bool(changed), changed)


def _git(root: Path, *arguments: str) -> str:
    """Return the output of git for a folder, or "" if git fails or is not installed."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), *arguments],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


class _CheckoutDistribution(importlib.metadata.Distribution):
    """The metadata of a plain checkout."""

    def read_text(self, filename: str) -> str | None:
        """Return the only file that there is."""
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 0+checkout\n"

    def locate_file(self, path: Any) -> Any:
        """Return the path as it is: there are no files to locate."""
        return Path(path)


class _CheckoutFinder(importlib.metadata.DistributionFinder):
    """Finds metadata of "ibm-fms" if it is not installed; it finds no modules."""

    def find_spec(self, *_arguments: Any) -> None:
        """Find no module."""

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the stand-in for FMS's distribution, and nothing for other names."""
        name = context.name if context else None
        return [_CheckoutDistribution()] if name in (None, DISTRIBUTION) else []
