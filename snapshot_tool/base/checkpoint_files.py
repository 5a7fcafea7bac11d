"""Which files of a checkpoint are loaded: only these are downloaded, digested and pinned.

transformers loads a model and its processor from files with fixed names, from the weights that the
index names, and from Python files if a configuration names code in them. Everything else in a
folder or a repository (a README, the same weights in other formats, notebooks) changes no answer.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from snapshot_tool.base.errors import CheckpointUnavailable

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODE = "*.py"
_POINTER = b"version https://git-lfs"
# Configurations that may name code of the checkpoint ("auto_map").
_CONFIGURATIONS = (
    CONFIG,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
_VOCABULARIES = (
    # The `vocab_files_names` of all tokenizers of transformers, pickled ones left out.
    "artists.json",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "genres.json",
    "lyrics.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "tokenizer.model",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
)
# Of the top folder, as patterns: a tokenizer may have files for several releases.
SMALL_FILES = (
    *_CONFIGURATIONS,
    *_VOCABULARIES,
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.*.json",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def loaded_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that are loaded, sorted.

    Files that the index of the weights names are returned whether they are there or not, and so is
    a link to a missing file. Raises CheckpointUnavailable for an index that cannot be read.
    """
    here = [path for path in folder.iterdir() if path.is_file() or path.is_symlink()]
    here += (folder / "additional_chat_templates").glob("*.jinja")
    names = [path.relative_to(folder).as_posix() for path in here]
    return sorted({*filter(is_small_file, names), *weight_files(folder), *code_files(folder)})


def is_small_file(name: str) -> bool:
    """Tell whether a file, by its name in the checkpoint, is loaded and is not weights or code."""
    # fnmatch's * matches a slash, too.
    return any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
        for pattern in SMALL_FILES
    )


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files with the weights, whether they are there or not.

    As transformers: one file, or else those that the index names.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    return [INDEX, *_shards(read_json(index), index)]


def code_files(folder: Path) -> list[str]:
    """Return the names of the Python files if a configuration names code of the checkpoint.

    All of them: one may import another.
    """
    return sorted(path.name for path in folder.glob(CODE)) if names_code(folder) else []


def names_code(folder: Path) -> bool:
    """Tell whether a configuration in a folder names code of the checkpoint."""
    return any(_names_code(folder / name) for name in _CONFIGURATIONS)


def _names_code(path: Path) -> bool:
    try:
        return path.is_file() and "auto_map" in read_json(path)
    except CheckpointUnavailable:
        return False  # recording reports what is wrong with it


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint; raise CheckpointUnavailable without one."""
    found = _parse(path)
    if not isinstance(found, dict):
        raise _damaged(path, "is not a JSON object")
    return found


def _parse(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not valid JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointUnavailable(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, f"is not UTF-8: {error}") from error


def _shards(index: dict[str, Any], path: Path) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path, "names no files: it has no weight_map")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not _is_inside(name):
            raise _damaged(path, f"names {name!r}, which is not a file of the checkpoint")
    return sorted(set(names))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def require_whole(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointUnavailable, naming a file, if one is missing, cut short or damaged."""
    for name in names:
        path = folder / name
        _require_file(path)
        if name.endswith(".safetensors"):
            _require_weights(path)
        elif name in _VOCABULARIES and name.endswith(".json"):
            _parse(path)
        elif name.endswith(".json"):
            read_json(path)
        elif name.endswith(".jinja"):
            _read_text(path)


def _require_file(path: Path) -> None:
    """Raise for a file that cannot be opened, an empty one, and what Git LFS leaves for one."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise CheckpointUnavailable(f"{path} cannot be read: {error.strerror}") from error
    if start == _POINTER:
        raise CheckpointUnavailable(
            f"{path} is a pointer of Git LFS, not the file itself", "fetch it with: git lfs pull"
        )
    if not start and not path.name.endswith((".txt", ".py")):
        raise _damaged(path, "is empty")


def _require_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open  # torch comes with it

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"is cut short or damaged: {error}") from error


def _damaged(path: Path, problem: str) -> CheckpointUnavailable:
    return CheckpointUnavailable(f"{path} {problem}", "download the file again, or restore it")
