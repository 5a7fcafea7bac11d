"""What a careful person gets wrong, seen while the candidate runs and said before the numbers."""
