"""What `snap demo` checks: a tiny Llama of random weights, its golden set, and a port of it.

`checkpoint` and `goldens` are data. tests/check/test_demo.py holds them equal to those of the
tests, which were recorded with transformers.
"""
