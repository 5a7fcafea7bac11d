"""Checking a candidate, bisecting, merging shards, and what the environment can do."""
