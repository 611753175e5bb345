"""Series, windows of them, and tokens of windows: what models are measured, trained and scored on."""
