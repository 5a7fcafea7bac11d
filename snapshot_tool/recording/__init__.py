"""The steps of a recording: plan the cases, stage the reference's answers, assemble the set."""
