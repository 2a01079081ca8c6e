"""This module turns the change that full-weight fine-tuning made into a plain PEFT LoRA adapter (`extract_lora`).

``lorapre-extract BASE TUNED OUT --rank 16`` does it from a shell and prints the report.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..integrations.checkpoint import Checkpoint, common_names
from ..integrations.targets import check_expression
from ..lowrank.float64 import float64_device, to_float64
from ..optim.options import is_whole
from .adapter import adapter_config, addressable, write_checked
from .selection import reason, selected_experts, selected_linears
from .svd import EXACT_SVD_SIZE, OVERSAMPLING, best_factors, top_factors

REPORT_NAME = "extraction_report.json"
# In a large matrix the search for the rank that keeps enough energy starts here, and doubles the rank from there.
FIRST_RANK = 32


@dataclass(frozen=True)
class ExtractedModule:
    """Describes one module of the adapter.

    Δ is tuned − base, BA is the product of the stored factors, and ‖·‖ is the Frobenius norm.
    """

    name: str
    shape: tuple[int, ...]  # out_features, in_features; for stacked experts, their number comes first
    rank: int
    change: float  # ‖Δ‖
    kept_energy: float  # 1 − ‖Δ − BA‖² / ‖Δ‖²
    relative_error: float  # ‖Δ − BA‖ / ‖Δ‖, the error of the adapter as it runs
    merged_error: float  # ‖tuned − round(base + BA)‖ / ‖Δ‖, the error of a merge, with rounding to the base's dtype


@dataclass(frozen=True)
class LeftOut:
    """Describes a tensor that changed and is not in the adapter."""

    name: str
    reason: str
    change: float  # ‖Δ‖
    share: float  # ‖Δ‖² as a share of that of all changes


@dataclass(frozen=True)
class ExtractionReport:
    """Describes what an extracted adapter holds and what it does not. ``str()`` gives a table."""

    base: str
    tuned: str
    change: float  # ‖Δ‖ of all tensors together
    modules: list[ExtractedModule]
    left_out: list[LeftOut]
    unchanged: int  # number of tensors that are equal in both checkpoints

    @property
    def relative_error(self) -> float:
        """Return what the adapter misses of all changes, including tensors left out, as a share of ``change``."""
        missed = [m.relative_error * m.change for m in self.modules] + [entry.change for entry in self.left_out]
        return math.hypot(*missed) / self.change

    @property
    def kept_energy(self) -> float:
        """Return the share of all changes' ‖Δ‖² that the adapter holds."""
        return 1 - self.relative_error**2

    def left_out_summary(self) -> str:
        """Return one line that says what was left out, by reason, with the largest share first."""
        reasons: dict[str, list[float]] = {}
        for entry in self.left_out:
            reasons.setdefault(entry.reason, []).append(entry.share)
        order = sorted(reasons, key=lambda reason: -sum(reasons[reason]))
        return ", ".join(f"{reason} ×{len(reasons[reason])}: {sum(reasons[reason]):.2%}" for reason in order)

    def to_json(self) -> str:
        """Return every field and the totals as JSON."""
        totals = {"kept_energy": self.kept_energy, "relative_error": self.relative_error}
        return json.dumps(totals | asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        width = max(len(module.name) for module in self.modules) + 2
        lines = [f"{'module':{width}}{'shape':>14}{'rank':>6}{'‖Δ‖':>11}{'kept':>9}{'error':>10}{'merged':>10}"]
        for m in self.modules:
            line = (
                f"{m.name:{width}}{'×'.join(map(str, m.shape)):>14}{m.rank:>6}{m.change:>11.3e}{m.kept_energy:>9.2%}"
            )
            lines.append(f"{line}{m.relative_error:>10.2e}{m.merged_error:>10.2e}")
        return "\n".join(
            [
                *lines,
                f"left out: {self.left_out_summary() or 'nothing'}; unchanged: {self.unchanged} tensors",
                f"all changes: ‖Δ‖ {self.change:.3e}, kept {self.kept_energy:.2%}, error {self.relative_error:.2e}",
            ]
        )


def extract_lora(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> ExtractionReport:
    """Write the difference of two checkpoints as a plain LoRA adapter: B A ≈ Δ = tuned − base of each linear module.

    One tensor of each checkpoint is in memory at a time. Δ is formed in float32 and truncated by an exact SVD, or by
    subspace iteration if the matrix is large and the rank is not (`svd.top_factors`). Each module's alpha is its rank,
    so that the scaling is 1. Each expert of a stack has factors of its own, in PEFT's ``target_parameters``. The
    report lists, with a warning, what changed and is not in the adapter: norms, biases, embeddings, the output head,
    unselected and tied modules, and those that PEFT refuses or whose weight the model reads past the module. Before
    the adapter is put into its folder, plain PEFT opens it on a model without weights, and what it finds there is
    compared with what was meant. (`peft.convert_to_lora` does this for adapters of a model in memory, always by a full
    SVD. Of PEFT's helpers, those that read ``target_modules`` are used here.)

    Args:
        base, tuned: folders with ``config.json`` and safetensors, in one file or in shards, or ids of cached hub
            models.
        output_dir: receives ``adapter_config.json``, ``adapter_model.safetensors`` and ``extraction_report.json``.
        rank: rank of every module, or the smaller side of its matrix if that is less. Give this or ``energy``.
        energy: share of ‖Δ‖² in (0, 1] that each module keeps, before the factors are rounded to ``dtype``. The rank
            is the smallest that keeps it, or can be slightly larger where subspace iteration is used. 1 keeps even the
            round-off in Δ.
        max_rank: upper bound of the ranks that ``energy`` chooses.
        target_modules: as in `peft.LoraConfig`: "all-linear", a list of names, or a regular expression of whole
            names. Stacked experts are among "all-linear". Otherwise their parameter's name or their module's name
            selects them.
        dtype: dtype of the stored factors, such as "float32". None stands for that of each base weight. The reported
            errors include the rounding.
        device: where the SVDs are computed.

    Raises:
        ValueError: an invalid option; a checkpoint that cannot be read; a folder that cannot be written; tensors that
            are missing, of different shapes or not finite; nothing selected; no change, or none in what is selected.
        RuntimeError: this version of PEFT opens the adapter otherwise than it was meant, as those before 0.20 do with
            stacked experts. Nothing is written then.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank}, energy={energy}: give exactly one of the two")
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and not is_whole(value, 1):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected a share above 0 and up to 1, such as 0.9")
    if energy is None and max_rank is not None:
        raise ValueError(f"max_rank={max_rank} bounds the ranks that energy chooses: leave it out beside rank={rank}")
    stored = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if stored not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r}: expected float32, bfloat16, float16, or None for the checkpoint's own")
    check_expression(target_modules)
    before, after, folder = Checkpoint(base), Checkpoint(tuned), Path(output_dir)
    _check_place(folder, (before, after), device)
    model = before.skeleton()
    names = common_names(before, after, model)
    stacks = selected_experts(model, target_modules)
    linear = selected_linears(model, target_modules, required=not stacks)
    if stacks and TorchVersion(peft.__version__) < "0.20":
        raise RuntimeError(
            f"found peft {peft.__version__}, which swaps inputs and outputs of stacked experts, expected 0.20 "
            "or later: pip install -U peft, or give target_modules without the experts"
        )
    by_parameter, refused = addressable(model, linear)

    factors: dict[str, tuple[Tensor, Tensor]] = {}
    modules: list[ExtractedModule] = []
    left: list[tuple[str, str, float]] = []
    for name in tqdm(names, desc="Extracting LoRA", unit="tensor"):
        old, new = before.tensor(name).to(device), after.tensor(name).to(device)
        if old.shape != new.shape:
            raise ValueError(
                f"{name} is {list(old.shape)} in {base} and {list(new.shape)} in {tuned}: both must be checkpoints of "
                "one model; if the vocabulary was resized, resize and save the base alike"
            )
        delta = new.float() - old.float()
        change = _norm(delta)
        if not math.isfinite(change):
            raise ValueError(f"{name} has values that are not finite in {base} or {tuned}: did the training diverge?")
        owner, _, attribute = name.rpartition(".")
        if change and name in stacks:
            turned = getattr(model.get_submodule(owner), "is_transposed", False)
            module, B, A = _extract_experts(
                name, old, new, delta, turned, (rank, energy, max_rank), stored or old.dtype
            )
            factors[name] = (B, A)
            modules.append(module)
        elif change and (attribute != "weight" or owner not in linear or owner in refused):
            left.append((name, refused.get(owner) or reason(model, owner, attribute), change))
        elif change:
            size = (rank, energy, max_rank)
            module, B, A = _extract(
                owner, old, new, delta, isinstance(linear[owner], Conv1D), size, stored or old.dtype
            )
            factors[owner] = (B, A)
            modules.append(module)
        del old, new, delta  # Otherwise they would last until the next ones have been read.

    total = math.hypot(*(module.change for module in modules), *(change for *_, change in left))
    if not total:
        raise ValueError(f"{base} and {tuned} hold the same weights: there is no change to extract")
    left_out = [LeftOut(*entry, share=(entry[-1] / total) ** 2) for entry in left]
    report = ExtractionReport(str(base), str(tuned), total, modules, left_out, len(names) - len(modules) - len(left))
    if not modules:
        raise ValueError(
            f"nothing that changed can be put into the adapter ({report.left_out_summary()}): select more "
            "target_modules, or deliver the tuned weights themselves"
        )
    config = adapter_config(model, {m.name: m.rank for m in modules}, by_parameter, str(base), stacks)
    write_checked(folder, config, factors, model)
    (folder / REPORT_NAME).write_text(report.to_json(), encoding="utf-8")
    if left_out:
        warnings.warn(
            f"{sum(entry.share for entry in left_out):.2%} of the change ‖tuned − base‖² is not in the adapter and "
            f"will be missing where it is used ({report.left_out_summary()}); {REPORT_NAME} lists the tensors",
            stacklevel=2,
        )
    return report


def _extract(
    name: str, old: Tensor, new: Tensor, delta: Tensor, turned: bool, size: tuple, dtype: torch.dtype
) -> tuple[ExtractedModule, Tensor, Tensor]:
    """Return a module's errors and its stored factors B [out, r], A [r, in]. turned: true if weights are [in, out]."""
    B, A = _factors(delta.mT if turned else delta, *size)
    # These are copies. Otherwise the whole of a larger factor would stay in memory behind a truncated one.
    B, A = (factor.clone(memory_format=torch.contiguous_format).to(dtype) for factor in (B, A))
    product = B.float() @ A.float()
    out_features, in_features = product.shape
    module = _measured(name, (out_features, in_features), len(A), old, new, delta, product.mT if turned else product)
    return module, B.cpu(), A.cpu()


def _extract_experts(
    name: str, old: Tensor, new: Tensor, delta: Tensor, turned: bool, size: tuple, dtype: torch.dtype
) -> tuple[ExtractedModule, Tensor, Tensor]:
    """Return the errors of a stack of E experts, and its factors as PEFT stores them: B [out, r · E], A [r · E, in].

    r is the largest rank that an expert needs, as PEFT has one rank for a whole parameter. turned: true if weights are
    [experts, in, out].
    """
    deltas = delta.mT if turned else delta
    experts, out_features, in_features = deltas.shape
    found = {e: _factors(deltas[e], *size) for e in range(experts) if deltas[e].any()}
    r = max(len(A) for _, A in found.values())
    B, A = delta.new_zeros(experts, out_features, r), delta.new_zeros(experts, r, in_features)
    for e, (of_B, of_A) in found.items():
        B[e, :, : len(of_A)], A[e, : len(of_A)] = of_B, of_A
    B, A = B.to(dtype), A.to(dtype)
    product = B.float() @ A.float()
    module = _measured(name, deltas.shape, r, old, new, delta, product.mT if turned else product)
    return module, B.movedim(0, -1).flatten(1).contiguous().cpu(), A.flatten(0, 1).contiguous().cpu()


def _measured(
    name: str, shape: Sequence[int], rank: int, old: Tensor, new: Tensor, delta: Tensor, product: Tensor
) -> ExtractedModule:
    """Return a module with the errors of its stored factors, whose product is ``product``."""
    change = _norm(delta)
    error = _norm(delta - product) / change
    merged = _norm(new.float() - (old.float() + product).to(old.dtype).float()) / change
    return ExtractedModule(name, tuple(shape), rank, change, 1 - error**2, error, merged)


def _factors(delta: Tensor, rank: int | None, energy: float | None, max_rank: int | None) -> tuple[Tensor, Tensor]:
    """Return B [out, r] and A [r, in] of a float32 delta [out, in], each with the roots of the singular values."""
    side = min(delta.shape)
    limit = min(side, rank or max_rank or side)
    width = limit if energy is None else min(FIRST_RANK, limit)
    while True:
        # Up to a quarter of the side, subspace iteration is faster than the SVD. Its worst case is pure noise, whose
        # singular values hardly differ.
        exact = side <= EXACT_SVD_SIZE or 4 * (width + OVERSAMPLING) > side
        if exact:
            B, A = best_factors(delta, limit)
        else:
            B, A = top_factors(delta, width)
        if energy is None:
            return B, A
        # A truncation to k = 1, 2, … misses the ‖Δ‖² that BA misses, and the S² of BA after k. The rows of A have the
        # length √S.
        S2 = to_float64(A).square().sum(1).square()
        missed = _norm(delta - B @ A) ** 2 + S2.flip(0).cumsum(0).flip(0) - S2
        r = int((missed > (1 - energy) * _norm(delta) ** 2).sum()) + 1
        if exact or r <= width or width == limit:
            r = min(r, limit)
            return B[:, :r], A[:r]
        width = min(2 * width, limit)


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.to(float64_device(x.device)), dtype=torch.float64).item()


def _check_place(folder: Path, checkpoints: Sequence[Checkpoint], device: str | torch.device) -> None:
    """Raise ValueError if the adapter cannot be written to the folder, or nothing computed on the device."""
    if folder.resolve() in {checkpoint.folder.resolve() for checkpoint in checkpoints}:
        raise ValueError(f"output_dir={str(folder)!r} is one of the checkpoints: give the adapter a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file: give the adapter a folder of its own")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder if folder.is_dir() else folder.parent).close()
    except OSError as error:
        raise ValueError(f"output_dir={str(folder)!r} cannot be written: {error}") from error
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for CUDA.
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `extract_lora`."""
    parser = argparse.ArgumentParser(
        prog="lorapre-extract", description="Write the difference of two checkpoints as a LoRA adapter."
    )
    parser.add_argument("base", help="checkpoint before the tuning: a folder, or a model in the local hub cache")
    parser.add_argument("tuned", help="checkpoint after it")
    parser.add_argument("output_dir", help="where the adapter and its report go")
    parser.add_argument("--rank", type=int, help="rank of every module; or")
    parser.add_argument("--energy", type=float, help="share of each module's change to keep, in (0, 1]")
    parser.add_argument("--max-rank", type=int, help="upper bound of the ranks that --energy chooses")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        help="module names, or one regular expression of whole module names (default: all-linear)",
    )
    parser.add_argument(
        "--dtype", help="of the stored factors: float32, bfloat16 or float16 (default: the checkpoint's)"
    )
    parser.add_argument("--device", default="cpu", help="where the SVDs are computed (default: cpu)")
    options = vars(parser.parse_args(arguments))
    targets = options["target_modules"]
    # PEFT takes "all-linear" or a regular expression as a string, and names as a list.
    if len(targets) == 1 and not targets[0].replace(".", "_").isidentifier():
        options["target_modules"] = targets[0]
    try:
        print(extract_lora(**options))
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
