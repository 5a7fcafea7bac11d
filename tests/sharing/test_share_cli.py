"""`snap push` and `snap pull` as a user meets them: the committed goldens go away and come back."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import CHECKOUT, Snap, error_lines
from tests.sharing.conftest import Place


def test_push_delete_pull_check(snap: Snap, goldens_copy: Path, s3: Place) -> None:
    """What comes back is what FMS is checked against."""
    pushed = snap("push", s3.url, "--goldens", goldens_copy)
    assert (pushed.code, pushed.err) == (0, "")
    assert pushed.out.startswith("pushed  local/tiny-idefics3 at ")
    assert f"MB uploaded to {s3.url}" in pushed.out
    shutil.rmtree(goldens_copy)
    missing = snap("check", "--fms-path", CHECKOUT, "--goldens", goldens_copy)
    assert missing.code == 3
    pulled = snap("pull", "--goldens", goldens_copy)
    assert (pulled.code, pulled.err) == (0, "")
    assert pulled.out.startswith("pulled  local/tiny-idefics3 at ")
    options = ("--case", "one-image", "--phase", "connector")
    checked = snap("check", "--fms-path", CHECKOUT, "--goldens", goldens_copy, *options)
    assert checked.code == 0
    again = snap("pull", "--goldens", goldens_copy)
    assert again.out.splitlines()[0].startswith("here    local/tiny-idefics3 at ")
    assert again.out.splitlines()[1].startswith("0.0 MB downloaded from ")


def test_a_tampered_remote_is_an_error_of_two_lines(
    snap: Snap, goldens_copy: Path, folder: Place
) -> None:
    """With exit code 3, the object's name, and nothing in place."""
    assert snap("push", folder.url, "--goldens", goldens_copy).code == 0
    shutil.rmtree(goldens_copy)
    name = next(name for name in folder.objects if name.endswith(".safetensors"))
    folder.objects[name] = bytes(len(folder.objects[name]))
    run = snap("pull", "--goldens", goldens_copy)
    assert run.code == 3
    problem, remedy = error_lines(run)
    assert name.removeprefix("objects/") in problem
    assert "nothing was changed here" in remedy
    assert list(goldens_copy.glob("*/*/*/manifest.json")) == []


def test_a_hub_that_cannot_be_reached_is_an_error_of_two_lines(
    snap: Snap, goldens_copy: Path
) -> None:
    """The client's own warnings and retries stay off the terminal."""
    offline = snap("push", "hf://datasets/owner/name", "--goldens", goldens_copy)
    assert offline.code == 3
    assert "cannot list hf://datasets/owner/name" in error_lines(offline)[0]


def test_an_address_of_another_kind_is_wrong_usage(snap: Snap, goldens_copy: Path) -> None:
    """Exit code 2, with the three forms that there are."""
    run = snap("push", "somewhere", "--goldens", goldens_copy)
    assert run.code == 2
    assert "hf://datasets/OWNER/NAME, s3://BUCKET/PREFIX or file:///FOLDER" in error_lines(run)[1]
