"""The rank structure of a model: spectra, flow of ranks, heads, and what that allows."""
