"""What snap costs, measured beside what it replaces."""
