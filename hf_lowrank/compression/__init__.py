"""The road from a dense model to a low-rank one: calibrate, measure, allocate, factorize, refit."""
