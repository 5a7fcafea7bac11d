"""A golden set, opened for reading: its inputs, its outputs, whole or compact, and its oracle."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from snapshot_tool.base.errors import GoldenDamaged, GoldenNotFound
from snapshot_tool.base.localisation import noise_limit
from snapshot_tool.base.protocol import CaseInputs, Phase, Side
from snapshot_tool.base.tolerance import OracleTensor
from snapshot_tool.families import family_of
from snapshot_tool.families.family import Family
from snapshot_tool.goldens.images import (
    IMAGE_PARTS,
    LEVELS,
    PIXEL_VALUES,
    SHAPE,
    from_arrays,
    unpack,
)
from snapshot_tool.goldens.layout import (
    INPUTS,
    MODULE_INPUTS,
    ORACLE,
    OUTPUTS,
    PNG,
    PROBES,
    TAPS,
    phase_file,
)
from snapshot_tool.goldens.manifest import CaseEntry, Manifest, Storage, case_recipe
from snapshot_tool.goldens.parts import (
    DELTA,
    MODULE_NOISE,
    NOISE,
    STEP_NOISE,
    TAP_NOISE,
    TOKEN_IDS,
    read_probes,
    read_taps,
)
from snapshot_tool.goldens.tensors import TensorFile, open_tensors
from snapshot_tool.goldens.verify import open_set, refuse_damage, set_file
from snapshot_tool.numerics.compact import (
    PARTS,
    QUESTION,
    CompactTensor,
    make_question,
    read_compact,
)
from snapshot_tool.taps.sketches import Probe, Tap

# Which rows of a recorded tensor are judged; None: all.
Rows = slice | list[int] | None


@dataclass(frozen=True)  # without slots: cached_property needs a dictionary
class Golden:
    """A verified golden set. Its files are open; a tensor is read on request."""

    folder: Path
    manifest: Manifest
    _files: dict[str, TensorFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def root(self) -> Path:
        """The goldens folder."""
        return self.folder.parent.parent.parent

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.manifest.checkpoint.family)

    @cached_property
    def cases(self) -> Mapping[str, CaseEntry]:
        """The entries of all cases, by name, in the manifest's order."""
        return {case.name: case for case in self.manifest.cases}

    def case(self, name: str) -> CaseEntry:
        """Return a case's entry by name."""
        return self.cases[name]

    @cached_property
    def _names(self) -> Mapping[tuple[str, str], list[str]]:
        names: dict[tuple[str, str], list[str]] = {}
        for file, entry in self.manifest.files.items():
            for key in entry.tensors:
                case, _, name = key.partition("/")
                names.setdefault((file, case), []).append(name)
        return names

    def tensor_names(self, case: str, phase: Phase) -> list[str]:
        """Return the names of a phase's recorded tensors of a case, sorted."""
        return sorted(self._names.get((phase_file(phase), case), ()))

    def tensor(self, case: str, phase: Phase, name: str) -> torch.Tensor:
        """Return a recorded output; raise GoldenNotFound if only its compact form is kept."""
        if name not in self.tensor_names(case, phase) and self.manifest.storage is Storage.COMPACT:
            raise GoldenNotFound(
                f"{self.manifest.title} is compact: it does not keep {name} of {case} whole",
                "record it with: snap record ... --update --storage full --reason TEXT",
            )
        return self.read_file(phase_file(phase), f"{case}/{name}")

    def read_file(self, file: str, key: str) -> torch.Tensor:
        """Return a tensor by its key in one of the set's files; raise GoldenDamaged if it has NaN.

        The sketches of taps may have NaN.
        """
        if file not in self._files:
            self._files[file] = open_tensors(set_file(self.folder, file))
        tensor = self._files[file].read(key)
        # The sum is quick. It is NaN if an element is, or if there are infinities of both signs.
        may_have_nan = file != TAPS and tensor.is_floating_point() and bool(tensor.sum().isnan())
        if may_have_nan and bool(tensor.isnan().any()):
            raise GoldenDamaged(f"{self.folder / file} holds NaN in {key}: nothing equals it")
        return tensor

    def inputs(self, case: str) -> CaseInputs:
        """Return the case's inputs, images included."""
        return dataclasses.replace(
            self.text(case),
            pixel_values=self.image_input(case, PIXEL_VALUES),
            pixel_attention_mask=self.image_input(case, "pixel_attention_mask"),
            image_sizes=self.image_input(case, "image_sizes"),
        )

    def text(self, case: str) -> CaseInputs:
        """Return the case's inputs without those of images, which take megabytes."""
        ids = self.read_file(INPUTS, f"{case}/input_ids")
        mask = self.read_file(INPUTS, f"{case}/attention_mask")
        # A vision encoder's inputs have no tokens at all.
        masked = ids.numel() > 0 and not bool(mask.any())
        if bool((ids < 0).any()) or not bool((mask * (1 - mask) == 0).all()) or masked:
            raise GoldenDamaged(
                f"{set_file(self.folder, INPUTS)}: the ids or the mask of {case} are not valid"
            )
        return CaseInputs(ids, mask, token_type_ids=self.image_input(case, "token_type_ids"))

    def read_case(self, file: str, case: str) -> dict[str, torch.Tensor]:
        """Return the case's part of a file as it is stored, packed or not."""
        names = self._names.get((file, case), ())
        return {name: self.read_file(file, f"{case}/{name}") for name in names}

    def eos_token_ids(self, case: str) -> tuple[int, ...]:
        """Return the tokens that end the case's generation."""
        return self.manifest.eos_token_ids(self.case(case))

    def images(self, case: str) -> Sequence[Image.Image]:
        """Return the case's images, from the pixels kept when recording."""
        recipe = case_recipe(self.case(case)).recipe
        images = []
        for index, image in enumerate(recipe.images):
            parts = {p: self.image_input(case, f"image.{index}.{p}") for p in IMAGE_PARTS}
            arrays = {part: kept.numpy() for part, kept in parts.items() if kept is not None}
            images.append(from_arrays(arrays, mode=image.mode))
        return images

    def image_input(self, case: str, name: str) -> torch.Tensor | None:
        """Return one of the case's inputs by its name, unpacked; None if there is none."""
        names = self._names.get((INPUTS, case), ())
        if name in names:
            return self.read_file(INPUTS, f"{case}/{name}")
        if name + SHAPE not in names:
            return None
        parts = [part for part in (PNG, LEVELS, SHAPE) if name + part in names]
        stored = {part: self.read_file(INPUTS, f"{case}/{name}{part}") for part in parts}
        with self.decoding(INPUTS, f"{case}/{name}"):
            return unpack(stored)

    def image_input_shape(self, case: str, name: str) -> tuple[int, ...]:
        """Return the shape of such an input without reading it; () if there is none."""
        key, names = f"{case}/{name}", self.manifest.files[INPUTS].tensors
        if key + SHAPE in names:
            return tuple(self.read_file(INPUTS, key + SHAPE).tolist())
        return names[key].shape if key in names else ()

    def whole_output(self, case: str, module: str) -> torch.Tensor | None:
        """Return what a module of the reference returned on a case, if that was kept whole."""
        return self._find(OUTPUTS, f"{case}/{module}")

    def oracle(self, case: str, name: str) -> torch.Tensor | None:
        """Return what the oracle has of a case under a name; see `parts.DELTA`."""
        return self._find(ORACLE, f"{case}/{name}")

    def _find(self, file: str, key: str) -> torch.Tensor | None:
        entry = self.manifest.files.get(file)
        return self.read_file(file, key) if entry and key in entry.tensors else None

    def whole_modules(self, case: str) -> dict[tuple[str, Side], torch.Tensor]:
        """Return whole inputs and outputs of modules, if both are kept; nothing otherwise."""
        if (MODULE_INPUTS, case) not in self._names:
            return {}
        files = ((Side.INPUT, MODULE_INPUTS), (Side.OUTPUT, OUTPUTS))
        return {
            (module, side): tensor
            for side, file in files
            for module, tensor in self.read_case(file, case).items()
        }

    def probes(self) -> list[Probe]:
        """Return the probes of single modules, with the reference's outputs."""
        for case in self.cases:
            if stored := self.read_case(PROBES, case):
                with self.decoding(PROBES, "probes"):
                    return read_probes(stored, self.manifest.taps.modules)
        return []

    def taps(self, case: str) -> list[Tap]:
        """Return the sketches of the reference's modules on a case, in order of execution."""
        stored = self.read_case(TAPS, case)
        if not stored:
            return []
        with self.decoding(TAPS, f"taps of {case}"):
            return read_taps(stored, self.manifest.taps.modules)

    @contextmanager
    def decoding(self, file: str, what: str) -> Iterator[None]:
        """Raise GoldenDamaged if tensors of one of the set's files do not fit each other."""
        try:
            yield
        except (ValueError, IndexError, KeyError, RuntimeError) as error:
            path = set_file(self.folder, file)
            raise GoldenDamaged(
                f"{path}: {what} cannot be decoded: {error}", "record the set again"
            ) from error


def open_golden(folder: Path, manifest: Manifest | None = None) -> Golden:
    """Open the set in a folder; raise GoldenDamaged unless every file is as recorded.

    manifest: the set's, if it was read already. If the files do not fit it, it is read again.
    """
    manifest, files, damage = open_set(folder, manifest)
    refuse_damage(damage)
    return Golden(folder, manifest, files)


def recorded(golden: Golden, case: str, phase: Phase, name: str) -> torch.Tensor | CompactTensor:
    """Return a recorded output, whole if it is kept whole."""
    if f"{name}.{PARTS[0]}" not in golden.tensor_names(case, phase):
        return golden.tensor(case, phase, name)
    parts = {part: golden.tensor(case, phase, f"{name}.{part}") for part in PARTS}
    with golden.decoding(phase_file(phase), f"{name} of {case}"):
        return read_compact(parts, seed=golden.manifest.seed)


def recorded_shape(golden: Golden, case: str, phase: Phase, name: str) -> tuple[int, ...]:
    """Return the shape of a recorded output; raise GoldenNotFound if there is none."""
    if name in golden.tensor_names(case, phase):
        return golden.manifest.files[phase_file(phase)].tensors[f"{case}/{name}"].shape
    return tuple(recorded(golden, case, phase, name).shape)


def connector_input(golden: Golden, case: str, vision: str) -> torch.Tensor | None:
    """Return the input of the connector's recorded output; None if it is not kept.

    vision: the name of the encoder's output, which is the input in a set that keeps it whole.
    """
    names = golden.tensor_names(case, Phase.CONNECTOR)
    question = [name for name in names if name.partition(".")[0] == QUESTION]
    if question:
        kept = {name: golden.tensor(case, Phase.CONNECTOR, name) for name in question}
        with golden.decoding(phase_file(Phase.CONNECTOR), f"the input of {case}"):
            return make_question(kept, seed=golden.manifest.seed)
    if vision in golden.tensor_names(case, Phase.VISION):
        return golden.tensor(case, Phase.VISION, vision)
    return None


def oracle_tensor(
    golden: Golden,
    case: str,
    phase: Phase,
    tensor: str,
    *,
    reference: torch.Tensor,
    dtype: str,
    rows: Rows = None,
) -> OracleTensor | None:
    """Return a recorded tensor's float64 reference; None if the set has none for it.

    reference: the recorded tensor, or only those rows of it.
    """
    delta = golden.oracle(case, DELTA.format(phase, tensor))
    noise = golden.oracle(case, NOISE.format(phase, tensor, dtype))
    if delta is None or noise is None:
        return None
    if rows is not None:
        delta = delta[rows]
        # A tensor without a width has one number for all rows.
        noise = noise[rows] if noise.dim() else noise
    _require(
        delta.shape == reference.shape and noise.shape == reference.shape[:-1],
        f"{case} {phase.value} {tensor}",
    )
    return OracleTensor(reference, delta, noise)


def has_coarse_oracle(manifest: Manifest) -> bool:
    """Return whether a half-precision set keeps distances to the oracle in bfloat16.

    In a float32 set three digits are enough. In a half-precision set the distances are as large as
    its rounding, and three digits of them are coarser than float32 rounds.
    """
    entries = manifest.files[ORACLE].tensors.items()
    deltas = [entry.dtype for key, entry in entries if key.endswith(".delta")]
    return manifest.dtype != "float32" and "BF16" in deltas


def step_noise(golden: Golden, case: str, *, dtype: str) -> torch.Tensor | None:
    """Return the greatest error of a logit at each generation step, (new,) float32, or None."""
    noise = golden.oracle(case, STEP_NOISE.format(dtype))
    tokens = golden.tensor(case, Phase.GENERATE, TOKEN_IDS)
    _require(noise is None or noise.shape == tokens.shape, f"{case} generate")
    return noise


def tap_limits(
    golden: Golden, case: str, *, dtype: str, by_itself: bool = False
) -> Mapping[str, tuple[float, float]]:
    """Return how far off rounding may put each module's input and output, by name.

    Empty without an oracle. by_itself: for each module on the recorded inputs.
    """
    key = MODULE_NOISE if by_itself else TAP_NOISE
    rows = golden.oracle(case, key.format(dtype))
    if rows is None:
        return {}
    taps = golden.taps(case)
    _require(rows.shape == (len(taps), 2), f"{case} taps")
    eps = torch.finfo(getattr(torch, dtype)).eps
    return {
        tap.module: (noise_limit(given, eps=eps), noise_limit(returned, eps=eps))
        for tap, (given, returned) in zip(taps, rows.tolist(), strict=True)
    }


def _require(fits: bool, what: str) -> None:  # noqa: FBT001 - the condition itself
    if not fits:
        raise GoldenDamaged(f"{ORACLE} does not fit the recorded {what}", "record the set again")
