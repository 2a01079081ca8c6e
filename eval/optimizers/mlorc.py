"""This module loads MLorc's optimizer from a published package, mlorc-optim 0.1.8, and mends three faults of it.

The package cannot be imported, because it says `..utilX` where its files are `util/X.py`. It also reshapes every
matrix by its number of entries alone, to sides as close to each other as possible, which tears rows apart: 576×1536
becomes 1024×864. The paper (arXiv 2506.01897) compresses matrices as they are, and the package's own text
speaks of one-dimensional vectors. It compresses the moments by a randomised SVD without a power iteration. The
authors' code has one, and keeps more of them. Importing this module raises ModuleNotFoundError if the package is not
installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_found = importlib.util.find_spec("MLorc_optim")
if _found is None:
    raise ModuleNotFoundError("No module named 'MLorc_optim'")
for _file in Path(_found.submodule_search_locations[0], "util").glob("[A-Z]*.py"):
    _spec = importlib.util.spec_from_file_location(f"MLorc_optim.util{_file.stem}", _file)
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

_module = importlib.import_module("MLorc_optim.optim.MLorc_AdamW")
_near_square = _module._get_effective_shape


def _compressed(matrix: Tensor, rank: int, oversampling: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [p, rank], σ [rank] and Vᵀ [rank, q] of a randomised SVD with one power iteration, in float32."""
    U, sigma, V = torch.svd_lowrank(matrix.float(), rank + oversampling, niter=1)
    return U[:, :rank], sigma[:rank], V[:, :rank].mT


_module._rsvd = _compressed


class MLorcAdamW(_module.MLorc_AdamW):
    """Implements the package's `MLorc_AdamW`, but leaves matrices their shape.

    Tensors of more than two dimensions are flattened to (first, rest).
    """

    def step_parameter(self, p: Tensor, group: dict[str, Any], i: int | None = None) -> None:
        """Update one parameter in place. The package's own function decides the shape of vectors only."""
        rows = None if p.ndim < 2 else p.shape[0]  # The function stays in the package, and p must not stay with it.
        _module._get_effective_shape = _near_square if rows is None else lambda numel: (rows, numel // rows)
        super().step_parameter(p, group, i)
