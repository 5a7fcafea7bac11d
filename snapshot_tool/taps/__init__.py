"""Hooks on modules, shared by candidates and reference."""
