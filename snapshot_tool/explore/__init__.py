"""Derived questions, whose outputs follow from a golden set: draw, run and judge them."""
