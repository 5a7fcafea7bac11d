"""snap: golden references for model ports."""
