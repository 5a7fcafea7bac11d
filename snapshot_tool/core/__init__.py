"""Plain types that every other part may import: no I/O, no optional package."""
