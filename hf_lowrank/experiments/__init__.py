"""Whole comparisons: accuracy against size, and the demonstration."""
