"""Inputs drawn by hypothesis: the only package that imports it."""
