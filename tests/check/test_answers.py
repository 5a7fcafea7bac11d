"""`snap ask` writes questions, and `snap judge` judges what others answer."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from snapshot_tool.base.protocol import Phase
from snapshot_tool.candidates.fms.candidate import FmsCandidate
from snapshot_tool.goldens.golden import Golden
from tests.conftest import GOLDENS, ROOT, Run, Snap, set_folder
from tests.examples.answer import answer

Answers = dict[str, torch.Tensor]
CASE = "variant-02"  # text alone, the shortest


@pytest.fixture(scope="module")
def asked(snap: Snap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the questions of the committed golden set."""
    folder = tmp_path_factory.mktemp("asked") / "questions"
    run = snap("ask", "--out", folder)
    assert run.code == 0, run.err
    return folder


@pytest.fixture(scope="module")
def questions(asked: Path) -> dict[str, Any]:
    """Read questions.json."""
    found: dict[str, Any] = json.loads((asked / "questions.json").read_text())
    return found


@pytest.fixture(scope="module")
def answered(
    asked: Path,
    questions: dict[str, Any],
    candidate: FmsCandidate,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Let FMS answer all questions by the script of the documentation."""
    folder = tmp_path_factory.mktemp("answered") / "answers"
    weights = list(questions["weights"].values())
    who = {"engine": "fms", "version": "1", "device": "cpu", "dtype": "float32"}
    before = [(weight, weight.requires_grad) for weight in candidate.model.parameters()]
    answer(candidate.model, asked, folder, **who, checkpoint=weights)
    for weight, required in before:  # other tests have the same model
        weight.requires_grad_(required)
    return folder


Change = Callable[[Answers, dict[str, Any]], object]


@pytest.fixture
def changed(answered: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Return a function that copies the answers and changes tensors or the header of the copy."""

    def copy(change: Change) -> Path:
        tensors = load_file(answered / "answers.safetensors")
        header = json.loads((answered / "answers.json").read_text())
        change(tensors, header)
        folder = tmp_path / "changed"
        folder.mkdir()
        save_file(tensors, folder / "answers.safetensors")
        (folder / "answers.json").write_text(json.dumps(header))
        return folder

    return copy


def verdict_of(run: Run, tensor: str, case: str = CASE) -> str:
    """Return the verdict on a tensor."""
    results = run.report["results"]
    (found,) = [r["verdict"] for r in results if (r["case"], r["tensor"]) == (case, tensor)]
    return str(found)


def test_questions_are_the_inputs_of_the_golden_set(
    asked: Path, questions: dict[str, Any], golden: Golden
) -> None:
    """Every case is asked with its ids, pixel values, limits, and images that PNG can hold."""
    tensors = load_file(asked / "questions.safetensors")
    assert [case["name"] for case in questions["cases"]] == list(golden.cases)
    for case in questions["cases"]:
        name, inputs = case["name"], golden.inputs(case["name"])
        assert case["input_ids"] == inputs.input_ids[0].tolist()
        assert case["eos_token_ids"] == list(golden.eos_token_ids(name))
        if inputs.pixel_values is not None:
            assert torch.equal(tensors[f"{name}/pixel_values"], inputs.pixel_values)
        for file, image in zip(case["images"], golden.images(name), strict=True):
            assert (file is None) == (image.mode == "CMYK")
            if file:
                kept = Image.open(asked / file)
                assert kept.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_a_folder_with_files_is_left_as_it_is(snap: Snap, asked: Path) -> None:
    """Questions never replace what is there."""
    run = snap("ask", "--out", asked)
    assert run.code == 2
    assert "not an empty folder" in run.err


def test_log_probabilities_of_a_correct_port_pass(snap: Snap, answered: Path) -> None:
    """Prompts, steps and tokens pass; phases that were not answered are skipped, never passed."""
    run = snap("judge", answered, "--json", "-")
    assert (run.code, run.report["verdict"], run.report["answered"]) == (0, "pass", True)
    assert verdict_of(run, "position_logprobs") == verdict_of(run, "token_ids") == "pass"
    by_phase: dict[str, set[str]] = {}
    for result in run.report["results"]:
        by_phase.setdefault(result["phase"], set()).add(result["verdict"])
    assert by_phase["vision"] == by_phase["connector"] == by_phase["preprocessing"] == {"skip"}
    assert all(r["reason"] for r in run.report["results"] if r["verdict"] == "skip")
    agreement = run.report["results"][-1]["agreement"] or next(
        r["agreement"] for r in run.report["results"] if r["agreement"]
    )
    assert agreement["top1"] == agreement["positions"]
    assert agreement["kl"] < 1e-6


def test_tensors_are_judged_like_those_of_a_running_candidate(
    snap: Snap, asked: Path, candidate: FmsCandidate, golden: Golden, tmp_path: Path
) -> None:
    """The same outputs get the same figures from a file and from a check."""
    case, inputs = "one-image", golden.inputs("one-image")
    given = load_file(asked / "questions.safetensors")
    assert inputs.pixel_values is not None
    with torch.inference_mode():
        outputs = {
            **{
                f"preprocessing.{n}": t
                for n, t in candidate.preprocess(golden.images(case)).items()
            },
            "vision.last_hidden_state": candidate.vision(given[f"{case}/pixel_values"]),
            "connector.image_hidden_states": candidate.connector(given[f"{case}/connector_input"]),
            "forward.logits": candidate.forward(inputs),
            "generate.token_ids": candidate.generate(
                inputs, max_new_tokens=20, eos_token_ids=golden.eos_token_ids(case)
            ),
        }
    save_file(
        {f"{case}/{name}": tensor.contiguous() for name, tensor in outputs.items()},
        tmp_path / "answers.safetensors",
    )
    questions = json.loads((asked / "questions.json").read_text())
    header = {
        "schema": "snap-answers/1", "golden": questions["golden"], "engine": "fms", "version": "1",
        "device": "cpu", "dtype": "float32", "checkpoint": list(questions["weights"].values()),
    }  # fmt: skip
    (tmp_path / "answers.json").write_text(json.dumps(header))
    judged = snap("judge", tmp_path, "--case", case, "--json", "-").report
    checked = snap(
        "check", "--fms-path", ROOT / "build/fms-checkout", "--case", case, "--json", "-"
    )
    figures = ("phase", "tensor", "verdict", "max_abs", "mismatched", "atol", "oracle")
    rows = [
        [{name: r[name] for name in figures} for r in report["results"] if r["verdict"] != "skip"]
        for report in (judged, checked.report)
    ]
    assert rows[0] == rows[1]


def _shift(tensors: Answers, _header: dict[str, Any]) -> None:
    tensors[f"{CASE}/forward.topk_logprobs"][3, 5] += 0.01


def _hide_the_best(tensors: Answers, _header: dict[str, Any]) -> None:
    tensors[f"{CASE}/forward.topk_ids"][3, 0] = 999


def _add_a_stranger(tensors: Answers, _header: dict[str, Any]) -> None:
    tensors[f"{CASE}/forward.topk_ids"][3, -1] = 999
    values = tensors[f"{CASE}/forward.topk_logprobs"]
    values[3, -1] = values[3, 0]


def _lose_a_row(tensors: Answers, _header: dict[str, Any]) -> None:
    for part in ("ids", "logprobs"):
        name = f"{CASE}/forward.topk_{part}"
        tensors[name] = tensors[name][1:].contiguous()


def _nan(tensors: Answers, _header: dict[str, Any]) -> None:
    tensors[f"{CASE}/forward.topk_logprobs"][0, 0] = torch.nan


@pytest.mark.parametrize("change", [_shift, _hide_the_best, _add_a_stranger, _lose_a_row, _nan])
def test_wrong_log_probabilities_fail(
    snap: Snap, changed: Callable[[Change], Path], change: Change
) -> None:
    """A wrong value, a missing best token, another that is as probable, and a missing row."""
    run = snap("judge", changed(change), "--case", CASE, "--json", "-")
    assert run.code == 1
    assert verdict_of(run, "position_logprobs") == "fail"


def test_the_end_of_the_list_may_hold_other_tokens(
    snap: Snap, changed: Callable[[Change], Path]
) -> None:
    """The last of the best tokens may be another one of the same probability."""

    def swap(tensors: Answers, _header: dict[str, Any]) -> None:
        tensors[f"{CASE}/forward.topk_ids"][:, -1] = 999

    assert snap("judge", changed(swap), "--case", CASE).code == 0


@pytest.mark.parametrize(("error", "code"), [(0.01, 0), (3.0, 1)])
def test_half_precision_is_judged_by_its_own_rounding(
    snap: Snap, changed: Callable[[Change], Path], error: float, code: int
) -> None:
    """An error of bfloat16 passes, another does not."""

    def in_half(tensors: Answers, header: dict[str, Any]) -> None:
        header["dtype"] = "bfloat16"
        for part in ("forward", "generate"):
            tensors[f"{CASE}/{part}.topk_logprobs"] += error

    run = snap("judge", changed(in_half), "--case", CASE, "--json", "-")
    assert run.code == code, run.report["results"]
    assert run.report["tolerance"] == "oracle"


def test_token_ids_alone_are_judged_as_a_generation(
    snap: Snap, changed: Callable[[Change], Path]
) -> None:
    """Everything else is a skip; another token is reported with its step and margin."""

    def only_tokens(tensors: Answers, _header: dict[str, Any]) -> None:
        for name in [name for name in tensors if not name.endswith("token_ids")]:
            del tensors[name]

    def other_token(tensors: Answers, header: dict[str, Any]) -> None:
        only_tokens(tensors, header)
        tensors[f"{CASE}/generate.token_ids"][2] += 1

    folder = changed(only_tokens)
    assert snap("judge", folder).code == 0
    assert snap("judge", folder, "--require", "generate").code == 0
    assert snap("judge", folder, "--require", "forward").code == 3
    shutil.rmtree(folder)
    run = snap("judge", changed(other_token), "--case", CASE, "--json", "-")
    assert run.code == 1
    assert run.report["first_divergence"]["phase"] == "generate"
    found = [r["divergence"] for r in run.report["results"] if r["divergence"]]
    assert [(one["step"], one["kind"]) for one in found] == [(2, "real")]


def test_no_answer_is_no_success(snap: Snap, changed: Callable[[Change], Path]) -> None:
    """Answers without a tensor of the selected cases exit with 3."""
    run = snap("judge", changed(lambda tensors, _header: tensors.clear()))
    assert run.code == 3


REFUSED: dict[str, tuple[Change, str]] = {
    "another golden version": (
        lambda _tensors, header: header["golden"].update(golden_version=99),
        "golden_version 99",
    ),
    "another checkpoint": (
        lambda _tensors, header: header.update(checkpoint=["0" * 64]),
        "0" * 64,
    ),
    "no checkpoint": (lambda _tensors, header: header.update(checkpoint=[]), "weights"),
    "an unknown field": (lambda _tensors, header: header.update(speed=1), "speed"),
    "an unknown case": (
        lambda tensors, _header: tensors.update({"nobody/generate.token_ids": torch.ones(1)}),
        "nobody",
    ),
    "an unknown tensor": (
        lambda tensors, _header: tensors.update({f"{CASE}/forward.topk_idz": torch.ones(1)}),
        "topk_idz",
    ),
    "few tokens": (
        lambda tensors, _header: tensors.update(
            {n: t[:, :5].contiguous() for n, t in tensors.items() if "topk" in n}
        ),
        "5 tokens",
    ),
    "ids without values": (
        lambda tensors, _header: tensors.pop(f"{CASE}/forward.topk_logprobs"),
        "topk_logprobs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_answers_that_do_not_fit_are_refused(
    snap: Snap, changed: Callable[[Change], Path], name: str
) -> None:
    """Exit code 3 and two lines, which name what does not fit."""
    change, named = REFUSED[name]
    run = snap("judge", changed(change))
    assert run.code == 3
    assert named in run.err
    assert len(run.err.strip().splitlines()) == 2


@pytest.mark.parametrize("file", ["answers.json", "answers.safetensors"])
def test_damaged_files_are_refused(
    snap: Snap, changed: Callable[[Change], Path], file: str
) -> None:
    """A file that is cut short, or missing, is an error without a traceback."""
    folder = changed(lambda _tensors, _header: None)
    path = folder / file
    path.write_bytes(path.read_bytes()[:-9])
    assert snap("judge", folder).code == 3
    path.unlink()
    assert snap("judge", folder).code == 3


def test_judging_needs_neither_fms_nor_the_checkpoint(answered: Path, tmp_path: Path) -> None:
    """Golden set and answers are enough."""
    shutil.copytree(set_folder(GOLDENS).parent.parent, tmp_path / "goldens/local--tiny-idefics3")
    code = (
        "import sys\nfrom snapshot_tool.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0 and 'fms' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "judge", str(answered), "--case", CASE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_options_of_candidates_are_refused(answered: Path) -> None:
    """Answers have run already."""
    from snapshot_tool.base.errors import UsageError
    from snapshot_tool.check.request import CheckRequest

    with pytest.raises(UsageError, match="--explore"):
        CheckRequest(GOLDENS, answers=answered, explore=3)


def test_the_page_shows_the_script() -> None:
    """The script of docs/answers.md is the one that answers in these tests."""
    page = (ROOT / "docs" / "answers.md").read_text(encoding="utf-8")
    assert (ROOT / "tests" / "examples" / "answer.py").read_text(encoding="utf-8") in page


def test_validation_information_of_aiu_fms_testing_utils(
    snap: Snap, golden: Golden, tmp_path: Path
) -> None:
    """Tokens are padded to 64; the greatest logits and the log-sum-exp are the recorded ones."""
    options = ("--format", "aftu", "--model-id", "owner/tiny", "--out", tmp_path / "info")
    assert snap("ask", *options).code == 0
    (folder,) = (tmp_path / "info").iterdir()
    about = ("attn-type-sdpa", "batch-size-1", "dtype-fp32", "max-new-tokens-20")
    name = "_".join((*about, "model-id-owner--tiny", "seq-length-64"))
    digest = hashlib.sha256(name.encode()).hexdigest()
    assert folder.name == f"{digest}_0.8.1.cpu_validation_info.0.out"
    for index, case in enumerate([CASE]):
        found = torch.load(folder / f"{index}.pt", weights_only=True)
        tokens, ids, values, logsumexp = (
            golden.tensor(case, Phase.GENERATE, kept)
            for kept in ("token_ids", "step_topk_ids", "step_topk_values", "step_logsumexp")
        )
        prompt = golden.text(case)
        real = prompt.input_ids[prompt.attention_mask.bool()]
        assert found["tokens"].tolist()[64 - len(real) :] == [*real.tolist(), *tokens.tolist()]
        assert found["logits"].shape == (20, golden.tensor(case, Phase.FORWARD, "logits").shape[0])
        best = found["logits"].topk(20)
        assert torch.equal(best.values, values)
        assert torch.equal(best.indices, ids)
        assert torch.allclose(found["logits"].logsumexp(-1), logsumexp, atol=1e-4)
