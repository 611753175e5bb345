"""Measured losses of single components: the insertion equals the truncation, and leaves nothing behind."""
