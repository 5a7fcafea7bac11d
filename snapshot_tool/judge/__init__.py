"""Running one phase of one case, watching the candidate, and giving a verdict."""
