"""Roots and blocks of Gram matrices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_lowrank.linear_algebra import diagonal_blocks, square_root


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**31))
def test_square_root_of_a_deficient_gram_matrix(size, columns, seed):
    factor = torch.randn(2, size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = factor @ factor.mT
    root = square_root(gram)
    assert_close(root @ root.mT, gram)


def test_diagonal_blocks_are_those_of_a_block_diagonal_matrix():
    blocks = torch.arange(18.0).reshape(2, 3, 3)
    assert torch.equal(diagonal_blocks(torch.block_diag(*blocks), 2), blocks)
