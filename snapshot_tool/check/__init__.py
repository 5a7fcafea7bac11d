"""Checking a candidate against a golden set, read from top to bottom in session.py."""
