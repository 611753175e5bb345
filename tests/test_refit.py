"""The refit of the last matrices: it brings the hidden states closer to the dense ones, and leaves alone what is dense."""
