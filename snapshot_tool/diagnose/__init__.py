"""Where a difference arises: module by module, and between two golden sets."""
