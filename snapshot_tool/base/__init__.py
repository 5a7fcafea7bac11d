"""What every part builds on: the candidate's protocol, results, tolerances, files, errors."""

__version__ = "0.1.0"
