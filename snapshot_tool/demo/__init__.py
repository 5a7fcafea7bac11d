"""The data of `snap demo`: a tiny Llama with random weights, its golden set, and a port of it.

tests/check/test_demo.py checks that `checkpoint` and `goldens` are equal to those of the tests,
which were recorded with transformers.
"""
