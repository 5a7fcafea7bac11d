"""Answers from elsewhere as a candidate: a folder with answers.json and answers.safetensors.

docs/answers.md explains both files. Nothing runs: a method returns the tensors of the case at hand,
and a phase without an answer is not supported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Literal

import msgspec
import torch

from snapshot_tool.base.checkpoint import is_small_file
from snapshot_tool.base.errors import AnswersInvalid, PhaseUnsupported, RevisionMismatch, suggest
from snapshot_tool.base.files import open_plain, require_bounded_json
from snapshot_tool.base.protocol import PHASES, Candidate, CandidateInfo, CaseInputs, Phase
from snapshot_tool.goldens import parts
from snapshot_tool.goldens.golden import Golden, connector_input
from snapshot_tool.goldens.layout import phase_file
from snapshot_tool.goldens.manifest import (
    CheckpointName,
    Device,
    Digest,
    Dtype,
    Positive,
    Revision,
    Text,
    case_recipe,
)
from snapshot_tool.goldens.tensors import TensorFile, open_tensors

PNG_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
_JSON, _TENSORS = "answers.json", "answers.safetensors"


class AskedGolden(msgspec.Struct, frozen=True):
    """The golden set that questions were made from."""

    checkpoint: CheckpointName
    revision: Revision
    device: Device
    dtype: Dtype
    golden_version: Positive

    @classmethod
    def of(cls, golden: Golden) -> AskedGolden:
        """Return the identity of a golden set."""
        manifest, checkpoint = golden.manifest, golden.manifest.checkpoint
        return cls(
            checkpoint.name,
            checkpoint.revision,
            manifest.device,
            manifest.dtype,
            manifest.golden_version,
        )


class AnswersHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """answers.json: who answered which questions.

    `checkpoint` has the SHA-256 of each weights file that was loaded. `dtype` is a torch dtype's
    name, or another word for quantised arithmetic, which is judged like float32.
    """

    schema: Literal["snap-answers/1"]
    golden: AskedGolden
    engine: Text
    version: Text
    device: Text
    dtype: Text
    checkpoint: tuple[Digest, ...]
    note: Text = ""


def wanted_answers(golden: Golden, case: str) -> list[str]:
    """Return the names of the tensors that answer a case, as <phase>.<tensor>."""
    family, entry = golden.family, golden.case(case)
    wanted: list[str] = []
    for phase in PHASES:
        if phase not in entry.phases or phase_file(phase) not in golden.manifest.files:
            continue
        names = {name.partition(".")[0] for name in golden.tensor_names(case, phase)}
        match phase:
            case Phase.PREPROCESSING:
                inputs = ("pixel_values", "pixel_attention_mask")
                images = case_recipe(entry).recipe.images
                is_png = all(image.mode in PNG_MODES for image in images)
                found = [name for name in inputs if is_png and golden.image_input_shape(case, name)]
            case Phase.GENERATE:
                found = [parts.TOKEN_IDS, parts.TOPK_IDS, parts.TOPK_LOGPROBS]
            case _:
                found = [name for name in family.judged_outputs(phase) if name in names]
                if phase is Phase.FORWARD and family.logits:
                    found += [parts.LOGITS, parts.TOPK_IDS, parts.TOPK_LOGPROBS]
        wanted += [f"{phase}.{name}" for name in found]
    return wanted


def question_inputs(golden: Golden, case: str) -> dict[str, torch.Tensor]:
    """Return the inputs of a case by name; `connector_input` is that of the connector."""
    inputs = golden.inputs(case)
    named = {name: getattr(inputs, name) for name in CaseInputs.__dataclass_fields__}
    if Phase.CONNECTOR in golden.case(case).phases:
        vision = golden.family.compared[Phase.VISION]
        named["connector_input"] = connector_input(golden, case, vision)
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def weight_digests(golden: Golden) -> dict[str, str]:
    """Return the SHA-256 of each weights file of the checkpoint, by its name."""
    files = golden.manifest.checkpoint.files.items()
    return {name: digest for name, digest in files if not is_small_file(name)}


def read_header(folder: Path) -> AnswersHeader:
    """Return who answered; raise AnswersInvalid if answers.json is not valid."""
    path = folder / _JSON
    if not path.is_file():
        raise AnswersInvalid(f"{path} is missing", "see docs/answers.md for the files of answers")
    with open_plain(path) as file:
        try:
            return msgspec.json.decode(require_bounded_json(file.read()), type=AnswersHeader)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise AnswersInvalid(
                f"{path} is not valid: {error}", "see docs/answers.md for its fields"
            ) from error


class Answers(Candidate):
    """The answers of a folder; `file` has the tensors, by <case>/<phase>.<tensor>.

    The method of each phase returns the answers of `case`, whatever its inputs.
    """

    def __init__(self, header: AnswersHeader, file: TensorFile) -> None:
        self.header = header
        self.case = ""
        self._file = file
        for phase in PHASES:
            method = "preprocess" if phase is Phase.PREPROCESSING else phase.value
            setattr(self, method, functools.partial(self._answers, phase))

    def info(self) -> CandidateInfo:
        """Return who answered."""
        note = (self.header.note,) if self.header.note else ()
        folder = str(self._file.path.parent)
        return CandidateInfo(self.header.engine, folder, self.header.version, notes=note)

    def _answers(
        self, phase: Phase, *_inputs: object, **_options: object
    ) -> Mapping[str, torch.Tensor]:
        prefix = f"{self.case}/{phase}."
        names = [key.removeprefix(prefix) for key in self._file.spans if key.startswith(prefix)]
        if not names:
            raise PhaseUnsupported("not answered")
        return {name: self._file.read(prefix + name) for name in names}


def open_answers(folder: Path, golden: Golden) -> Answers:
    """Open the answers in a folder.

    Raises RevisionMismatch if they are of another golden set, version or checkpoint, and
    AnswersInvalid if a tensor answers no question.
    """
    header = read_header(folder)
    asked, own = header.golden, AskedGolden.of(golden)
    for field in AskedGolden.__struct_fields__:
        if getattr(asked, field) != getattr(own, field):
            what, here = (f"{field} {getattr(one, field)}" for one in (asked, own))
            raise RevisionMismatch(
                f"{folder} answers questions of {what}, {golden.folder} has {here}",
                f"ask and answer again: snap ask {golden.folder} --out DIR",
            )
    known = set(weight_digests(golden).values())
    if not header.checkpoint or not known.issuperset(header.checkpoint):
        wrong = next((digest for digest in header.checkpoint if digest not in known), "no file")
        raise RevisionMismatch(
            f"{folder} was answered with weights that {golden.manifest.checkpoint.name} does not "
            f"have: {wrong}",
            "answer with the checkpoint of the golden set; questions.json has its digests",
        )
    file = open_tensors(folder / _TENSORS)
    for case, keys in groupby(sorted(file.spans), key=lambda key: key.partition("/")[0]):
        if case not in golden.cases:
            raise AnswersInvalid(
                f"{file.path} answers an unknown case: {case}", suggest(case, list(golden.cases))
            )
        wanted = wanted_answers(golden, case)
        for key in keys:
            name = key.partition("/")[2]
            if name not in wanted:
                raise AnswersInvalid(
                    f"{file.path} has an unknown answer: {key}", suggest(name, wanted)
                )
            if ".topk_" in name or name.endswith(parts.TOKEN_IDS):
                _require_tokens(file, key, golden)
    return Answers(header, file)


def _require_tokens(file: TensorFile, key: str, golden: Golden) -> None:
    """Raise AnswersInvalid for tokens or log-probabilities that cannot be compared."""
    stem = key.rpartition(".")[0]
    ids, values = (
        file.spans.get(f"{stem}.{name}") for name in (parts.TOPK_IDS, parts.TOPK_LOGPROBS)
    )
    problem = ""
    if key.endswith("_ids") and file.spans[key].dtype != "I64":
        problem = "must be int64"
    elif not key.endswith(parts.TOKEN_IDS):
        case = key.partition("/")[0]
        vocabulary = golden.manifest.files[phase_file(Phase.FORWARD)].tensors
        least = min(parts.TOP_K, *vocabulary[f"{case}/{parts.LOGITS}"].shape)
        if ids is None or values is None or ids.shape != values.shape or len(ids.shape) != 2:  # noqa: PLR2004
            problem = "needs topk_ids and topk_logprobs of one shape, (rows, k)"
        elif ids.shape[1] < least:
            problem = f"has {ids.shape[1]} tokens at each position, needed are {least}"
        elif "/generate." in key and f"{stem}.{parts.TOKEN_IDS}" not in file.spans:
            problem = "needs generate.token_ids"
    if problem:
        raise AnswersInvalid(f"{file.path}: {key} {problem}", "see docs/answers.md")
