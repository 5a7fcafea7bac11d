"""A golden set, opened for reading."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound
from snapshot_tool.base.files import leaves_root
from snapshot_tool.base.phases import Phase
from snapshot_tool.base.protocol import CaseInputs
from snapshot_tool.base.tap import Tap
from snapshot_tool.goldens.layout import INPUTS, OUTPUTS, TAPS, phase_file
from snapshot_tool.goldens.manifest import CaseEntry, Manifest, Storage, case_recipe, load_manifest
from snapshot_tool.goldens.packed import PIXEL_VALUES, SHAPE, unpack
from snapshot_tool.goldens.tensors import TensorFile, open_tensors
from snapshot_tool.goldens.verify import (
    allowed_files,
    find_lasting_damage,
    find_misfits,
    refuse_damage,
    set_file,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

_TRIES = 20


def open_golden(folder: Path) -> Golden:
    """Open the set in a folder; raise GoldenDamaged unless every file is as recorded.

    The files are opened first and their digests compared then: what was compared is what is read.
    A recorder that puts another version in place changes neither files nor numbers of this one.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(GoldenNotFound):  # taken away just now, or not there at all
            golden = Golden(folder, load_manifest(folder))
            if golden.open_files():
                return golden
        _, damage = find_lasting_damage(folder)
        refuse_damage(damage)
    raise GoldenDamaged(f"{folder} is replaced again and again", "wait until that has ended")


@dataclass(frozen=True, slots=True)
class Golden:
    """An intact golden set. Its files are open; a tensor is read when it is asked for."""

    folder: Path
    manifest: Manifest
    _files: dict[str, TensorFile] = field(default_factory=dict, repr=False, compare=False)
    _names: dict[str, dict[str, list[str]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def root(self) -> Path:
        """The goldens folder."""
        return self.folder.parent.parent.parent

    def open_files(self) -> bool:
        """Open every file and tell whether all are as recorded; nothing is read by name again."""
        for name, entry in self.manifest.files.items():
            path = set_file(self.folder, name)
            if name not in allowed_files(self.manifest) or leaves_root(path, self.folder.parent):
                return False
            try:
                file = self._files[name] = open_tensors(path)
                if file.describe() != entry:
                    return False
            except (GoldenDamaged, OSError):
                return False
        return INPUTS in self.manifest.files and not find_misfits(self.manifest)

    def case(self, name: str) -> CaseEntry:
        """Return a case's entry by name."""
        return next(case for case in self.manifest.cases if case.name == name)

    def tensor_names(self, case: str, phase: Phase) -> list[str]:
        """Return the names of a phase's recorded tensors of a case, sorted."""
        return sorted(self._names_in(phase_file(phase), case))

    def _names_in(self, file: str, case: str) -> list[str]:
        """Return the names of a case's tensors in a file.

        Sorted out once: a search of all keys for each case would take the square of their number.
        """
        if file not in self._names:
            by_case = self._names[file] = {}
            for key in self.manifest.files[file].tensors if file in self.manifest.files else ():
                owner, _, name = key.partition("/")
                by_case.setdefault(owner, []).append(name)
        return self._names[file].get(case, [])

    def tensor(self, case: str, phase: Phase, name: str) -> torch.Tensor:
        """Return a recorded output; raise GoldenNotFound where it is kept in compact form alone."""
        if name not in self.tensor_names(case, phase) and self.manifest.storage is Storage.COMPACT:
            raise GoldenNotFound(
                f"{self.manifest.title} is compact: it does not keep {name} of {case} whole",
                "record it with: snap record ... --update --storage full --reason TEXT",
            )
        return self._read(phase_file(phase), f"{case}/{name}")

    def read(self, part: str, key: str) -> torch.Tensor:
        """Return a tensor by its key in the file of "inputs" or of a phase."""
        return self._read(INPUTS if part == "inputs" else phase_file(Phase(part)), key)

    def read_file(self, file: str, key: str) -> torch.Tensor:
        """Return a tensor by its key in one of the set's files."""
        return self._read(file, key)

    def inputs(self, case: str) -> CaseInputs:
        """Return what the case's prompt and images became."""
        text = self.text(case)
        return CaseInputs(
            text.input_ids,
            text.attention_mask,
            pixel_values=self.image_input(case, PIXEL_VALUES),
            pixel_attention_mask=self.image_input(case, "pixel_attention_mask"),
            image_sizes=self.image_input(case, "image_sizes"),
            token_type_ids=text.token_type_ids,
        )

    def text(self, case: str) -> CaseInputs:
        """Return what the case's prompt became, without the images' megabytes."""
        ids = self._read(INPUTS, f"{case}/input_ids")
        mask = self._read(INPUTS, f"{case}/attention_mask")
        # A vision encoder's inputs have no tokens at all.
        masked = ids.numel() > 0 and not bool(mask.any())
        if bool((ids < 0).any()) or not bool((mask * (1 - mask) == 0).all()) or masked:
            raise GoldenDamaged(
                f"{set_file(self.folder, INPUTS)}: the ids or the mask of {case} are none"
            )
        types = f"{case}/token_type_ids"
        has_types = types in self.manifest.files[INPUTS].tensors
        return CaseInputs(
            ids, mask, token_type_ids=self._read(INPUTS, types) if has_types else None
        )

    def stored_inputs(self, case: str) -> dict[str, torch.Tensor]:
        """Return the case's part of inputs.safetensors as it is kept, packed or not."""
        names = self._names_in(INPUTS, case)
        return {name: self._read(INPUTS, f"{case}/{name}") for name in names}

    def eos_token_ids(self, case: str) -> tuple[int, ...]:
        """Return the tokens that end the case's generation."""
        return self.manifest.eos_token_ids(self.case(case))

    def images(self, case: str) -> Sequence[Image.Image]:
        """Return the case's images, from the pixels kept when recording."""
        from snapshot_tool.base.images import IMAGE_PARTS, from_arrays

        recipe = case_recipe(self.case(case)).recipe
        images = []
        for index, image in enumerate(recipe.images):
            parts = {p: self.image_input(case, f"image.{index}.{p}") for p in IMAGE_PARTS}
            arrays = {part: kept.numpy() for part, kept in parts.items() if kept is not None}
            images.append(from_arrays(arrays, mode=image.mode))
        return images

    def image_input(self, case: str, name: str) -> torch.Tensor | None:
        """Return a tensor of the case's images by its name; None without one."""
        # Unpacked where it is packed.
        key, names = f"{case}/{name}", self.manifest.files[INPUTS].tensors
        if key in names:
            return self._read(INPUTS, key)
        if key + SHAPE not in names:
            return None

        def read(part: str) -> torch.Tensor:
            if part not in names:
                raise KeyError(part)
            return self._read(INPUTS, part)

        try:
            return unpack(key, read)
        except (ValueError, KeyError) as error:
            raise GoldenDamaged(f"{set_file(self.folder, INPUTS)}: {key}: {error}") from error

    def image_input_shape(self, case: str, name: str) -> tuple[int, ...]:
        """Return the shape of such a tensor, of which nothing is read; () without one."""
        key, names = f"{case}/{name}", self.manifest.files[INPUTS].tensors
        if key + SHAPE in names:
            return tuple(self._read(INPUTS, key + SHAPE).tolist())
        return names[key].shape if key in names else ()

    def shape(self, case: str, phase: Phase, name: str) -> tuple[int, ...]:
        """Return the shape of a recorded output that is kept whole, of which nothing is read."""
        return self.manifest.files[phase_file(phase)].tensors[f"{case}/{name}"].shape

    def whole_output(self, case: str, module: str) -> torch.Tensor | None:
        """Return what a module of the reference returned on a case, where that was kept whole."""
        entry = self.manifest.files.get(OUTPUTS)
        key = f"{case}/{module}"
        return self._read(OUTPUTS, key) if entry and key in entry.tensors else None

    def taps(self, case: str) -> list[Tap]:
        """Return the sketches of the reference's modules on a case, in order of execution."""
        from snapshot_tool.goldens.parts import read_taps

        tensors = {n: self._read(TAPS, f"{case}/{n}") for n in self._names_in(TAPS, case)}
        if not tensors:
            return []
        try:
            return read_taps(tensors, self.manifest.taps.modules)
        except (ValueError, IndexError, KeyError, RuntimeError) as error:
            raise GoldenDamaged(f"{self.folder / TAPS}: taps of {case}: {error}") from error

    def _read(self, file: str, key: str) -> torch.Tensor:
        if file not in self._files:
            self._files[file] = open_tensors(set_file(self.folder, file))
        tensor = self._files[file].read(key)
        if file != TAPS and tensor.is_floating_point() and _has_nan(tensor):
            raise GoldenDamaged(f"{self.folder / file} holds NaN in {key}: nothing equals it")
        return tensor


def _has_nan(tensor: torch.Tensor) -> bool:
    """Tell whether an element is NaN: then the sum is, which is quickly added up."""
    # Infinities of both signs make it one, too.
    return bool(tensor.sum().isnan()) and bool(tensor.isnan().any())
