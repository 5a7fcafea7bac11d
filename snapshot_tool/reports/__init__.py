"""Finished results as text and as JSON."""
