"""Loading a checkpoint with transformers: its class, checks of what is loaded, errors, warnings."""

from __future__ import annotations

import inspect
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import InvalidVersion, Version
from safetensors import safe_open

from snapshot_tool.base.checkpoint import weight_files
from snapshot_tool.base.errors import (
    CheckpointUnavailable,
    InputRefused,
    ReferenceUnavailable,
    SnapError,
    is_out_of_memory,
    printable,
)
from snapshot_tool.base.protocol import LoadSettings
from snapshot_tool.families.family import Family

_LONGEST_ERROR = 300  # characters
_LONGEST_WARNING = 400
_MOST = 100
_LOGGER = "transformers"
_PACKAGE = Path(transformers.__file__).parent
# About the use of Python interfaces, not about what is computed.
_ABOUT_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# Some files hold these, which models compute.
_BUFFERS = ("inv_freq", "masked_bias", "position_ids")


def require_filled(model: torch.nn.Module, report: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointUnavailable if files and model do not have the same weights.

    The files must not lack a weight, have one in another shape, or have one more for a module of
    the model, such as a bias or a layer that the configuration does not have. Weights of other
    modules, such as heads of other classes, take part in no answer.
    """
    modules = dict(model.named_modules())
    unexpected = [key for key in report.get("unexpected_keys", ()) if _belongs(key, modules)]
    for kind, keys, problem in (
        ("missing keys", report.get("missing_keys"), "does not have"),
        (
            "mismatched keys",
            report.get("mismatched_keys"),
            "has with another shape than its configuration",
        ),
        ("unexpected keys", unexpected, "has for a part of the model that does not take it"),
    ):
        if keys:
            first = min(map(str, keys))
            raise CheckpointUnavailable(
                f"{checkpoint} {problem}: {first}, first of {len(keys)} {kind}",
                "check that config.json and the weights are of the same model",
            )


def _belongs(weight: str, modules: Mapping[str, torch.nn.Module]) -> bool:
    """Return whether a weight is for a module of the model, or for a further layer of it."""
    owner, _, own_name = weight.rpartition(".")
    if own_name in _BUFFERS or not owner:
        return False
    if owner in modules:
        return True
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return isinstance(modules[owner], torch.nn.ModuleList)


def unused_weights(
    model: torch.nn.Module, report: Mapping[str, Any], checkpoint: Path
) -> tuple[str, ...]:
    """Return the names of the weights in the files that take part in no answer, sorted.

    These are weights that the model does not have, and those that are tied to another weight of
    the files and differ from it, such as an output head beside a tied embedding.
    """
    left = set(map(str, report.get("unexpected_keys", ())))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = dict(model.state_dict(keep_vars=True))
    tied = _tied(own)
    names = set()
    for file in weight_files(checkpoint):
        if not file.endswith(".safetensors"):
            continue
        with safe_open(checkpoint / file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                # transformers reports names with or without the base model's prefix.
                is_left = bool(left & {name, f"{prefix}{name}", name.removeprefix(prefix)})
                if is_left or (name in tied and not _is_same(stored.get_tensor(name), own[name])):
                    names.add(name)
    return tuple(sorted(map(printable, names)))


def _tied(own: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of weights that share their memory with another one."""
    by_place: dict[int, list[str]] = {}
    for name, weight in own.items():
        if weight.device.type != "meta" and weight.numel():
            by_place.setdefault(weight.data_ptr(), []).append(name)
    return {name for names in by_place.values() if len(names) > 1 for name in names}


def _is_same(stored: torch.Tensor, used: torch.Tensor) -> bool:
    return stored.shape == used.shape and torch.equal(stored.to(used.dtype), used.detach().cpu())


_SHOWN = 8


def _is_full_attention(value: Any) -> bool:
    return isinstance(value, list) and all(kind == "full_attention" for kind in value)


# Fields that a newer release computes by, with that release and a test for values that change
# nothing; a field counts only if the installed class does not know it. Found by comparing the
# parameters of all configuration classes of 4.51.3 with those of 4.57.6 and 5.24.0. Fields that add
# weights are left out: the weights do not fit the model then.
_NEWER: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "rope_parameters": ("5.0", operator.not_),
    "layer_types": ("4.53", _is_full_attention),
    "use_bidirectional_attention": ("4.57", operator.not_),
}


def unknown_fields(given: Mapping[str, Any], config: Any) -> tuple[str, ...]:
    """Return the fields of a config.json that the class of `config` does not have, sorted.

    given: the file's content. Fields of nested configurations have dotted names, such as
    text_config.pixel_shuffle_factor.
    """
    return tuple(sorted(printable(field) for field, _ in _unknown(given, config)))


def changed_fields(config: Any) -> tuple[str, ...]:
    """Return the fields that differ from their class's default, given all others, sorted.

    config: a transformers configuration. Fields of nested configurations have dotted names. A size
    that follows from others, such as head_dim, is not changed.
    """
    return tuple(sorted(printable(field) for field in _changed(config)))


def _changed(config: Any, place: str = "") -> Iterator[str]:
    kind, given = type(config), config.to_dict()
    for field in sorted(set(inspect.signature(kind).parameters) & set(given)):
        value = getattr(config, field, None)
        if isinstance(value, transformers.PretrainedConfig):
            yield from _changed(value, f"{place}{field}.")
            continue
        others = {name: other for name, other in given.items() if name != field}
        try:
            default = getattr(kind(**others), field, None)
        except Exception:
            default = None
        if value != default:
            yield f"{place}{field}"


def require_computed(given: Mapping[str, Any], config: Any, path: Path) -> None:
    """Raise CheckpointUnavailable for a config.json that takes a newer release to compute."""
    installed = Version(transformers.__version__)
    text = given.get("transformers_version")
    try:
        written = Version(text) if isinstance(text, str) else None
    except InvalidVersion:
        written = None
    unknown = dict(_unknown(given, config))
    if written is not None and written.major > installed.major:
        lacking = f", which does not have {_listed(unknown)}" if unknown else ""
        raise CheckpointUnavailable(
            f"{path} is of transformers {written}, installed is {installed}{lacking}",
            f"record it with transformers {written} or newer",
        )
    newer = {}
    for field, value in unknown.items():
        release, changes_nothing = _NEWER.get(field.rpartition(".")[2], ("", operator.not_))
        if release and not changes_nothing(value):
            newer[field] = Version(release)
    if newer:
        least = max(newer.values())
        needed = max(least, written) if written else least
        raise CheckpointUnavailable(
            f"{path} has {_listed(newer)}: newer releases use it, transformers {installed} "
            "does not have it",
            f"record it with transformers {needed} or newer",
        )


def _unknown(given: Mapping[str, Any], config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    known = _known_fields(type(config))
    for field, value in given.items():
        nested = getattr(config, field, None)
        if isinstance(nested, transformers.PretrainedConfig) and isinstance(value, Mapping):
            yield from _unknown(value, nested, f"{place}{field}.")
        elif field not in known and not field.startswith("_"):
            yield f"{place}{field}", value


def _known_fields(kind: type) -> set[str]:
    """Return the parameters of a configuration's class and its parents, and what all have."""
    names = set(transformers.PretrainedConfig().to_dict()) | {"auto_map", "quantization_config"}
    for parent in inspect.getmro(kind):
        names |= set(inspect.signature(parent).parameters) if "__init__" in vars(parent) else set()
        names |= set(vars(parent)) | set(getattr(parent, "attribute_map", {}))
    return names


def _listed(names: Mapping[str, Any]) -> str:
    shown = sorted(map(printable, names))
    return ", ".join(shown[:_SHOWN]) + (" …" if len(shown) > _SHOWN else "")


def placement(settings: LoadSettings) -> dict[str, Any]:
    """Return the arguments with which accelerate places a model; none without a device map."""
    if not settings.device_map:
        return {}
    most = {int(k) if k.isdigit() else k: size for k, size in settings.max_memory.items()}
    return {
        "device_map": settings.device_map,
        "max_memory": most or None,
        "offload_folder": settings.offload,
    }


def special_token(model: Any, name: str) -> Any:
    """Return a special token's id, from the generation configuration or else from the model's."""
    own = getattr(getattr(model, "generation_config", None), name, None)
    return own if own is not None else getattr(model.config, name, None)


def pad_token_id(model: Any, family: Family) -> int:
    """Return the id that pads prompts: the checkpoint's own if it has an embedding, else 0."""
    pad = special_token(model, "pad_token_id")
    rows = len(model.get_input_embeddings().weight) if family.takes_text else 0
    return int(pad) if pad is not None and 0 <= int(pad) < rows else 0


def find_model_class(family: Family, config: Mapping[str, Any], *, trusts_code: bool) -> Any:
    """Return transformers' class of a family, or the one that a trusted checkpoint brings."""
    found = getattr(transformers, family.hf_class, None)
    brought = config.get("auto_map") or {} if trusts_code else {}
    for auto, name in brought.items():
        if found is None and str(name).endswith(f".{family.hf_class}"):
            found = getattr(transformers, auto, None)
    if found is None:
        raise ReferenceUnavailable(
            f"transformers {transformers.__version__} has no {family.hf_class}",
            "record with a release that has it; if the checkpoint brings it: --trust-remote-code",
        )
    return found


def loading_settings(model: Any, family: Family, settings: LoadSettings) -> dict[str, str]:
    """Return what a manifest keeps of the way in which a model was loaded."""
    most = sorted(settings.max_memory.items())
    found = {
        "attention": str(model.config._attn_implementation),  # noqa: SLF001 - no other name
        **family.environment,
        "remote_code": "trusted" if settings.trusts_code else "",
        "device_map": settings.device_map,
        "max_memory": ", ".join(f"{device}={size}" for device, size in most),
    }
    return {name: text for name, text in found.items() if text}


def public_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out transformers' own notes, such as the path that a model was loaded from."""
    return {
        name: public_fields(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not name.startswith("_")
    }


@contextmanager
def raised_as(make: Callable[[str], Exception]) -> Iterator[None]:
    """Raise what `make` returns, given one line of text, in place of a library's error."""
    try:
        yield
    except (SnapError, InputRefused, KeyboardInterrupt):
        raise
    except BaseException as error:
        # BaseException: a panic in tokenizers is not an Exception, and code of the checkpoint
        # may call sys.exit.
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:_LONGEST_ERROR]
        kind = type(error).__name__
        raise make(f"{kind}: {text}" if text else kind) from error


class Warned(logging.Handler):
    """Collects warnings, each once. The path of `checkpoint` is left out of their text."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(logging.WARNING)
        # Its cache drops what an earlier recording in this process was warned of.
        transformers.utils.logging.warning_once.cache_clear()
        self.checkpoint = checkpoint
        self._texts: set[str] = set()

    def texts(self) -> tuple[str, ...]:
        """Return the warnings, sorted: a resumed recording meets them in another order."""
        return tuple(sorted(self._texts))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect the warnings of transformers inside the block, logged or raised."""
        logger = logging.getLogger(_LOGGER)
        logger.addHandler(self)
        try:
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                yield
        finally:
            logger.removeHandler(self)
            for warning in raised:
                of_transformers = Path(warning.filename).is_relative_to(_PACKAGE)
                if of_transformers and not issubclass(warning.category, _ABOUT_CODE):
                    self._add(str(warning.message))

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a logged warning."""
        self._add(record.getMessage())

    def _add(self, text: str) -> None:
        """Keep a warning on one line, without the folder's path, which differs by machine."""
        line = " ".join(text.replace(str(self.checkpoint), self.checkpoint.name).split())
        short = line if len(line) <= _LONGEST_WARNING else line[: _LONGEST_WARNING - 1] + "…"
        if len(self._texts) < _MOST:
            self._texts.add(printable(short))


def log_to_handlers_alone() -> None:
    """Make transformers log its warnings to our handlers, and nothing to the terminal."""
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.disable_propagation()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def loading(what: str, warned: Warned, settings: LoadSettings) -> Iterator[None]:
    """Collect warnings; raise CheckpointUnavailable for the errors of transformers."""
    remedy = (
        "install what it names as missing, or check that the checkpoint is whole and for "
        f"transformers {transformers.__version__}"
    )
    if settings.max_memory:  # transformers 4.51 takes no map that has everything on disk
        remedy = "allow more with --max-memory"

    def make(why: str) -> CheckpointUnavailable:
        return CheckpointUnavailable(
            f"transformers cannot load {what} of {warned.checkpoint}: {why}", remedy
        )

    with raised_as(make), warned.listening():
        yield
