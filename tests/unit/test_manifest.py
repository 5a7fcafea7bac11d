"""manifest.json: what is written, what is read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot_tool.base import files
from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound, ManifestInvalid
from snapshot_tool.goldens import manifest as manifest_module
from snapshot_tool.goldens.manifest import (
    SCHEMA_VERSION,
    case_recipe,
    decode,
    encode,
    encode_readable,
    load_manifest,
)
from tests.unit.factory import RECIPES, make_manifest

SOURCE = Path("some/manifest.json")
VALID = encode(make_manifest())

Spoil = Callable[[dict[str, Any]], object]


def refusal(data: bytes) -> ManifestInvalid:
    """Return the error with which some bytes are refused."""
    with pytest.raises(ManifestInvalid) as caught:
        decode(data, source=SOURCE)
    return caught.value


def spoilt(change: Spoil) -> bytes:
    """Return a valid manifest's bytes after one change to its JSON."""
    document = json.loads(VALID)
    change(document)
    return json.dumps(document).encode()


def test_encoding_what_was_decoded_gives_the_same_bytes() -> None:
    """Reading and writing a manifest changes nothing, not one byte."""
    manifest = decode(VALID, source=SOURCE)
    assert encode(manifest) == VALID
    assert decode(encode(manifest), source=SOURCE) == manifest


def test_the_committed_manifests_round_trip() -> None:
    """The golden sets of the repository are read and would be written as they are."""
    paths = list((Path(__file__).parents[2] / "goldens").glob("*/*/*/manifest.json"))
    assert paths
    for path in paths:
        assert encode(decode(path.read_bytes(), source=path)) == path.read_bytes()


def test_keys_are_sorted_at_every_level_and_the_text_is_indented() -> None:
    """The bytes depend on the content alone: sorted keys, two spaces, one newline at the end."""
    json.loads(VALID, object_pairs_hook=_sorted_pairs)
    assert VALID.startswith(b'{\n  "cases": [\n    {\n')
    assert VALID.endswith(b"\n}\n")
    assert '"generated": "größer"' in VALID.decode()


def _sorted_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    assert keys == sorted(keys)
    return dict(pairs)


def test_a_newer_schema_is_refused_with_both_versions_and_advice() -> None:
    """A manifest of a later snap is not called broken: the user is told to update."""
    error = refusal(spoilt(lambda d: d.update(schema_version=99, unheard_of=[1])))
    assert error.problem == (
        f"some/manifest.json follows manifest schema 99, this snap reads {SCHEMA_VERSION}"
    )
    assert error.remedy == "update snap to read it"


FAULTS: dict[str, tuple[Spoil, str]] = {
    "unknown field": (lambda d: d.update(extra=1), "unknown field `extra`"),
    "unknown nested field": (
        lambda d: d["checkpoint"].update(extra=1),
        "unknown field `extra` - at `$.checkpoint`",
    ),
    "missing field": (lambda d: d.pop("seed"), "missing required field `seed`"),
    "no schema version": (lambda d: d.pop("schema_version"), "`schema_version`"),
    "schema version zero": (lambda d: d.update(schema_version=0), "`$.schema_version`"),
    "schema version as text": (lambda d: d.update(schema_version="1"), "`$.schema_version`"),
    "wrong type": (lambda d: d.update(device=3), "`$.device`"),
    "true for a number": (lambda d: d.update(seed=True), "`$.seed`"),
    "negative seed": (lambda d: d.update(seed=-1), "`$.seed`"),
    "short digest": (
        lambda d: d["checkpoint"]["files"].update({"config.json": "b" * 63}),
        "`$.checkpoint.files[...]`",
    ),
    "upper-case digest": (
        lambda d: d["files"]["inputs.safetensors"].update(sha256="A" * 64),
        "`$.files[...].sha256`",
    ),
    "digest with a newline": (
        lambda d: d["files"]["inputs.safetensors"].update(sha256="a" * 64 + "\n"),
        "`$.files[...].sha256`",
    ),
    "revision of 41 digits": (
        lambda d: d["checkpoint"].update(revision="a" * 41),
        "`$.checkpoint.revision`",
    ),
    "checkpoint without owner": (
        lambda d: d["checkpoint"].update(name="tiny"),
        "`$.checkpoint.name`",
    ),
    "checkpoint that climbs": (
        lambda d: d["checkpoint"].update(name="../tiny"),
        "`$.checkpoint.name`",
    ),
    "negative tolerance": (
        lambda d: d["tolerances"]["vision"]["single"].update(atol=-1.0),
        "`$.tolerances[...].single`",
    ),
    "unknown phase": (
        lambda d: d["tolerances"].update(decoding=d["tolerances"]["vision"]),
        "`$.tolerances`",
    ),
    "tensor of negative size": (
        lambda d: d["files"]["inputs.safetensors"]["tensors"].update(
            {"text-only/x": {"shape": [-1], "dtype": "F32", "sha256": "a" * 64}}
        ),
        "`$.files[...].tensors[...].shape[0]`",
    ),
    "day that is none": (
        lambda d: d["history"][0].update(when="yesterday"),
        "`$.history[0].when`",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_field_is_refused_by_name(fault: str) -> None:
    """One wrong field makes the manifest invalid, and the message says which it is."""
    change, named = FAULTS[fault]
    error = refusal(spoilt(change))
    assert error.problem.startswith("some/manifest.json is not a valid manifest: ")
    assert named in error.problem
    assert error.remedy == "restore it from version control, or record the set again with --update"
    assert error.exit_code == 3


BAD_PATHS = ["../x", "/x", "a/../../x", "a/..", "..", "", "a\\b", "a\x00b", "a\n/../../x", "../\n"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_leaves_its_folder_is_refused(path: str) -> None:
    """Neither a checkpoint's place nor its files may be absolute or climb."""
    place = refusal(spoilt(lambda d: d["checkpoint"].update(location=path)))
    assert "`$.checkpoint.location`" in place.problem
    file = refusal(spoilt(lambda d: d["checkpoint"].update(files={path: "b" * 64})))
    assert "`key` in `$.checkpoint.files`" in file.problem


@pytest.mark.parametrize("path", ["a", "a/b.json", "..a/b..", "a..b", "a/...", "größe 1"])
def test_a_path_inside_its_folder_is_accepted(path: str) -> None:
    """Dots and spaces in names are no way up."""
    data = spoilt(lambda d: d["checkpoint"].update(location=path, files={path: "b" * 64}))
    assert decode(data, source=SOURCE).checkpoint.location == path


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "..", "a b", "a\n", "é", "a" * 65])
def test_a_bad_case_name_is_refused(name: str) -> None:
    """A case's name becomes a folder and a key, so it is small letters, digits and hyphens."""
    error = refusal(spoilt(lambda d: d["cases"][0].update(name=name)))
    assert "`$.cases[0].name`" in error.problem


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff\xfe",
        b"\x00" * 8,
        b'{"schema_version": 1e400}',
        b'{"schema_version": NaN}',
        b"[" * 200_000,
        b'{"schema_version":1,"checkpoint":' + b'{"a":' * 200_000,
        VALID.replace(b'"theta": 10000', b'"theta": ' + b"[" * 100_000 + b"]" * 100_000),
        VALID.replace("größer".encode(), b"gr\xf6\xdfer"),
        VALID.replace("größer".encode(), b"\\ud800"),
        VALID + b"x",
    ],
)
def test_bytes_that_are_no_manifest_are_refused_in_one_way(data: bytes) -> None:
    """Empty, deep, truncated, wrongly encoded: always ManifestInvalid, never another error."""
    assert refusal(data).problem.startswith("some/manifest.json is not a valid manifest: ")


def test_every_truncation_is_refused() -> None:
    """However many bytes are left, a manifest that was cut short is invalid."""
    assert VALID.rstrip()[-1:] == b"}"
    for size in range(0, len(VALID.rstrip()), 7):
        refusal(VALID[:size])
    refusal(VALID.rstrip()[:-1])


@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_any_altered_byte_gives_a_manifest_or_manifest_invalid(
    edits: list[tuple[int, int]],
) -> None:
    """Damage of any kind ends in ManifestInvalid, or in a manifest that can be written again."""
    data = bytearray(VALID)
    for place, byte in edits:
        data[place] = byte
    try:
        manifest = decode(bytes(data), source=SOURCE)
    except ManifestInvalid:
        return
    assert decode(encode(manifest), source=SOURCE) == manifest


def test_recipes_are_built_from_the_manifest() -> None:
    """A case's recipe comes back as the object that was stored, images included."""
    manifest = decode(VALID, source=SOURCE)
    assert tuple(case_recipe(case) for case in manifest.cases) == RECIPES


BAD_RECIPES: dict[str, tuple[object, str]] = {
    "no mapping": (3, "`$.recipe`"),
    "no prompt": ({}, "missing required field `prompt`"),
    "placeholder without image": (
        {"prompt": "<image>"},
        "1 <image> in the prompt for 0 images",
    ),
    "unknown kind": (
        {"prompt": "<image>", "images": [{"kind": "photo", "width": 1, "height": 1}]},
        "image kind 'photo' is none of gradient",
    ),
    "gigantic image": (
        {"prompt": "<image>", "images": [{"kind": "flat", "width": 10**6, "height": 1}]},
        "image size 1000000x1 is out of range",
    ),
    "padding without end": ({"prompt": "", "left_padding": 10**9}, "left padding 1000000000"),
    "width as text": (
        {"prompt": "<image>", "images": [{"kind": "flat", "width": "1", "height": 1}]},
        "`$.recipe.images[0].width`",
    ),
}


@pytest.mark.parametrize("fault", BAD_RECIPES)
def test_a_recipe_that_makes_no_case_is_refused(fault: str) -> None:
    """An invalid recipe is ManifestInvalid and names the case and the reason."""
    recipe, named = BAD_RECIPES[fault]
    case = msgspec.structs.replace(make_manifest().cases[0], recipe=recipe)
    with pytest.raises(ManifestInvalid) as caught:
        case_recipe(case)
    assert caught.value.problem.startswith("case two-images: its recipe is invalid: ")
    assert named in caught.value.problem


def test_a_manifest_that_is_missing_is_reported_as_not_found(tmp_path: Path) -> None:
    """No manifest is no golden, which is another fault than a broken one."""
    with pytest.raises(GoldenNotFound) as caught:
        load_manifest(tmp_path)
    assert caught.value.problem == f"{tmp_path / 'manifest.json'} is missing"


def test_a_folder_in_the_manifests_place_is_damage(tmp_path: Path) -> None:
    """What cannot be read as a file is GoldenDamaged."""
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(GoldenDamaged, match=r"manifest\.json is not a regular file"):
        load_manifest(tmp_path)


def test_a_manifest_beyond_all_measure_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file larger than any manifest is refused by its size alone."""
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", len(VALID) - 1)
    (tmp_path / "manifest.json").write_bytes(VALID)
    with pytest.raises(ManifestInvalid, match=f"is larger than {len(VALID) - 1} bytes"):
        load_manifest(tmp_path)
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", len(VALID))
    assert load_manifest(tmp_path) == decode(VALID, source=SOURCE)


def test_a_manifest_that_nobody_could_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of too many bytes nor one of too many values."""
    assert encode_readable(make_manifest()) == VALID
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", len(VALID) - 1)
    with pytest.raises(ManifestInvalid, match=f"too large to be read: it has {len(VALID)} bytes"):
        encode_readable(make_manifest())
    monkeypatch.setattr(manifest_module, "MAX_JSON_BYTES", len(VALID))
    monkeypatch.setattr(files, "MAX_JSON_VALUES", 10)
    with pytest.raises(ManifestInvalid, match=r"it has \d+ values, allowed are 10"):
        encode_readable(make_manifest())


def test_the_title_names_checkpoint_revision_device_and_version() -> None:
    """A set is named as people read it."""
    assert make_manifest(golden_version=3).title == (
        "local/tiny at 0123456789ab (cpu-float32), golden version 3"
    )
