"""`snap check --loading own`: FMS loads by get_model("hf_pretrained"), which needs transformers."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHECKOUT, CHECKPOINT, GOLDENS, ROOT, Run, Snap, error_lines
from tests.mutants.mutant import Edit, plant

pytestmark = pytest.mark.live

FAMILIES = ROOT / "tests" / "families"
PHASES = ("--phase", "vision", "--phase", "connector", "--phase", "forward", "--phase", "generate")
# The mapping of pull request 503 reads a field that does not exist, with the default 4.
INVENTED = Edit(
    "fms/models/hf/config_utils/param_builders.py",
    '"connector_scale": config.scale_factor,',
    '"connector_scale": getattr(config.text_config, "pixel_shuffle_factor", 4),',
)
# A wrong field that no shape depends on.
WRONG_EPSILON = Edit(
    "fms/models/hf/config_utils/param_builders.py",
    '"text_config": LLaMAConfig(**{**text, "pad_id": 0 if pad is None else pad}),',
    '"text_config": LLaMAConfig(**{**text, "norm_eps": 0.25}),',
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A checkpoint and the folder of its golden sets."""

    checkpoint: Path
    goldens: Path

    def check(self, snap: Snap, *options: object) -> Run:
        """Check it, with a report in JSON."""
        where = ("--goldens", self.goldens, "--checkpoint", self.checkpoint)
        return snap("check", *where, "--json", "-", *options)


EMBEDDED = Recorded(CHECKPOINT, GOLDENS)
LLAMA = Recorded(FAMILIES / "checkpoints" / "llama", FAMILIES / "goldens")


@pytest.fixture(scope="module")
def scale_two(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Build and record a checkpoint whose connector has scale_factor 2."""
    folder = tmp_path_factory.mktemp("scale-two")
    found = Recorded(folder / "checkpoint", folder / "goldens")
    for command in (
        ("python", "tests/checkpoints/build_other_shapes.py", "scale-two", found.checkpoint),
        ("snap", "record", "--checkpoint", found.checkpoint, "--goldens", found.goldens,
         "--variants", "0"),
    ):  # fmt: skip
        program, *arguments = map(str, command)
        # The folder of this environment's transformers is not for the other one.
        subprocess.run(
            ["env", "-u", "PYTHONPATH", f".venv-record/bin/{program}", *arguments],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
    return found


@pytest.mark.parametrize(
    ("recorded", "options"),
    [(LLAMA, ()), (EMBEDDED, ("--fms-path", CHECKOUT, "--case", "*-image*", *PHASES))],
)
def test_a_mapping_that_agrees_gives_the_same_figures(
    snap: Snap, recorded: Recorded, options: tuple[object, ...]
) -> None:
    """Only harmless fields differ, and each tensor's figures are those of snap's mapping."""
    plain, own = (recorded.check(snap, *options, *more) for more in ((), ("--loading", "own")))
    assert (plain.code, own.code) == (0, 0), own.err
    assert _figures(own.report) == _figures(plain.report)
    candidate = own.report["environment"]["candidate"]
    assert candidate["loading"] == "own"
    assert all(field["harmless"] for field in candidate["mapping"])
    assert own.report["environment"]["transformers_imported"]


def _figures(report: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in report["results"]]


def test_a_field_without_which_fms_cannot_load_is_named(
    snap: Snap, scale_two: Recorded, tmp_path: Path
) -> None:
    """With both values and Hugging Face's field; with snap's own mapping it passes."""
    plant(INVENTED, checkout=CHECKOUT, out=tmp_path / "fms")
    run = scale_two.check(snap, "--fms-path", tmp_path / "fms", "--loading", "own")
    assert run.code == 3
    problem = error_lines(run)[0]
    assert "connector_scale 4, expected 2" in problem
    assert "scale_factor" in problem.partition("connector_scale")[2].partition(";")[0]
    assert scale_two.check(snap, "--fms-path", tmp_path / "fms", *PHASES).code == 0


def test_a_wrong_field_fails_a_check_that_loads(snap: Snap, tmp_path: Path) -> None:
    """The report has it with the field that it should come from."""
    plant(WRONG_EPSILON, checkout=CHECKOUT, out=tmp_path / "fms")
    options = ("--fms-path", tmp_path / "fms", "--case", "one-image", "--phase", "forward")
    run = EMBEDDED.check(snap, *options, "--loading", "own")
    assert run.code == 1
    (field,) = (
        field
        for field in run.report["environment"]["candidate"]["mapping"]
        if not field["harmless"]
    )
    assert (field["field"], field["actual"]) == ("text_config.norm_eps", "0.25")
    assert field["sources"] == ["text_config.rms_norm_eps"]
