"""This package holds the Triton backend for NVIDIA GPUs.

`backend.Triton` steps all equal matrices together in nine launches. Their kernels are in `factors`, `passes` and
`numbers`, and what these share is in `blocks`. Gradients, weights and state are read and written where they lie,
through tables of their addresses. The host reads nothing. Sums are added in a fixed order, so that every replica gets
the same bits. Larger ranks and sharded rows take the kernels of `rows`, which compute the row part alone.
"""
