"""Derived variants: asking a candidate what a golden set answers without having been asked."""
