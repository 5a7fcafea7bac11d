"""Derived questions, which a golden set answers besides its own cases: drawn, run, judged."""
