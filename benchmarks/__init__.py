"""What snap costs, measured beside what it replaces."""

import os

# As in tests/__init__.py.
os.environ.setdefault("IDEFICS3_PREPROCESSOR", "own")
