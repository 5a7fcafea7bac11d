"""What every part builds on: the candidate's protocol, results, tolerances, files, errors."""
