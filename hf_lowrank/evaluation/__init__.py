"""Scores of forecasts on benchmark tasks and on the user's own files."""
