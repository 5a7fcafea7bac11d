"""Traces of every module: format, writing, matching, comparing."""
