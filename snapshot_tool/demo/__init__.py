"""The data of `snap demo`: a tiny Llama with random weights, its golden set, and a port of it."""
