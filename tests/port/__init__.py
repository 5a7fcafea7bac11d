"""FMS's own idefics3, pull request 503: all its commits checked, beside the parity suite."""
