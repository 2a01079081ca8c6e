"""This module declares LoRA-Pre and the optimizers that it is compared with. Each is built from a model.

A peer comes from its published package, as the suites build it (`eval.methods`) or with the package's own options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from eval.methods import METHODS
from eval.methods.method import trained
from lorapre_peft import LoRAPreAdamW, LoRAPreMuon
from lorapre_peft.kernels.choose import available

GALORE_GAP = 200  # GaLore's published runs compute the projections every so many steps (scripts/benchmark_c4).
# LoRA-Pro's default solver, "vec", solves r² equations of r² unknowns for each pair, which take 17 GB at r = 256.
LARGEST_VEC_RANK = 16


@dataclass(frozen=True)
class TimedMethod:
    """Holds an optimizer that is timed, under its name.

    Attributes:
        name: name in tables.
        package: name under which it is installed.
        build: function of a model, a learning rate and a rank that returns an optimizer of the model's trainable
            parameters. These are the matrices of a PEFT model's adapters, or the weights of a plain model. The rank is
            that of the compressed momentum, for methods that have one.
        kinds: what it trains: ``"adapters"``, ``"weights"`` or both.
        muon: whether it is compared with Muon rather than with AdamW.
        gradient_reads: how often its step must read the gradient. None stands for no claim.
        overwrites_gradients: whether a step changes the gradients.
        patience: how many times as long as those of others its first steps may take.
        prime: function that puts a fresh optimizer past a first step that is not like the others.
        note: what a reader of its figures must know.
    """

    name: str
    package: str
    build: Callable[[nn.Module, float, int], Optimizer]
    kinds: tuple[str, ...] = ("adapters", "weights")
    muon: bool = False
    gradient_reads: int | None = None
    overwrites_gradients: bool = False
    patience: float = 1
    prime: Callable[[Optimizer], None] | None = None
    note: str = ""

    @property
    def package_version(self) -> str | None:
        """Return the installed version, or None if the package is missing."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _adamw(**options: Any) -> Callable[[nn.Module, float, int], Optimizer]:
    fixed = dict(betas=(0.9, 0.95), weight_decay=0.0)  # Nothing here decays weights. AdamW would by default.
    return lambda model, lr, rank: torch.optim.AdamW(trained(model), lr=lr, **fixed, **options)


def _as_in_suites(name: str) -> Callable[[nn.Module, float, int], Optimizer]:
    """Return the builder of an entry of `METHODS`, with the entry's own options except for the rank."""
    method = METHODS[name]

    def build(model: nn.Module, lr: float, rank: int) -> Optimizer:
        adam = dict(adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0)
        options = method.merged({"rank": rank} if "rank" in method.options else {})
        return method.build(model, cast(Any, SimpleNamespace(learning_rate=lr, **adam)), options)

    return build


def _lora_pro(mode: str) -> Callable[[nn.Module, float, int], Optimizer]:
    def build(model: nn.Module, lr: float, rank: int) -> Optimizer:
        from lora_pro import LoRAProAdamW

        solver = "vec" if model.peft_config["default"].r <= LARGEST_VEC_RANK else "eig"
        return LoRAProAdamW(model, lr=lr, weight_decay=0.0, lorapro_mode=mode, efficient_solver=solver)

    return build


def _galore(model: nn.Module, lr: float, rank: int) -> Optimizer:
    from galore_torch import GaLoreAdamW

    options = dict(rank=rank, update_proj_gap=GALORE_GAP, scale=0.25, proj_type="std")
    return GaLoreAdamW([{"params": trained(model), **options}], lr=lr, no_deprecation_warning=True)


def _project_galore(optimizer: Optimizer) -> None:
    """Set a random orthonormal basis as each projection, and the step to 1, so that no SVD is due at once."""
    from galore_torch.galore_projector import GaLoreProjector

    for group in optimizer.param_groups:
        for param in group["params"]:
            projector = GaLoreProjector(group["rank"], update_proj_gap=GALORE_GAP, scale=group["scale"])
            p, q = param.shape
            basis = torch.linalg.qr(torch.randn(min(p, q), group["rank"], device=param.device)).Q.to(param.dtype)
            projector.ortho_matrix = basis.T.contiguous() if p >= q else basis
            optimizer.state[param] |= {"step": 1, "projector": projector}


REFERENCE = TimedMethod("AdamW, fused", "torch", _adamw(fused=True), gradient_reads=1)
PEERS = (
    TimedMethod("AdamW, foreach", "torch", _adamw(foreach=True), gradient_reads=1),
    TimedMethod(
        "LoRA-FA",
        "peft",
        _as_in_suites("lora-fa"),
        ("adapters",),
        note=f"trains B alone; {METHODS['lora-fa'].note}",
    ),
    TimedMethod("Riemannian AdamW", "peft", _as_in_suites("riemannian"), ("adapters",), overwrites_gradients=True),
    TimedMethod(
        "LoRA-Pro, efficient",
        "lora-pro-adamw",
        _lora_pro("efficient"),
        ("adapters",),
        overwrites_gradients=True,
        note=f"with the package's default solver, vec, up to r = {LARGEST_VEC_RANK}, and with eig above",
    ),
    TimedMethod("LoRA-Pro, full", "lora-pro-adamw", _lora_pro("full"), ("adapters",), overwrites_gradients=True),
    TimedMethod(
        "GaLore",
        "galore-torch",
        _galore,
        ("weights",),
        prime=_project_galore,
        note=f"without the full SVD of every matrix that is due each {GALORE_GAP} steps",
    ),
    TimedMethod(
        "MLorc",
        "mlorc-optim",
        _as_in_suites("mlorc"),
        note="the package's misspelt imports and its reshaping of matrices mended",
    ),
    TimedMethod("Muon", "torch", _as_in_suites("muon"), muon=True, gradient_reads=1),
)


def lorapre_methods(device: torch.device) -> list[TimedMethod]:
    """Return LoRA-Pre AdamW and Muon, once for each backend that runs on this device."""
    return [
        TimedMethod(
            f"LoRA-Pre {'Muon' if muon else 'AdamW'}, {backend}",
            "lorapre-peft",
            # Newton–Schulz runs in bfloat16, as in torch.optim.Muon.
            _lorapre(cls, {"backend": backend} | ({"ns_dtype": "bfloat16"} if muon else {})),
            muon=muon,
            gradient_reads=2,
            # The first steps of "compiled" make some twenty graphs. Those of AdamW compile the kernels of "cpp" and of
            # "triton". Muon, which comes later, is slow at every step on large weights.
            patience=4 if backend == "compiled" else 1 if muon or backend == "eager" else 10,
        )
        for muon, cls in ((False, LoRAPreAdamW), (True, LoRAPreMuon))
        for backend in available(device)
        if backend in cls.backend_names
    ]


def _lorapre(cls: type[Optimizer], options: dict[str, str]) -> Callable[[nn.Module, float, int], Optimizer]:
    # create_lorapre_optimizer sets stochastic rounding for weights too. It concerns bfloat16 parameters only.
    return lambda model, lr, rank: cls(
        trained(model), lr=lr, momentum_rank=rank, bf16_rounding="stochastic", **options
    )
