"""Questions that a golden set answers though nobody asked them: drawn, asked, judged."""
