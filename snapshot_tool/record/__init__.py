"""Recording a golden set."""
