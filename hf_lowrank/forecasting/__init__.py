"""Forecasts of files larger than memory, that go on where they were cut off."""
