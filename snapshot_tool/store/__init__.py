"""Golden sets on disk: where they lie, what they hold, how they are written and read."""
