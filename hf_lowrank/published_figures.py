"""All numbers of arXiv 2510.03358 that results are set beside."""

from __future__ import annotations

__all__ = ["EPSILONS", "PRETRAINED_RATIOS", "TRUNCATED_RATIOS", "TRUNCATED_WQL"]

# The thresholds sigma_j / sigma_1 at which the paper truncates.
EPSILONS = (1e-3, 10**-2.5, 1e-2, 10**-1.5)  # the paper's
# The ratio of the attention that the truncated models of its table keep, and their WQL relative to the original, by benchmark.
TRUNCATED_RATIOS = (0.393, 0.237, 0.151, 0.073)
TRUNCATED_WQL = {
    "published, in-domain": (1.009, 1.053, 1.991, 4.409),
    "published, zero-shot": (0.990, 1.030, 1.566, 3.562),
}
# (d~_0, alpha) of its three pretrained models, and the ratio of the attention that its table reports.
PRETRAINED_RATIOS = {(3.0, 0.27): 0.075, (5.0, 0.35): 0.150, (7.0, 0.40): 0.250}
