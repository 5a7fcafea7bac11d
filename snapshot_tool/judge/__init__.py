"""Run one phase of one case, watch the candidate, and give a verdict."""
