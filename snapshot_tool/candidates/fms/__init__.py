"""FMS as the candidate, without transformers."""

from snapshot_tool.candidates.fms.candidate import FmsCandidate, load_fms_candidate

__all__ = ["FmsCandidate", "load_fms_candidate"]
