"""The tests, and the programs beside them."""

import os

# The tests' FMS checkout preprocesses with its own code then, which needs no transformers. Set in
# the environment, since the tests check it in processes of their own.
os.environ.setdefault("IDEFICS3_PREPROCESSOR", "own")
