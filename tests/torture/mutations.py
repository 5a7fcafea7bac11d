"""Golden sets as a stranger might send them: one seeded mutation of a whole set at a time.

Digests protect against accidents alone, since a stranger writes them too: after a mutation of a
file the manifest is made to agree with it again, wherever the mutation leaves that possible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from snapshot_tool.goldens.tensors import describe_file

_PHASES = ("preprocessing", "vision", "connector", "forward", "generate")
FILES = ("inputs", "taps", *_PHASES)
STRINGS = (
    "", "/etc/passwd", "../../../etc/passwd", "a/../../b", "\x1b[2J\x1b]0;owned\x07", "a\nb",
    "\u202egnp.exe", "\ud800", "x" * 100_000, "CON", "~root", "local/../../x", "\x00", "café",
    "os:system", "cpu", "cuda", "bfloat16", "idefics3", "llama", "0" * 40,
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 5e-324,
)  # fmt: skip
# Text that json.dumps would not write.
_RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 5000, "0x10", "01", "{",
    "[" * 3000, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, '"\\ud800"',
    '"' + "\\u0000" * 50 + '"', '{"a": 1, "a": 2}', "'single'", "1.5e", "tru", "nul", "\ufeff{}",
)  # fmt: skip
_PLACE = "\u0001raw\u0001"


@dataclass(frozen=True, slots=True)
class HostileSet:
    """A set's folder that a mutation works on, and chance."""

    folder: Path
    chance: random.Random

    def path(self, file: str) -> Path:
        """Return where a file of the set lies."""
        name = f"{file}.safetensors"
        return self.folder.parent / name if file == "inputs" else self.folder / name

    @property
    def manifest(self) -> Path:
        """The manifest's path."""
        return self.folder / "manifest.json"

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file anew: it may be a hard link to the set that all mutations begin from."""
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def agree(self, file: str) -> None:
        """Make the manifest agree with a file, as far as the file can be described."""
        path = self.path(file)
        data = path.read_bytes()
        manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        entry = manifest["files"][path.name]
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        with contextlib.suppress(Exception):  # a file that cannot be described keeps old tensors
            found = describe_file(path).tensors
            entry["tensors"] = {
                key: {"shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256}
                for key, t in found.items()
            }
        self.replace(self.manifest, json.dumps(manifest).encode("utf-8", "surrogatepass"))


def mutate_manifest_value(hostile: HostileSet) -> None:
    """Put something else in the place of one to three values of the manifest."""
    chance = hostile.chance
    tree = json.loads(hostile.manifest.read_text(encoding="utf-8"))
    raw: list[str] = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        parent, key = place_in(tree, chance)
        kind = chance.randrange(7)
        if kind == 0:
            parent[key] = chance.choice(STRINGS)
        elif kind == 1:
            parent[key] = chance.choice(NUMBERS)
        elif kind == 2:
            parent[key] = _PLACE
            raw.append(chance.choice(_RAW))
        elif kind == 3:
            parent[key] = chance.choice((None, True, False, [], {}, [[]], {"a": {}}))
        elif kind == 4 and isinstance(parent, dict):
            parent[chance.choice((*STRINGS, key + "x"))] = parent.pop(key)
        elif kind == 5:
            del parent[key]
        else:
            other, place = place_in(tree, chance)
            parent[key] = json.loads(json.dumps(other[place]))
    text = json.dumps(tree)
    for piece in raw:
        text = text.replace(json.dumps(_PLACE), piece, 1)
    hostile.replace(hostile.manifest, text.encode("utf-8", "surrogatepass"))


def place_in(tree: Any, chance: random.Random) -> tuple[Any, Any]:
    """Return a container and a key in it, every depth being likely."""
    parent, key = tree, chance.choice(list(tree)) if tree else ""
    if not tree:
        tree[""] = None
    while True:
        child = parent[key]
        if not isinstance(child, dict | list) or not child or chance.random() < 0.15:
            return parent, key
        parent = child
        key = (
            chance.choice(list(child)) if isinstance(child, dict) else chance.randrange(len(child))
        )


def mutate_manifest_bytes(hostile: HostileSet) -> None:
    """Flip, cut, insert or double bytes of the manifest."""
    data = mutate_bytes(hostile.manifest.read_bytes(), hostile.chance)
    hostile.replace(hostile.manifest, data)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return data with one to eight places changed."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del changed[place : place + chance.choice((1, 2, 50, 10**6))]
        elif kind == 2:
            changed[place:place] = chance.choice(
                (b"\x00", b"\xff\xfe", b'"', b"[", b"{", b",", b"\xed\xa0\x80")
            )
        elif kind == 3:
            changed[place:place] = changed[place : place + 200]
        else:
            changed[place : place + 1] = bytes([chance.randrange(256)])
    return bytes(changed)


def duplicate_cases(hostile: HostileSet) -> None:
    """Name a case twice, in the list of cases or as a key of the text."""
    tree = json.loads(hostile.manifest.read_text(encoding="utf-8"))
    if hostile.chance.random() < 0.5:
        tree["cases"].append(hostile.chance.choice(tree["cases"]))
        text = json.dumps(tree)
    else:
        key = hostile.chance.choice(list(tree))
        text = json.dumps(tree)[:-1] + f", {json.dumps(key)}: {json.dumps(tree[key])}}}"
    hostile.replace(hostile.manifest, text.encode())


def mutate_header(hostile: HostileSet) -> None:
    """Change the header of a safetensors file, and make the manifest agree."""
    chance = hostile.chance
    file = chance.choice(FILES)
    data = hostile.path(file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = chance.randrange(9)
    if kind == 0:
        claimed = chance.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1))
        changed = struct.pack("<Q", claimed) + header + rest
    elif kind == 1:
        changed = _with_header(mutate_bytes(header, chance), rest)
    elif kind == 2:
        changed = _with_header(chance.choice(_RAW).encode("utf-8", "surrogatepass"), rest)
    else:
        changed = _with_header(_mutate_fields(json.loads(header), kind, chance), rest)
    hostile.replace(hostile.path(file), changed)
    hostile.agree(file)


def _mutate_fields(fields: dict[str, Any], kind: int, chance: random.Random) -> bytes:
    keys = [key for key in fields if key != "__metadata__"]
    key = chance.choice(keys)
    entry = fields[key]
    if kind == 3:
        entry["shape"] = chance.choice(
            ([2**62, 4], [2**31] * 8, [-1], [0], [], [1] * 100, "3", [1.5])
        )
    elif kind == 4:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = chance.choice(
            ([begin, end + 8], [begin + 1, end], [end, begin], [0, 2**63], [-8, end], [begin], {})
        )
    elif kind == 5:
        entry["dtype"] = chance.choice(("F32", "I64", "U8", "BOOL", "F128", "", 7, "F4", "C64"))
    elif kind == 6:
        fields[chance.choice(STRINGS)] = fields.pop(key)
    elif kind == 7:
        fields["__metadata__"] = chance.choice(({"a": "b"}, {"a": 1}, [], "x", {"a": "x" * 10**6}))
    else:
        text = json.dumps(fields)
        return (text[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}").encode()
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def _with_header(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def mutate_tensor(hostile: HostileSet) -> None:
    """Put another tensor in the place of one, in a valid file that the manifest agrees with."""
    chance = hostile.chance
    file = chance.choice(FILES)
    tensors = load(hostile.path(file).read_bytes())
    key = chance.choice(sorted(tensors))
    tensor = tensors[key]
    kind = chance.randrange(8)
    if kind == 0 and tensor.is_floating_point():
        tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice(
            (float("nan"), float("inf"), -float("inf"), 3e38)
        )
    elif kind == 1 and not tensor.is_floating_point() and tensor.numel():
        big = chance.choice((-1, 0, 255, 10**6, 2**62, -(2**63)))
        tensor.view(-1)[chance.randrange(tensor.numel())] = (
            big if tensor.dtype == torch.int64 else abs(big) % 2
        )
    elif kind == 2:
        tensors[key] = tensor.reshape(-1)
    elif kind == 3:
        tensors[key] = tensor[None]
    elif kind == 4:
        tensors[key] = tensor[:0]
    elif kind == 5:
        wide = chance.choice((torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool))
        tensors[key] = tensor.to(wide)
    elif kind == 6:
        del tensors[key]
    else:
        tensors[chance.choice((key + "x", "x/y", "two-images/x", "a" * 300))] = tensor.clone()
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    hostile.replace(hostile.path(file), save(contiguous))
    hostile.agree(file)


def replace_by_what_is_no_file(hostile: HostileSet) -> None:
    """Put a link, a pipe, a socket, a folder or nothing in a file's place."""
    chance = hostile.chance
    path = chance.choice([hostile.manifest, *map(hostile.path, FILES)])
    data = path.read_bytes()
    path.unlink()
    outside = hostile.folder.parents[3] / "outside" / "secret"
    kinds: tuple[Callable[[], object], ...] = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(chance.choice(("/dev/zero", "/dev/random", "/dev/stdin"))),
        lambda: path.symlink_to(chance.choice((outside, Path("/etc/passwd"), Path("nowhere")))),
        lambda: path.symlink_to(path),
        path.mkdir,
        lambda: _bind_socket(path),
        lambda: path.write_bytes(b""),
        lambda: _write_sparse(path, data, size=2**40),
        lambda: path.write_bytes(
            chance.choice((b"\x89PNG\r\n", b"PK\x03\x04", b"\x80\x04.")) + data
        ),
        lambda: None,
    )
    chance.choice(kinds)()


def _bind_socket(path: Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as pipe:
        pipe.bind(str(path))  # refused where the path is too long: then nothing is there


def _write_sparse(path: Path, data: bytes, *, size: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)


def set_a_trap_in_the_folders(hostile: HostileSet) -> None:
    """Add folders that a reader might follow, put back or mistake for the set."""
    chance = hostile.chance
    root = hostile.folder.parents[2]
    outside = root.parent / "outside"
    work = root / ".snap" / "owner--trap" / "0123456789ab"
    kind = chance.randrange(7)
    if kind == 0:  # what a reader puts back must not land outside
        (work / "replaced" / "cpu-float32").mkdir(parents=True)
        (root / "owner--trap").symlink_to(outside)
    elif kind == 1:
        work.parent.mkdir(parents=True)
        work.symlink_to(outside)
        (outside / "replaced").mkdir(exist_ok=True)
    elif kind == 2:
        (work / "replaced").mkdir(parents=True)
        (work / "lock").symlink_to(outside / "secret")
    elif kind == 3:
        (root / ".snap").symlink_to(outside)
    elif kind == 4:
        (root / "LOCAL--TINY").mkdir()
        (root / "LOCAL--TINY" / hostile.folder.parent.name).symlink_to(hostile.folder.parent)
    elif kind == 5:
        (hostile.folder.parent / "cuda-float32").symlink_to(root)
    else:
        for name in ("x\ny", "\x1b[31m", "a" * 200):
            (root / name / ("0" * 12) / "cpu-float32").mkdir(parents=True, exist_ok=True)


MUTATIONS: tuple[tuple[Callable[[HostileSet], None], int], ...] = (
    (mutate_manifest_value, 40),
    (mutate_manifest_bytes, 20),
    (duplicate_cases, 2),
    (mutate_header, 15),
    (mutate_tensor, 15),
    (replace_by_what_is_no_file, 6),
    (set_a_trap_in_the_folders, 2),
)


def mutate(folder: Path, seed: int) -> str:
    """Mutate the set in a folder; return the mutation's name."""
    chance = random.Random(seed)
    mutations, weights = zip(*MUTATIONS, strict=True)
    mutation: Callable[[HostileSet], None] = chance.choices(mutations, weights)[0]
    mutation(HostileSet(folder, chance))
    return str(mutation.__name__)
