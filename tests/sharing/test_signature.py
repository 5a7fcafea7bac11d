"""`snap push --sign` and `snap pull --require-signer`: keys of ssh-keygen, no network."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from snapshot_tool.goldens.lock import lock_path, signature_path
from tests.conftest import Snap, error_lines
from tests.unit.factory import write_golden


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Make a key pair as a user does; return the private one."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Make a key pair; the public one has the suffix .pub."""
    return make_key(tmp_path / "key")


@pytest.fixture
def other(snap: Snap, tmp_path: Path, key: Path) -> Path:
    """Push a signed golden set; return the goldens folder of another checkout with its lock."""
    goldens, elsewhere = tmp_path / "goldens", tmp_path / "other" / "goldens"
    write_golden(goldens)
    run = snap("push", f"file://{tmp_path}/remote", "--goldens", goldens, "--sign", key)
    assert run.code == 0, run.err
    elsewhere.parent.mkdir()
    for path in (lock_path(goldens), signature_path(lock_path(goldens))):
        shutil.copy(path, elsewhere.parent)
    return elsewhere


def test_what_was_signed_is_pulled(snap: Snap, other: Path, key: Path) -> None:
    """The public key is enough."""
    key.unlink()
    run = snap("pull", "--goldens", other, "--require-signer", f"{key}.pub")
    assert run.code == 0, run.err
    assert snap("verify", "--goldens", other).code == 0


def test_what_somebody_else_signed_or_changed_is_refused(
    snap: Snap, other: Path, key: Path, tmp_path: Path
) -> None:
    """Before anything is fetched."""
    stranger = make_key(tmp_path / "stranger")
    lock = lock_path(other)
    whole = lock.read_bytes()
    for path, data in ((stranger, whole), (key, whole + b" ")):
        lock.write_bytes(data)
        run = snap("pull", "--goldens", other, "--require-signer", f"{path}.pub")
        assert run.code == 3
        assert "is not what was signed" in error_lines(run)[0]
    signature_path(lock).unlink()
    run = snap("pull", "--goldens", other, "--require-signer", f"{key}.pub")
    assert "is missing" in error_lines(run)[0]
    assert not other.exists()


@pytest.mark.parametrize("options", [{"kind": "rsa"}, {"passphrase": "secret"}])
def test_a_key_that_cannot_sign_says_which_one_to_make(
    snap: Snap, tmp_path: Path, options: dict[str, str]
) -> None:
    """Nothing is pushed: the key is read first."""
    write_golden(tmp_path / "goldens")
    path = make_key(tmp_path / "unusable", **options)
    command = ("push", f"file://{tmp_path}/remote", "--goldens", tmp_path / "goldens")
    run = snap(*command, "--sign", path)
    assert run.code == 3
    assert "ssh-keygen -t ed25519" in error_lines(run)[1]
