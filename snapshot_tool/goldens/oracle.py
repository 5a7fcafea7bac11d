"""oracle.safetensors: each tensor and module compared with a float64 run of the reference.

`<case>/<phase>.<tensor>.delta` is oracle - reference; `<case>/<phase>.<tensor>.noise.<dtype>` is
the reference's own error in a dtype at each position; `<case>/generate.step_noise.<dtype>` that of
each step's logits; `<case>/taps.noise.<dtype>` that of each module's input and output, relative;
`<case>/modules.noise.<dtype>` the same of each module by itself, on recorded inputs.
"""

from collections.abc import Mapping

import torch

from snapshot_tool.base.errors import GoldenDamaged
from snapshot_tool.base.localisation import noise_limit
from snapshot_tool.base.protocol import Phase
from snapshot_tool.base.tolerance import OracleTensor
from snapshot_tool.goldens.golden import Golden
from snapshot_tool.goldens.layout import ORACLE
from snapshot_tool.goldens.manifest import Manifest
from snapshot_tool.goldens.parts import TOKEN_IDS

# Which rows of a recorded tensor are judged; None: all.
Rows = slice | list[int] | None
# Names of tensors: by phase, tensor and dtype.
DELTA = "{}.{}.delta"
NOISE = "{}.{}.noise.{}"
STEP_NOISE = "generate.step_noise.{}"
TAP_NOISE = "taps.noise.{}"
MODULE_NOISE = "modules.noise.{}"


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
