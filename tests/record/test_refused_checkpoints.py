"""What libraries raise about a checkpoint is reported as the checkpoint's, never as snap's."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from snapshot_tool.base.checkpoint import is_small_file
from snapshot_tool.base.errors import ReferenceUnavailable, SnapError, UsageError
from snapshot_tool.base.protocol import Phase
from snapshot_tool.goldens.manifest import case_recipe
from tests.conftest import Snap
from tests.record.checkpoints import (
    IDEFICS3,
    LLAMA,
    build_checkpoint,
    copy_checkpoint,
    edit_json,
    edit_weights,
    manifest_of,
    record_here,
)

pytestmark = pytest.mark.record

Spoil = Callable[[Path], object]


def written(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Return what changes the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edited(name: str, **fields: object) -> Spoil:
    """Return what changes fields of a JSON file."""
    return lambda folder: edit_json(folder / name, **fields)


def with_large_ids(folder: Path) -> None:
    """Give the letters of the tokenizer ids that no embedding is for."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {t: n + (50_000 if n > 40 else 0) for t, n in vocabulary.items()}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (written("config.json", lambda b: b[: len(b) // 2]), "config.json is not valid JSON"),
        (written("config.json", lambda b: b"\xef\xbb\xbf" + b), "config.json is not valid JSON"),
        (written("config.json", lambda b: b.decode().encode("utf-16")), "config.json is not UTF-8"),
        (written("config.json", lambda _: b"[]"), "config.json is not a JSON object"),
        (written("generation_config.json", lambda _: b"{"), "generation_config.json"),
        (written("tokenizer.json", lambda b: b[:-9]), "tokenizer.json is not valid JSON"),
        (written("tokenizer_config.json", lambda b: b[:-2] + b'"\xe9"}'), "tokenizer_config.json"),
        (written("model.safetensors", lambda b: b[:-9]), "model.safetensors is cut short"),
        (written("model.safetensors", lambda _: b""), "model.safetensors is empty"),
        (
            written("model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
            "model.safetensors is a Git LFS pointer",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "the processor of"),
        (edited("tokenizer_config.json", tokenizer_class="NoSuch"), "the processor of"),
        (edited("config.json", hidden_act="nonsense"), "the model of"),
        (edited("config.json", rope_scaling={"rope_type": "nonsense"}), "nonsense"),
        (edited("config.json", num_hidden_layers=1), "unexpected keys"),
        (
            lambda folder: edit_weights(folder, **{"model.norm.weight": None}),
            "does not have: model",
        ),
        (edited("config.json", hidden_size="64"), "TypeError"),
        (edited("generation_config.json", eos_token_id="</s>"), "</s>"),
        (with_large_ids, "has no embedding"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path: Path, spoil: Spoil, named: str) -> None:
    """The file, or the case, what is wrong, and what to do."""
    folder = copy_checkpoint(LLAMA, tmp_path / "ck")
    spoil(folder)
    with pytest.raises(SnapError) as caught:
        record_here(folder, tmp_path / "goldens")
    assert named in caught.value.problem
    assert caught.value.remedy
    assert not list(tmp_path.glob("goldens/*/*/*/manifest.json"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system message must come first') }}",
        "{{ messages[0].content.parts.first }}",
        "{% for %}",
        None,
    ],
    ids=["raises", "undefined", "syntax", "none"],
)
def test_variants_are_drawn_without_a_chat_template_that_raises(
    tmp_path: Path, template: str | None
) -> None:
    """As of a checkpoint without a template; the refusals are counted by reason."""
    folder = copy_checkpoint(LLAMA, tmp_path / "ck")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    manifest = record_here(folder, tmp_path / "goldens", variants=5, max_new_tokens=2)
    assert sum(case.origin == "variant" for case in manifest.cases) == 5
    assert not any(case_recipe(case).recipe.chat for case in manifest.cases)
    assert all("chat template" in reason for reason in manifest.draws.reasons)
    assert manifest.draws.refused == 1


def test_a_case_that_the_reference_refuses_is_left_out_with_its_reason(
    snap: Snap, tmp_path: Path
) -> None:
    """The others are recorded; a context of 16 tokens is too short for the first fixed case."""
    folder = copy_checkpoint(LLAMA, tmp_path / "ck")
    edit_json(folder / "config.json", max_position_embeddings=16)
    goldens = tmp_path / "goldens"
    run = snap("record", "--checkpoint", folder, "--goldens", goldens, "--variants", 4)
    assert run.code == 0, run.err
    manifest = manifest_of(goldens)
    left_out = manifest["draws"]["left_out"]
    assert left_out["one-sentence"] == "19 tokens, the model takes 16"
    # The fourth variant has at least 60 words.
    assert left_out.keys() == {"one-sentence", "variant-04"}
    assert not left_out.keys() & {case["name"] for case in manifest["cases"]}
    for shown in (run.err, snap("show", "--goldens", goldens).out):
        assert "one-sentence" in shown
        assert "19 tokens, the model takes 16" in shown


@pytest.mark.parametrize(
    "fields", [{"image_std": [0.0, 0.5, 0.5]}, {"size": 128}, {"resample": 99}], ids=str
)
def test_a_model_of_images_is_not_recorded_without_one(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    """Cases without images would leave its encoder unjudged."""
    folder = copy_checkpoint(IDEFICS3, tmp_path / "ck")
    edit_json(folder / "preprocessor_config.json", **fields)
    with pytest.raises(ReferenceUnavailable, match="case one-image"):
        record_here(folder, tmp_path / "goldens")


def test_a_table_of_positions_ends_where_new_tokens_would_go_beyond_it(
    tmp_path: Path,
) -> None:
    """GPTBigCode has no row for a position that its configuration does not count."""
    folder = build_checkpoint("gpt-bigcode", tmp_path)
    shorten_positions(folder, 24)
    manifest = record_here(folder, tmp_path / "goldens", max_new_tokens=20)
    assert manifest.draws.left_out["one-sentence"].startswith("19 tokens and 20 new ones")
    assert all(case.tokens + 19 <= 24 for case in manifest.cases)


def shorten_positions(folder: Path, length: int) -> None:
    """Cut a GPTBigCode's table of positions."""
    from safetensors.torch import load_file

    edit_json(folder / "config.json", n_positions=length)
    name = "transformer.wpe.weight"
    table = load_file(folder / "model.safetensors")[name]
    edit_weights(folder, **{name: table[:length].clone()})


def test_a_phase_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    """A set of no phase would be no golden."""
    with pytest.raises(UsageError, match="llama has no phase vision"):
        record_here(LLAMA, tmp_path / "goldens", phase=(Phase.VISION,))


def test_the_vocabularies_of_all_tokenizers_count_as_files_of_a_checkpoint() -> None:
    """Each module of transformers names its files; pickled ones are not read."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    files: set[str] = set()
    for path in models.glob("*/tokenization_*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id="VOCAB_FILES_NAMES")], value=names):
                    files |= set(ast.literal_eval(names).values())
    assert len(files) > 20
    assert {file for file in files if not is_small_file(file)} <= {"vocab.pkl", "vocab.bin"}
