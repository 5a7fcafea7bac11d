"""Families on the installed FMS, without Hugging Face: committed golden sets, and faults in FMS."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from snapshot_tool.base.errors import UsageError
from snapshot_tool.base.recipes import InputKind, fixed_cases
from snapshot_tool.families import FAMILIES, Family, family_of_config, register
from snapshot_tool.record.variants import draw_recipe
from tests.conftest import ROOT, Run, Snap, error_lines
from tests.families.findings import FINDINGS, REPAIRS
from tests.families.table import RELEASES, recorded
from tests.families.versions import VERSIONS
from tests.fms_checkout.build import installed_fms
from tests.mutants.mutant import Edit, edit_file

COMMITTED = Path(__file__).parent
LLAMA, ROBERTA, LLAVA = "llama", "roberta", "llava-next"
LLAMA_3, GRANITE, CLASSES, MPNET = "llama-3", "granite", "roberta-classification", "mpnet"
BIGCODE = "gpt-bigcode"
RECORDED = (LLAVA, LLAMA_3, GRANITE, CLASSES, MPNET, BIGCODE)
FAULTS = {
    "llama-rope": (
        LLAMA,
        "model.layers.0.self_attn",
        "forward",
        Edit(
            "fms/models/llama.py",
            "ratio=self.config.rope_theta,", "ratio=10_000.0,",
        ),
    ),
    "llama-position-while-decoding": (
        LLAMA,
        None,
        "generate",
        Edit(
            "fms/utils/generation.py",
            "position_ids = position_ids[:, -1:] + 1\n",
            "position_ids = position_ids[:, -1:] + 9\n",
        ),
    ),
    "roberta-token-types": (
        ROBERTA,
        "roberta.embeddings",
        "forward",
        Edit(
            "fms/models/roberta.py",
            "x = x_emb + token_type_out + position_out", "x = x_emb + position_out",
        ),
    ),
    "bigcode-activation": (
        BIGCODE,
        "transformer.h.0.mlp.act",
        "forward",
        Edit(
            "fms/models/gpt_bigcode.py",
            "activation_fn=str_to_activation(self.config.activation_fn)",
            'activation_fn=str_to_activation("relu")',
        ),
    ),
    "llava-causal-vision": (
        LLAVA,
        "vision_tower.vision_model.encoder.layers.0.self_attn",
        "vision",
        Edit(
            "fms/models/siglip_vision.py",
            'attn_kwargs.get("attn_name", "sdpa_bidirectional")',
            'attn_kwargs.get("attn_name", "sdpa_causal")',
        ),
    ),
    "llava-activation": (
        LLAVA,
        "multi_modal_projector.act",
        "connector",
        Edit(
            "fms/models/llava_next.py",
            "self.act = str_to_activation(config.projector_hidden_act)",
            'self.act = str_to_activation("relu")',
        ),
    ),
    "llava-logits": (
        LLAVA,
        None,
        "forward",
        Edit(
            "fms/models/granite.py",
            "preds = preds / self.config.logits_scaling", "preds = preds * 1.0",
        ),
    ),
}  # fmt: skip


Former = Mapping[str, Sequence[tuple[str, str]]]
WITHOUT_ROPE_SCALING: Former = {
    "models/llama.py": (
        ("    rope_scaling: dict = field(default_factory=lambda: {})\n", ""),
        ("self.config.rope_scaling", "{}"),
    )
}
# What older releases of FMS had, and a checkpoint that they are right about.
FORMER: Sequence[tuple[str, Former]] = (
    (LLAMA, WITHOUT_ROPE_SCALING),
    (
        GRANITE,
        {
            "models/granite.py": (
                ("    head_dim: int = 128", "    #"),
                ("self.config.head_dim", "self.config.emb_dim // self.config.nheads"),
            ),
            "models/llava_next.py": [("    head_dim=64,\n", "")],
        },
    ),
    (LLAVA, {"models/llava_next.py": [('kwargs.get("use_cache")', 'kwargs["use_cache"]')]}),
    (CLASSES, {"utils/generation.py": [("def pad_input_ids(", "def pad_otherwise(")]}),
    (LLAMA, {"utils/generation.py": [("prepare_model_inputs_hook", "hook")]}),
    (
        ROBERTA,
        {
            "utils/serialization.py": [
                ("    adapter_kwargs: Mapping[str, Any],\n) -> Mapping", ") -> Mapping"),
                ("adapter(state_dict, **adapter_kwargs)", "adapter(state_dict)"),
            ]
        },
    ),
)


def broken_fms(edit: Edit, out: Path) -> Path:
    """Copy the installed FMS and edit the copy."""
    shutil.copytree(installed_fms(), out / "fms")
    edit_file(edit, root=out)
    return out


def former_fms(formerly: Former, out: Path) -> Path:
    """Copy the installed FMS, with some of its code as it was in older releases."""
    shutil.copytree(installed_fms(), out / "fms")
    for file, changes in formerly.items():
        path = out / "fms" / file
        source = path.read_text("utf-8")
        for now, then in changes:
            assert now in source
            source = source.replace(now, then)
        path.write_text(source, "utf-8")
    return out


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of each family's golden set: committed, or recorded now."""
    out = tmp_path_factory.mktemp("recorded")
    program = [".venv-record/bin/python", "-m", "tests.families.record"]
    command = [*program, "--out", str(out), "--variants", "0", *RECORDED]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {LLAMA: COMMITTED, ROBERTA: COMMITTED, **dict.fromkeys(RECORDED, out)}


def check(snap: Snap, folder: Path, name: str, *options: object) -> Run:
    """Check one family's golden set."""
    where = ("--goldens", folder / "goldens", "--checkpoint", folder / "checkpoints" / name)
    return snap("check", *where, "--json", "-", *options)


@pytest.mark.parametrize("name", [LLAMA, ROBERTA, LLAVA, CLASSES, MPNET, BIGCODE])
def test_the_installed_fms_passes(snap: Snap, folders: dict[str, Path], name: str) -> None:
    """Every phase that FMS has passes, and every other one is a skip with its reason."""
    run = check(snap, folders[name], name)
    assert run.code == 0, run.out
    verdicts = {(r["phase"], r["verdict"]) for r in run.report["results"]}
    passed = {phase for phase, verdict in verdicts if verdict == "pass"}
    text = {"forward"} if name in (ROBERTA, CLASSES, MPNET) else {"forward", "generate"}
    assert passed == (text | {"vision", "connector"} if name == LLAVA else text)
    reasons = {r["reason"] for r in run.report["results"] if r["verdict"] == "skip"}
    known = r"the family \w+ has no such phase|FMS has no preprocess of llava_next"
    assert all(re.fullmatch(known, reason) for reason in reasons)
    assert run.report["environment"]["transformers_imported"] is False


def test_an_encoders_head_is_asked_with_padding_and_in_batches(
    snap: Snap, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A head that forgets all rows but the first is right about every text by itself."""
    rows = "x = x[:, 0] * (torch.arange(len(x)) == 0)[:, None]"
    edit = Edit("fms/modules/head.py", "x = x[:, 0]", rows)
    wrong = "--fms-path", broken_fms(edit, tmp_path)
    for options, batches in ((), "pass"), (wrong, "fail"):
        run = check(snap, folders[CLASSES], CLASSES, "--explore", 24, *options)
        assert run.code == (batches == "fail")
        kinds = {kind["kind"]: kind["verdict"] for kind in run.report["exploration"]["kinds"]}
        assert (kinds["padding"], kinds["batch"]) == ("pass", batches)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_familys_code_shows_in_its_phase(
    snap: Snap, folders: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    """Exit 1; the first phase that differs, and the module, are those whose code was changed."""
    name, module, phase, edit = FAULTS[fault]
    run = check(snap, folders[name], name, "--fms-path", broken_fms(edit, tmp_path))
    assert run.code == 1
    assert run.report["first_divergence"]["phase"] == phase
    if module is not None:
        assert run.report["first_divergence"]["module"] == module


def test_fms_lays_out_padded_prompts_by_itself(
    snap: Snap, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A pad_input_ids from before FMS's 32bfbc89, which lets tokens see the padding, fails."""
    edit = Edit(
        "fms/utils/generation.py",
        "torch.cat((is_pad, non_pads))", "torch.cat((pads.bool(), non_pads))",
    )  # fmt: skip
    run = check(snap, folders[LLAMA], LLAMA, "--fms-path", broken_fms(edit, tmp_path))
    assert run.code == 1
    failed = {r["case"] for r in run.report["results"] if r["verdict"] == "fail"}
    (manifest,) = (m for name, m in recorded(folders[LLAMA]) if name == LLAMA)
    assert failed == {case.name for case in manifest.cases if case.recipe["left_padding"]}
    assert any("padding" in note for note in run.report["environment"]["candidate"]["notes"])


@pytest.mark.parametrize(("name", "formerly"), FORMER)
def test_an_fms_from_before_passes(
    snap: Snap, folders: dict[str, Path], tmp_path: Path, name: str, formerly: Former
) -> None:
    """A field or function that an older FMS lacks is no failure if it computes the same."""
    fms = former_fms(formerly, tmp_path)
    run = check(snap, folders[name], name, "--fms-path", fms)
    assert run.code == 0, run.err
    if formerly is WITHOUT_ROPE_SCALING:
        # This checkpoint scales its rotary frequencies.
        refused = check(snap, folders[LLAMA_3], LLAMA_3, "--fms-path", fms)
        assert refused.code == 3
        assert "has no field rope_scaling" in error_lines(refused)[0]


def test_a_release_in_a_folder_is_named_by_its_version(
    snap: Snap, folders: dict[str, Path], tmp_path: Path
) -> None:
    """From the metadata beside the package, not from those of the installed FMS."""
    shutil.copytree(installed_fms(), tmp_path / "fms")
    metadata = tmp_path / "ibm_fms-1.2.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ibm-fms\nVersion: 1.2.3\n")
    run = check(snap, folders[LLAMA], LLAMA, "--fms-path", tmp_path, "--case", "one-*")
    candidate = run.report["environment"]["candidate"]
    assert (candidate["path"], candidate["version"]) == (str(tmp_path), "1.2.3")
    assert candidate["commit"] == ""


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_declaration_is_one_that_a_user_could_make(family: Family) -> None:
    """It has something to compare, and its patterns compile."""
    assert FAMILIES[family.name] is family
    register(replace(family, name=f"copy-of-{family.name}", hf_class="NoClass"))


def test_a_configuration_is_of_the_family_that_its_class_names() -> None:
    """One class may serve several text models; an unknown class is named in the error."""
    assert family_of_config({"architectures": ["LlamaForCausalLM"]}).name == "llama"
    config = {"architectures": ["Mistral3ForConditionalGeneration"]}
    assert family_of_config({**config, "text_config": {"model_type": "mistral"}}).name == "mistral3"
    newer = {**config, "text_config": {"model_type": "ministral3"}}
    assert family_of_config(newer).name == "ministral3"
    with pytest.raises(UsageError, match="Mistral3ForConditionalGeneration"):
        family_of_config({**config, "text_config": {"model_type": "llama"}})
    with pytest.raises(UsageError, match="model_type 'mamba' is not supported"):
        family_of_config({"model_type": "mamba"})


@pytest.mark.parametrize("kind", InputKind)
def test_inputs_are_of_the_familys_kind(kind: InputKind) -> None:
    """Text families get no images, and vision encoders one in every case."""
    drawn = [draw_recipe(seed=1, index=index, attempt=0, kind=kind) for index in range(12)]
    recipes = [*drawn, *(named.recipe for named in fixed_cases(kind))]
    counts = {len(recipe.images) for recipe in recipes}
    if kind in (InputKind.TEXT, InputKind.ENCODER_TEXT):
        assert counts == {0}
        assert any(recipe.left_padding for recipe in recipes)
    elif kind is InputKind.IMAGES:
        assert min(counts) >= 1
    else:
        assert counts >= {0, 1, 2}


def test_the_page_names_every_finding_and_twelve_families() -> None:
    """docs/families.md has all rows, findings and releases."""
    text = (ROOT / "docs" / "families.md").read_text("utf-8")
    count = re.search(r"^(\d+) families pass", text, re.MULTILINE)
    assert count is not None
    assert int(count[1]) >= 12
    for name in (*FINDINGS, *REPAIRS):
        assert f"**{name}**" in text
    for name in FAMILIES:
        assert f" {name} |" in text
    _, _, releases = text.partition(RELEASES)
    assert f"| checkpoint | {' | '.join(VERSIONS)} | main" in releases
    for name in (LLAMA, ROBERTA, LLAVA, *FINDINGS):
        assert f"| {name} |" in releases
