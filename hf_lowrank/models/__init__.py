"""The low-rank models as transformers and Chronos know them: what is saved beside the weights for `trust_remote_code`.

The files import each other by `from .x import` alone, because transformers follows that to find the ones to copy.
"""
