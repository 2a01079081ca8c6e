"""This module makes the cases of `eval.speed`: shapes of real models' adapters and weights, with random gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eval.methods.method import trained
from lorapre_peft.integrations.config import default_momentum_rank
from lorapre_peft.integrations.targets import weight_targets
from lorapre_peft.lowrank.layout import MOMENTUM_RANK
from lorapre_peft.memory.models import find_config, meta_model

GRADIENT_RANK = 4  # The part of a synthetic gradient that is not noise has this rank.
NOISE = 0.1  # The root mean square of the noise is this share of the low-rank part's.
GRADIENT_SCALE = 1e-3
# A weight takes so many bytes: itself, its gradient, the two moments of the reference, which takes part in every race,
# and two more and a temporary of foreach AdamW, all in bfloat16.
WEIGHT_BYTES_ON_GPU = 14


@dataclass(frozen=True)
class Case:
    """Holds a set of matrices to step through.

    Attributes:
        name: name of the case.
        momentum_rank: rank k.
        model: name for `find_config`. It is empty if ``shapes`` lists the matrices.
        lora_r: rank of adapters on all linear layers. None stands for the weights of those layers.
        layers: number of the model's layers that a CPU takes. None stands for all. A GPU takes all that fit.
        shapes: matrices as (p, q, number of them).
        sweep: what varies from case to case, or nothing.
        value: value of what varies.
    """

    name: str
    momentum_rank: int
    model: str = ""
    lora_r: int | None = None
    layers: int | None = None
    shapes: tuple[tuple[int, int, int], ...] = ()
    sweep: str = ""
    value: int = 0

    @property
    def kind(self) -> str:
        """Return what is trained: ``"adapters"`` or ``"weights"``."""
        return "adapters" if self.lora_r else "weights"


@dataclass
class Problem:
    """Holds a case in memory: a model of which only the trained parameters and their gradients have storage.

    Attributes:
        case: the case.
        model: the model.
        device: device of the parameters.
        extent: text that says which part of the model it is.
        pristine: copies of the gradients, once `keep_gradients` has made them.
    """

    case: Case
    model: nn.Module
    device: torch.device
    extent: str
    pristine: list[Tensor] | None = None

    @property
    def params(self) -> list[nn.Parameter]:
        """Return the trained parameters."""
        return trained(self.model)

    def keep_gradients(self) -> None:
        """Copy the gradients, for methods that overwrite them."""
        if self.pristine is None:
            self.pristine = [param.grad.clone() for param in self.params]

    def restore_gradients(self) -> None:
        """Write the copies back into the gradients."""
        for param, grad in zip(self.params, self.pristine):
            param.grad.copy_(grad)

    @contextlib.contextmanager
    def same_parameters(self) -> Iterator[None]:
        """Undo what a ``with`` block freezes. LoRA-FA freezes every A, which the other methods train."""
        params = self.params
        try:
            yield
        finally:
            for param in params:
                param.requires_grad_(True)


def build(case: Case, device: torch.device) -> Problem:
    """Return a case in memory, with random parameters and gradients.

    Adapters are float32, as PEFT keeps them. Weights are float32 on a CPU and bfloat16 on a GPU. Matrices of
    ``shapes`` are float32.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    if case.shapes:
        dtype, extent = torch.float32, "float32"
        params = [nn.Parameter(torch.empty(p, q, device="meta")) for p, q, n in case.shapes for _ in range(n)]
        model: nn.Module = nn.ParameterList(params)
    else:
        config = copy.deepcopy(find_config(case.model)[0])
        total = config.num_hidden_layers
        config.num_hidden_layers = _layers(case, config, device)
        model = meta_model(config, dtype)
        if case.lora_r:
            adapter = LoraConfig(r=case.lora_r, lora_alpha=2 * case.lora_r, target_modules="all-linear")
            model = get_peft_model(model, adapter)
        else:
            targets = weight_targets(model, "all-linear", None, None)
            for param in model.parameters():
                param.requires_grad_(param in targets)
        extent = f"{config.num_hidden_layers} of {total} layers, {str(trained(model)[0].dtype).removeprefix('torch.')}"
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.requires_grad:
                values = 0.02 * torch.randn(param.shape, generator=generator, device=device)
                module._parameters[name] = real = nn.Parameter(values.to(param.dtype))
                real.grad = gradient(param.shape, generator).to(param.dtype)
    return Problem(case, model, device, extent)


def gradient(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a float32 matrix of low rank plus noise, whose root mean square is `GRADIENT_SCALE`."""
    p, q = shape
    options = dict(generator=generator, device=generator.device)
    rank = min(GRADIENT_RANK, p, q)
    low_rank = torch.randn(p, rank, **options) @ torch.randn(rank, q, **options)
    scale = GRADIENT_SCALE / (1 + NOISE**2) ** 0.5
    return low_rank.mul_(scale / rank**0.5).add_(torch.randn(p, q, **options), alpha=scale * NOISE)


def _layers(case: Case, config: object, device: torch.device) -> int:
    total = config.num_hidden_layers
    if device.type != "cuda":
        return min(case.layers or total, total)
    if case.lora_r:
        return total
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    per_layer = WEIGHT_BYTES_ON_GPU * sum(
        param.numel() for param in weight_targets(meta_model(one), "all-linear", None, None)
    )
    free = torch.cuda.mem_get_info(device)[0]
    if free < per_layer:
        raise torch.OutOfMemoryError(
            f"{free / 1e9:.1f} GB free on {device}, one layer of {case.model} takes {per_layer / 1e9:.1f}"
        )
    return min(total, int(0.95 * free / per_layer))


def _adapters(label: str, model: str, ranks: dict[int, int | None]) -> list[Case]:
    return [Case(f"{label} adapters r={r}", default_momentum_rank(r), model, r, layers) for r, layers in ranks.items()]


def _weights(label: str, model: str, layers: int | None) -> list[Case]:
    return [Case(f"{label} weights", MOMENTUM_RANK, model, None, layers)]


def _sweep(what: str, values: dict[int, tuple[int, tuple[int, int, int]]]) -> list[Case]:
    return [
        Case(f"{what} {value}", k, shapes=(shape,), sweep=what, value=value) for value, (k, shape) in values.items()
    ]


# This maps the adapter's rank to the number of layers on a CPU. At high ranks they have as many parameters as all
# layers at r = 16.
CPU_LAYERS = {8: None, 16: None, 64: 8, 256: 2}
SMOLLM2 = "SmolLM2-135M"
PRESETS: dict[str, list[Case]] = {
    "adapters-7b": _adapters("Llama-2-7B", "Llama-2-7b-hf", CPU_LAYERS),
    "adapters-8b": _adapters("Llama-3.1-8B", "Llama-3.1-8B", CPU_LAYERS),
    "weights-7b": _weights("Llama-2-7B", "Llama-2-7b-hf", 1),
    "weights-8b": _weights("Llama-3.1-8B", "Llama-3.1-8B", 1),
    "smollm2": _adapters(SMOLLM2, SMOLLM2, {8: None}) + _weights(SMOLLM2, SMOLLM2, None),
    "sweep-rank": _sweep("momentum rank k", {k: (k, (2048, 2048, 4)) for k in (1, 2, 4, 8, 16, 32, 64, 128)}),
    "sweep-count": _sweep("number of 8×4096 matrices", {n: (2, (8, 4096, n)) for n in (1, 4, 16, 64, 256, 1024)}),
    "sweep-size": _sweep(
        "side of 4 square matrices", {s: (8, (s, s, 4)) for s in (64, 128, 256, 512, 1024, 2048, 4096)}
    ),
}
QUICK = [
    *_adapters(SMOLLM2, SMOLLM2, {8: 1}),
    *_weights(SMOLLM2, SMOLLM2, 1),
    *_sweep("momentum rank k", {k: (k, (64, 64, 2)) for k in (2, 4)}),
]
