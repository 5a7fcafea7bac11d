"""safetensors files without torch: joined, described, and refused when damaged."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.goldens.tensors import describe_file, join_files, read_header
from tests.unit.factory import write_raw

TENSORS = {
    "floats": torch.linspace(-1, 1, 15).reshape(3, 5),
    "halves": torch.ones(2, 3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(7),
    "doubles": torch.tensor([[1.0, float("nan")]], dtype=torch.float64),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
}


def test_joined_parts_hold_the_same_tensors_for_any_reader(tmp_path: Path) -> None:
    """Every dtype and shape survives, under `<case>/<tensor>`, in the safetensors library."""
    save_file(TENSORS, tmp_path / "a")
    save_file({"ids": torch.tensor([9])}, tmp_path / "b")
    join_files({"one": tmp_path / "a", "two": tmp_path / "b"}, tmp_path / "joined")
    with safe_open(tmp_path / "joined", framework="pt") as file:
        keys = set(file.keys())
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(f"one/{name}").nan_to_num(7), tensor.nan_to_num(7))
        assert file.get_tensor("two/ids").tolist() == [9]
    assert keys == {f"one/{name}" for name in TENSORS} | {"two/ids"}


def test_joining_the_same_parts_gives_the_same_bytes(tmp_path: Path) -> None:
    """In whatever order they are named."""
    save_file(TENSORS, tmp_path / "a")
    save_file(TENSORS, tmp_path / "b")
    join_files({"one": tmp_path / "a", "two": tmp_path / "b"}, tmp_path / "first")
    join_files({"two": tmp_path / "b", "one": tmp_path / "a"}, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_joining_nothing_gives_an_empty_file_that_readers_take(tmp_path: Path) -> None:
    """A phase that no case has is still a file."""
    join_files({}, tmp_path / "empty")
    with safe_open(tmp_path / "empty", framework="pt") as file:
        assert list(file.keys()) == []
    assert describe_file(tmp_path / "empty").tensors == {}


def test_a_file_is_described_by_digests_of_its_bytes(tmp_path: Path) -> None:
    """Of the whole, and of each tensor's data."""
    path = tmp_path / "file"
    save_file(TENSORS, path)
    entry = describe_file(path)
    assert entry.size == path.stat().st_size
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    ids = entry.tensors["ids"]
    assert (ids.shape, ids.dtype) == ((7,), "I64")
    assert ids.sha256 == hashlib.sha256(TENSORS["ids"].numpy().tobytes()).hexdigest()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"not json", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        ([1, 2], b""),
        ({"x": {**F32, "dtype": "F31"}}, b"\0" * 8),
        ({"x": {**F32, "shape": [3]}}, b"\0" * 8),
        ({"x": {**F32, "shape": [-2]}}, b"\0" * 8),
        ({"x": {**F32, "shape": [2**62, 2**62]}}, b"\0" * 8),
        ({"x": {**F32, "data_offsets": [-8, 0]}}, b"\0" * 8),
        ({"x": {**F32, "data_offsets": [8, 0]}}, b"\0" * 8),
        ({"x": {**F32, "data_offsets": [0]}}, b"\0" * 8),
        ({"x": {**F32, "data_offsets": [8, 16]}}, b"\0" * 16),
        ({"x": F32, "y": F32}, b"\0" * 8),
        ({"x": F32}, b"\0" * 7),
        ({"x": F32}, b"\0" * 9),
        ({"x": {"dtype": "F32"}}, b""),
        ({"x": None}, b""),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_damage(
    tmp_path: Path, header: object, data: bytes
) -> None:
    """Wrong types, sizes, overlaps, gaps, rests: one error of one kind."""
    with pytest.raises(GoldenDamaged, match="is no valid safetensors file"):
        read_header(write_raw(tmp_path / "file", header, data))


@pytest.mark.parametrize("length", [2**40, 2**63, 100])
def test_a_header_that_claims_more_than_the_file_allocates_nothing(
    tmp_path: Path, length: int
) -> None:
    """A length of terabytes is refused before anything is read."""
    path = write_raw(tmp_path / "file", {"x": F32}, b"\0" * 8, length=length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GoldenDamaged, match="cut short"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_cut_anywhere_is_damage(tmp_path: Path, size: int) -> None:
    """In the length, in the header, in the data."""
    path = tmp_path / "file"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(GoldenDamaged):
        describe_file(path)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    """And named."""
    with pytest.raises(GoldenDamaged, match="nowhere is missing"):
        read_header(tmp_path / "nowhere")
