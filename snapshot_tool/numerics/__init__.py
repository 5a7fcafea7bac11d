"""Measuring a tensor against its golden, by the table of tolerances or the float64 reference."""
