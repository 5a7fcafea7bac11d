"""The commits of FMS's pull request 503, and the expected verdict of a check of each."""

from collections.abc import Mapping
from dataclasses import dataclass

HEAD = "2603441a"
LAST_OF_SUITE = "cff04250"  # the last commit whose output the suite can read


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit: its hash, the first phase and module that fail or "", and how many cases."""

    sha: str
    phase: str = ""
    place: str = ""
    cases: int = 0


COMMITS = (
    Commit("08a7f5b2", "generate", "the generation loop", cases=2),
    Commit("2da50e04"),
    Commit("4383c72e", "vision", "model.vision_model.embeddings", cases=12),
    Commit(LAST_OF_SUITE),
    Commit("8412bb19"),
    Commit("7ee2249f"),
    Commit(HEAD),
)

# The reason why a derived question fails, by its kind.
_ATTENTION = (
    "FMS's attention (fms.modules.attention), for every model: without a cache, it swaps length "
    "and heads if a prompt has as many tokens as there are key-value heads."
)
_BATCH = (
    "FMS's idefics3: a row of a batch does not end at its own end token. Before 7ee2249f it "
    "continues; since then fms.utils.generation.generate stops all rows when the first row ends."
)
_CACHE = (
    "FMS's idefics3: its first generation loop does not mask the cache, so new tokens attend to "
    "the padding on the left."
)
_POSITIONS = "FMS's idefics3: patches are numbered 0, 0, 1, 2, …"

FAULTS: Mapping[str, Mapping[str, str]] = {
    "08a7f5b2": {"shorter": _CACHE, "resumed": _CACHE},
    "4383c72e": dict.fromkeys(("tiles", "split", "shorter", "resumed"), _POSITIONS),
}
FAULTS_OF_ALL: Mapping[str, str] = {
    "prefix": _ATTENTION,
    "padding": _ATTENTION,
    "batch": _ATTENTION,
    "generation-batch": _BATCH,
}


def fault_of(sha: str, kind: str) -> str:
    """Return why a kind of question fails, or "" if that is unknown."""
    return FAULTS.get(sha, {}).get(kind) or FAULTS_OF_ALL.get(kind, "")
