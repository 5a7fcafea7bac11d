"""Importing FMS, the installed one or a checkout given by its folder, and saying which it is."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot_tool.base.environment import package_version
from snapshot_tool.base.errors import CandidateUnavailable, is_out_of_memory
from snapshot_tool.base.foreign_code import foreign_code

DISTRIBUTION = "ibm-fms"


@dataclass(frozen=True, slots=True)
class FmsSource:
    """Where the imported `fms` package came from."""

    path: Path
    version: str
    commit: str
    dirty: bool | None


def import_fms(fms_path: Path | None) -> FmsSource:
    """Import FMS, and say which it is; see `import_models`."""
    return _describe(import_models(fms_path))


def import_models(fms_path: Path | None) -> Path:
    """Import `fms.models`, from the checkout at `fms_path` before an installed one.

    Returns the folder of the package. torch's compiler comes with it: FMS asks for it when it
    builds a model and when it generates, in the midst of what is timed.
    """
    if fms_path is not None:
        _put_first(fms_path)
    try:
        with foreign_code("FMS"):
            importlib.import_module("fms.models")
    except ModuleNotFoundError as error:
        if error.name == "fms":
            raise CandidateUnavailable(
                "FMS is not installed here and no --fms-path was given",
                f"pip install --no-deps {DISTRIBUTION}, or pass --fms-path DIR",
            ) from error
        raise _broken(fms_path, error) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _broken(fms_path, error) from error
    # Not in there: what is wrong with it, want of memory say, is no fault of FMS.
    importlib.import_module("torch._dynamo")
    package = Path(str(sys.modules["fms"].__file__)).resolve().parent
    if fms_path is not None and package.parent != fms_path.resolve():
        raise CandidateUnavailable(
            f"fms was imported from {package.parent} before --fms-path {fms_path} could be used",
            "run one FMS in one process",
        )
    return package


def _put_first(fms_path: Path) -> None:
    if not (fms_path / "fms" / "__init__.py").is_file():
        inside = " (give the folder that holds fms/)" if fms_path.name == "fms" else ""
        raise CandidateUnavailable(
            f"--fms-path {fms_path} is no FMS: it has no fms/__init__.py{inside}",
            "pass the root of a foundation-model-stack checkout",
        )
    root = str(fms_path.resolve())
    if sys.path[:1] == [root]:  # it was imported before
        return
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    if not package_version(DISTRIBUTION):
        # fms/__init__.py asks for the version of "ibm-fms", which a plain checkout does not have.
        sys.meta_path.append(_CheckoutFinder())


def _broken(fms_path: Path | None, error: Exception) -> CandidateUnavailable:
    where = f"FMS at {fms_path}" if fms_path else "the installed FMS"
    return CandidateUnavailable(
        f"{where} cannot be imported: {type(error).__name__}: {error}",
        "install what it needs, or repair the checkout",
    )


def _describe(package: Path) -> FmsSource:
    """Name an FMS by its git commit, or by the version of the metadata beside it.

    `fms.__version__` is no help: for a checkout it is that of whatever else is installed.
    """
    root = package.parent
    if release := _release(root):
        return FmsSource(root, release, "", None)
    top, _, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").partition("\n")
    if top == str(root):
        return FmsSource(root, "", commit, _git(root, "status", "--porcelain", "--", "fms") != "")
    return FmsSource(root, "", "", None)


def _release(root: Path) -> str:
    """Return the version of an ibm-fms that pip laid out in a folder, or ""."""
    found = sorted(root.glob("ibm_fms-*.dist-info"))
    return importlib.metadata.Distribution.at(found[0]).version if found else ""


def _git(root: Path, *arguments: str) -> str:
    """Return what git says of a folder, or "" where it says nothing or is not there."""
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
    """The metadata of a plain checkout: a name and the version that says what it is."""

    def read_text(self, filename: str) -> str | None:
        """Return the one file that there is."""
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: 0+checkout\n"

    def locate_file(self, path: Any) -> Any:
        """Return a path as it is: there are no files to locate."""
        return Path(path)


class _CheckoutFinder(importlib.metadata.DistributionFinder):
    """Answers for "ibm-fms" where it is not installed."""

    def find_spec(self, *_arguments: Any) -> None:
        """Find no module: this finder knows metadata alone."""
        return

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the stand-in for FMS's distribution, and none for other names."""
        return self._matching(context.name if context else None)

    def _matching(self, name: str | None) -> Iterator[importlib.metadata.Distribution]:
        if name in (None, DISTRIBUTION):
            yield _CheckoutDistribution()
