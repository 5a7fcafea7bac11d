"""Makes manifests and small golden sets for the tests: real files, real digests, no model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from snapshot_tool.base.protocol import PHASES, CaseInputs, Generation, Phase, PreparedCase
from snapshot_tool.base.recipes import CaseRecipe, ImageRecipe, NamedRecipe
from snapshot_tool.base.tolerance import DEFAULT_TOLERANCES
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.images import render
from snapshot_tool.goldens.layout import INPUTS, MANIFEST, TAPS, SetLocation, phase_file
from snapshot_tool.goldens.manifest import (
    SCHEMA_VERSION,
    CaseEntry,
    CheckpointEntry,
    Draws,
    FileEntry,
    GenerationEntry,
    HistoryEntry,
    Manifest,
    TapsEntry,
    encode,
    load_manifest,
)
from snapshot_tool.goldens.tensors import describe_file, join_files
from snapshot_tool.goldens.verify import set_file
from snapshot_tool.taps.sketches import Tap, sketch

CHECKPOINT = "local/tiny"
REVISION = "0123456789abcdef" * 4
SEED = 7
MODULES = ("model.vision", "model.text")

TEXT_ONLY = NamedRecipe("text-only", "fixed", CaseRecipe("Hello."))
# A palette and an alpha channel: what is easily lost on the way.
TWO_IMAGES = NamedRecipe(
    "two-images",
    "fixed",
    CaseRecipe(
        "<image> or <image>",
        (ImageRecipe("shapes", 9, 6, "P", 3), ImageRecipe("gradient", 5, 4, "RGBA")),
        left_padding=2,
    ),
)
RECIPES = (TWO_IMAGES, TEXT_ONLY)

Tensors = dict[str, torch.Tensor]


def make_manifest(files: Mapping[str, FileEntry] | None = None, **changes: Any) -> Manifest:
    """Return a valid manifest of two cases, with some of its fields replaced."""
    default = FileEntry(size=8, sha256="a" * 64, tensors={})
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        golden_version=1,
        history=(HistoryEntry(version=1, when="2025-01-02", reason="recorded", moved=()),),
        checkpoint=CheckpointEntry(
            name=CHECKPOINT,
            revision=REVISION,
            family="tiny",
            location="checkpoints/tiny",
            files={"config.json": "b" * 64},
            config={"hidden_size": 8, "rope": {"theta": 10000.0}},
        ),
        device="cpu",
        dtype="float32",
        seed=SEED,
        environment={"torch": "2.6.0", "python": "3.11.9"},
        draws=Draws(variants=0, refused=1, reasons={"too small": 1}),
        generation=GenerationEntry(max_new_tokens=3, eos_token_ids=(2,), pad_token_id=0),
        cases=tuple(
            CaseEntry(
                name=named.name,
                origin=named.origin,
                recipe=msgspec.to_builtins(named.recipe),
                text=named.recipe.prompt,
                phases=PHASES if named.recipe.images else (Phase.FORWARD, Phase.GENERATE),
                images=len(named.recipe.images),
                tiles=len(named.recipe.images),
                tokens=6,
                generated="größer",
            )
            for named in RECIPES
        ),
        tolerances=DEFAULT_TOLERANCES,
        taps=TapsEntry(seed=SEED, modules=MODULES),
        files=dict(files) if files is not None else {INPUTS: default},
    )
    return msgspec.structs.replace(manifest, **changes)


def make_inputs(named: NamedRecipe) -> CaseInputs:
    """Return what a processor might have made of a case."""
    padding = named.recipe.left_padding
    ids = torch.arange(6, dtype=torch.int64).reshape(1, 6) + 3
    mask = (torch.arange(6) >= padding).to(torch.int64).reshape(1, 6)
    if not named.recipe.images:
        return CaseInputs(ids, mask)
    tiles = len(named.recipe.images)
    pixels = torch.linspace(-1, 1, tiles * 3 * 4 * 4).reshape(tiles, 3, 4, 4)
    return CaseInputs(ids, mask, pixels, torch.ones(tiles, 4, 4, dtype=torch.bool))


def make_case(named: NamedRecipe) -> dict[str, Tensors]:
    """Return a case's tensors, by file: numbers that a small model might have answered."""
    generator = torch.Generator().manual_seed(len(named.name))
    inputs = make_inputs(named)
    images: Sequence[Image.Image] = [render(image) for image in named.recipe.images]
    prepared = PreparedCase(named.recipe.prompt, inputs, torch.zeros(len(images), 2))
    logits = torch.randn(6, 12, generator=generator)
    generation = Generation(torch.tensor([5, 4, 2]), torch.randn(3, 12, generator=generator))
    outputs = {module: torch.randn(1, 6, 8, generator=generator) for module in MODULES}
    taps = [Tap(module, None, sketch(output, seed=SEED)) for module, output in outputs.items()]
    tensors = {
        INPUTS: parts.input_tensors(prepared, images),
        phase_file(Phase.FORWARD): parts.forward_tensors(logits, inputs, seed=SEED),
        phase_file(Phase.GENERATE): parts.generate_tensors(generation),
        TAPS: parts.tap_tensors(taps, MODULES),
    }
    if images:
        features = torch.randn(len(images), 4, 8, generator=generator)
        tensors[phase_file(Phase.PREPROCESSING)] = {"image_grids": torch.zeros(2, 2).long()}
        tensors[phase_file(Phase.VISION)] = {"last_hidden_state": features}
        tensors[phase_file(Phase.CONNECTOR)] = {"image_hidden_states": features[:, ::4] * 2}
    return tensors


def write_files(folder: Path) -> dict[str, FileEntry]:
    """Write the safetensors files of the set in `folder` and return their manifest entries."""
    staging = folder / "parts"
    cases = {named.name: make_case(named) for named in RECIPES}
    entries = {}
    for file in [INPUTS, *(phase_file(phase) for phase in PHASES), TAPS]:
        staged = {}
        for name, tensors in cases.items():
            if file in tensors:
                staged[name] = staging / f"{name}-{file}"
                staging.mkdir(parents=True, exist_ok=True)
                contiguous = {key: tensor.contiguous() for key, tensor in tensors[file].items()}
                save_file(contiguous, staged[name])
        target = folder.parent / file if file == INPUTS else folder / file
        join_files(staged, target)
        entries[file] = describe_file(target)
    for part in staging.iterdir():
        part.unlink()
    staging.rmdir()
    return entries


def write_golden(
    root: Path,
    *,
    checkpoint: str = CHECKPOINT,
    revision: str = REVISION,
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Write a whole golden set of two cases below `root` and return its folder."""
    folder = SetLocation(root, checkpoint, revision, device, dtype).folder
    folder.mkdir(parents=True)
    files = write_files(folder)
    entry = msgspec.structs.replace(make_manifest().checkpoint, name=checkpoint, revision=revision)
    write_manifest(folder, make_manifest(files, checkpoint=entry, device=device, dtype=dtype))
    return folder


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into a set's folder."""
    (folder / MANIFEST).write_bytes(encode(manifest))


def rewrite(folder: Path, file: str, change: Callable[[Tensors], object], **fields: object) -> None:
    """Change tensors of a file of a set, and describe it anew in the manifest.

    fields: others of the manifest's that change.
    """
    path = set_file(folder, file)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = load_manifest(folder)
    files = {**manifest.files, file: describe_file(path)}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files, **fields))


def flip_bit(path: Path, *, byte: int, bit: int = 0) -> None:
    """Flip one bit of a file; a negative byte counts from the end."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path, *, size: int) -> None:
    """Cut a file to its first bytes; a negative size counts from the end."""
    path.write_bytes(path.read_bytes()[:size])


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a file in the format's outer form with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    path.write_bytes(prefix + text + data)
    return path
