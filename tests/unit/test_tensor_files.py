"""safetensors files of every dtype and shape, and damage of every kind that a header can have."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.goldens.tensors import Span, describe_file, join_files, open_tensors, read_header
from tests.unit.factory import flip_bit, truncate, write_raw

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (0,), (2, 0, 3), (2, 3), (1, 2, 3, 1))
TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]},
}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes, whatever its dtype."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def make_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return one tensor of each shape."""
    counts = [torch.Size(shape).numel() for shape in SHAPES]
    return {
        f"t{index}": (torch.arange(count) % 5 + index).to(dtype).reshape(shape)
        for index, (count, shape) in enumerate(zip(counts, SHAPES, strict=True))
    }


def write_parts(folder: Path) -> tuple[dict[str, Path], dict[str, torch.Tensor]]:
    """Write one part for each dtype; return the parts and what the joined file should hold."""
    parts: dict[str, Path] = {}
    wanted: dict[str, torch.Tensor] = {}
    for name, dtype in DTYPES.items():
        tensors = make_tensors(dtype)
        parts[name.lower()] = folder / f"{name}.safetensors"
        save_file(tensors, parts[name.lower()])
        wanted |= {f"{name.lower()}/{key}": tensor for key, tensor in tensors.items()}
    return parts, wanted


def damage(path: Path) -> str:
    """Return how a file is refused, which must name it."""
    with pytest.raises(GoldenDamaged) as caught:
        read_header(path)
    assert caught.value.problem.startswith(f"{path} ")
    return caught.value.problem


def test_joined_parts_of_every_dtype_are_read_by_safetensors_bit_for_bit(tmp_path: Path) -> None:
    """Scalars and empty tensors too, under their dtype's own letters."""
    parts, wanted = write_parts(tmp_path)
    join_files(parts, tmp_path / "joined")
    entries = describe_file(tmp_path / "joined").tensors
    with safe_open(tmp_path / "joined", framework="pt") as file:
        assert sorted(file.keys()) == sorted(wanted) == list(entries)
        for key, tensor in wanted.items():
            found = file.get_tensor(key)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert raw_bytes(found) == raw_bytes(tensor), key
            assert DTYPES[entries[key].dtype] == tensor.dtype
            assert entries[key].shape == tuple(tensor.shape)


def test_tensors_of_every_dtype_are_read_into_memory_of_their_own(tmp_path: Path) -> None:
    """What is written to one of them is not seen by who reads it again."""
    parts, wanted = write_parts(tmp_path)
    join_files(parts, tmp_path / "joined")
    file = open_tensors(tmp_path / "joined")
    for key, tensor in wanted.items():
        found = file.read(key)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(found) == raw_bytes(tensor), key
        found.reshape(-1).view(torch.uint8).fill_(1)
        assert raw_bytes(file.read(key)) == raw_bytes(tensor), key


def test_a_file_is_described_by_digests_of_its_bytes(tmp_path: Path) -> None:
    """Of the whole, and of each tensor's data, also of more than one block."""
    tensors = {"large": torch.rand(3, 700_001), "ids": torch.arange(7)}
    save_file(tensors, tmp_path / "file")
    entry = describe_file(tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for key, tensor in tensors.items():
        assert entry.tensors[key].shape == tuple(tensor.shape)
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert entry.tensors[key].sha256 == digest
        assert torch.equal(open_tensors(tmp_path / "file").read(key), tensor)


def test_an_open_file_is_read_whatever_its_name_comes_to_mean(tmp_path: Path) -> None:
    """Another file under the name is not seen; the same file cut short is damage."""
    path = tmp_path / "file.safetensors"
    save_file({"one": torch.arange(4)}, path)
    file = open_tensors(path)
    save_file({"one": torch.zeros(4)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    assert file.read("one").tolist() == [0, 1, 2, 3]
    file = open_tensors(path)
    truncate(path, size=-1)
    with pytest.raises(GoldenDamaged, match="cut short"):
        file.read("one")


def test_joining_the_same_parts_gives_the_same_bytes(tmp_path: Path) -> None:
    """In whatever order they are named."""
    save_file(make_tensors(torch.float32), tmp_path / "a")
    save_file(make_tensors(torch.float32), tmp_path / "b")
    join_files({"one": tmp_path / "a", "two": tmp_path / "b"}, tmp_path / "first")
    join_files({"two": tmp_path / "b", "one": tmp_path / "a"}, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_joining_nothing_gives_an_empty_file_that_readers_take(tmp_path: Path) -> None:
    """A phase that no case has is still a file."""
    join_files({}, tmp_path / "empty")
    with safe_open(tmp_path / "empty", framework="pt") as file:
        assert list(file.keys()) == []
    assert describe_file(tmp_path / "empty").tensors == {}


def test_joined_tensors_are_aligned_for_their_dtype(tmp_path: Path) -> None:
    """A reader may map the file: each tensor starts at a multiple of its element's size."""
    parts, wanted = write_parts(tmp_path)
    join_files(parts, tmp_path / "joined")
    for key, span in read_header(tmp_path / "joined").items():
        assert span.start % wanted[key].element_size() == 0, key


def test_joining_replaces_what_was_there_before(tmp_path: Path) -> None:
    """Nothing of a longer file stays behind."""
    (tmp_path / "joined").write_bytes(b"x" * 10_000)
    save_file({"k": torch.ones(2)}, tmp_path / "part")
    join_files({"p": tmp_path / "part"}, tmp_path / "joined")
    assert list(read_header(tmp_path / "joined")) == ["p/k"]


def test_joining_data_larger_than_a_block_keeps_every_byte(tmp_path: Path) -> None:
    """Blocks are copied whole and in order, the last and partial one too."""
    large = torch.arange(2**18 + 3, dtype=torch.int64)
    save_file({"k": large}, tmp_path / "part")
    join_files({"p": tmp_path / "part"}, tmp_path / "joined")
    with safe_open(tmp_path / "joined", framework="pt") as file:
        assert torch.equal(file.get_tensor("p/k"), large)


def test_joining_a_damaged_part_is_golden_damaged(tmp_path: Path) -> None:
    """A staged part that was cut short is not joined into a set."""
    save_file({"a": torch.ones(3)}, tmp_path / "part")
    truncate(tmp_path / "part", size=-1)
    with pytest.raises(
        GoldenDamaged, match="part is not a valid safetensors file: it is cut short"
    ):
        join_files({"p": tmp_path / "part"}, tmp_path / "joined")


def test_a_header_gives_each_tensors_place_in_the_file(tmp_path: Path) -> None:
    """Spans count from the start of the file."""
    path = write_raw(tmp_path / "f", TWO, bytes(12))
    first = 8 + len(json.dumps(TWO))
    assert read_header(path) == {
        "a": Span("F32", (2,), first, first + 8),
        "b": Span("U8", (4,), first + 8, first + 12),
    }


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    """A file that another tool wrote with metadata is read."""
    save_file({"a": torch.ones(1)}, tmp_path / "f", metadata={"format": "pt"})
    assert list(read_header(tmp_path / "f")) == ["a"]


def test_an_empty_tensor_may_share_its_place_with_another(tmp_path: Path) -> None:
    """The order of keys in a header means nothing: safetensors reads this file too."""
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    path = write_raw(tmp_path / "f", header, bytes(8))
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("b").shape == (0,)
    assert read_header(path).keys() == {"a", "b"}


def changed(key: str, **fields: Any) -> dict[str, Any]:
    """Return the header of two tensors with something changed about one of them."""
    return {**TWO, key: {**TWO[key], **fields}}


BAD_HEADERS: dict[str, object] = {
    "null": None,
    "number": 3,
    "text": "text",
    "half an object": b"{",
    "deep": b'{"a":' * 50_000,
    "tensor that is a list": {**TWO, "a": []},
    "no dtype": {**TWO, "a": {"shape": [2], "data_offsets": [0, 8]}},
    "no shape": {**TWO, "a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "dtype that is a list": changed("a", dtype=["F32"]),
    "unknown dtype": changed("a", dtype="F31"),
    "no text": b"\xff\xfe",
    "tensor that is null": {"x": None},
    "dtype of another size": changed("a", dtype="F64"),
    "overlap": changed("b", data_offsets=[4, 8]),
    "the same place": changed("b", data_offsets=[0, 4]),
    "gap": changed("b", data_offsets=[9, 13]),
    "gap at the start": {"b": TWO["b"]},
    "end before start": changed("b", shape=[0], data_offsets=[8, 4]),
    "beyond the end": changed("b", shape=[5], data_offsets=[8, 13]),
    "beyond 64 bits": changed("b", shape=[2**80], data_offsets=[8, 2**80 + 8]),
    "bytes that no tensor owns": {"a": TWO["a"]},
    "three offsets": changed("a", data_offsets=[0, 4, 8]),
    "offsets as text": changed("a", data_offsets=["0", "8"]),
    "fractional offset": changed("a", data_offsets=[0, 8.5]),
    "infinite size": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,12]}}',
    "size that is no number": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,12]}}',
    "two negative sizes": {"a": {"dtype": "F32", "shape": [-3, -1], "data_offsets": [0, 12]}},
    "shape that is a number": changed("a", shape=2),
    "key twice": b'{"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},'
    b'"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
    "field twice": b'{"a":{"dtype":"F32","dtype":"U8","shape":[12],"data_offsets":[0,12]}}',
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_a_bad_header_is_golden_damaged(tmp_path: Path, fault: str) -> None:
    """Whatever is wrong with a header, the file is refused by name and with nothing but that."""
    path = write_raw(tmp_path / "f", BAD_HEADERS[fault], bytes(12))
    assert " is not a valid safetensors file: " in damage(path)


def test_every_truncation_is_golden_damaged(tmp_path: Path) -> None:
    """A file that was cut at any byte is refused."""
    whole = save({"a": torch.ones(3), "b": torch.arange(2)})
    for size in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:size])
        assert "is not a valid safetensors file" in damage(tmp_path / "f")


def test_a_folder_or_nothing_in_a_files_place_is_golden_damaged(tmp_path: Path) -> None:
    """The file is named."""
    assert damage(tmp_path).endswith("is not a regular file")
    assert damage(tmp_path / "nowhere").endswith("nowhere is missing")


@given(byte=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(
    max_examples=400,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_flipped_bit_is_refused_or_seen_in_the_digest(
    tmp_path: Path, byte: int, bit: int
) -> None:
    """No flip raises anything else, and what is accepted all the same safetensors reads too."""
    path = tmp_path / "f"
    path.write_bytes(save({"a": torch.ones(3), "bc": torch.arange(4)}))
    before = describe_file(path)
    flip_bit(path, byte=byte % before.size, bit=bit)
    try:
        after = describe_file(path)
    except GoldenDamaged:
        return
    assert after.sha256 != before.sha256
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == list(after.tensors)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40])
def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path: Path, length: int) -> None:
    """Python itself is watched here: not even a short-lived buffer is asked for."""
    (tmp_path / "f").write_bytes(struct.pack("<Q", length) + bytes(12))
    tracemalloc.start()
    problem = damage(tmp_path / "f")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problem.endswith("it is cut short")
    assert peak < 2**20


def test_a_header_of_a_terabyte_that_the_file_has_allocates_nothing(tmp_path: Path) -> None:
    """A sparse file is as large as its header claims, and costs its maker nothing."""
    with (tmp_path / "f").open("wb") as file:
        file.write(struct.pack("<Q", 2**40 - 8))
        file.truncate(2**40)
    tracemalloc.start()
    problem = damage(tmp_path / "f")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problem.endswith(f"its header claims {2**40 - 8} bytes")
    assert peak < 2**20
