"""This module times the forward and backward pass of a linear layer under LoRA, by PEFT and in RunLoRA's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from eval.runlora import RunLoRALinear, cheapest
from eval.speed_measure import Result, race, temporary_bytes, timed
from lorapre_peft.integrations.summary import format_bytes

HEAD = "| layer | forward and backward, ms (quartiles) | × PEFT's | temporaries |\n|---|---|---|---|"


@dataclass(frozen=True)
class LayerCase:
    """Holds the shape of a layer of a model, the rank of its adapter, and the number of tokens of a batch."""

    name: str
    out_features: int
    in_features: int
    lora_r: int
    tokens: int


# These are layers of attention and MLP of Llama-2-7B. Merging W + s B A saves operations from 2,049 and from 2,986
# tokens on.
LAYERS = [
    LayerCase(f"Llama-2-7B {name}, r={r}, {tokens} tokens", p, 4096, r, tokens)
    for name, p in (("q_proj", 4096), ("up_proj", 11008))
    for r in (8, 64)
    for tokens in (512, 4096)
]
QUICK_LAYERS = [LayerCase("small, r=8, 64 tokens", 96, 64, 8, 64)]


@dataclass
class Pass:
    """Holds a layer's forward and backward pass, ready to be timed.

    Attributes:
        step: function that makes one pass.
        device: device of the layer.
        result: figures of the pass.
        turns: rounds of a race in which it takes part.
    """

    step: Callable[[], None]
    device: torch.device
    result: Result
    turns: int = 0

    def seconds(self) -> float:
        """Return the seconds of one pass."""
        return timed(self.step, self.device)


def measure_layer(case: LayerCase, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return a case's description and the results of both layers, ready for JSON.

    Weight and adapter are float32 on a CPU and bfloat16 on a GPU, where autocast would make both layers' products
    bfloat16.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = nn.Linear(case.in_features, case.out_features, bias=False, device=device, dtype=dtype)
    config = LoraConfig(r=case.lora_r, lora_alpha=2 * case.lora_r)
    layer = Linear(base.requires_grad_(False), "default", config=config, r=case.lora_r, lora_alpha=2 * case.lora_r)
    layer = layer.to(device, dtype)
    x = torch.randn(case.tokens, case.in_features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(case.tokens, case.out_features, device=device, dtype=dtype)
    order = cheapest(case.tokens, case.out_features, case.in_features, case.lora_r)
    note = ", ".join(name for name, chosen in asdict(order).items() if chosen) or "no product with W + s B A or dyᵀ x"
    passes = []
    for name, module, said in (("PEFT", layer, ""), ("RunLoRA", RunLoRALinear(layer), note)):

        def step(module: nn.Module = module) -> None:
            module(x).backward(dy)
            x.grad = None
            module.zero_grad()

        result = Result(name, "peft", version("peft"), muon=False, note=said)
        step()
        result.temporary_bytes = temporary_bytes(step, device)
        passes.append(Pass(step, device, result))
    race(passes, seconds)
    return asdict(case) | {"results": [one.result.as_dict() for one in passes]}


def layers_markdown(cases: list[dict[str, Any]]) -> str:
    """Return a table of all cases as Markdown."""
    lines = ["### A linear layer under LoRA", "", HEAD]
    for case in cases:
        for found in case["results"]:
            if found["reason"]:
                lines.append(f"| {case['name']}: {found['name']} | {found['reason']} | – | – |")
                continue
            low, high = (1e3 * quartile for quartile in found["quartiles"])
            name = found["name"] + (f" ({found['note']})" if found["note"] else "")
            lines.append(
                f"| {case['name']}: {name} | {1e3 * found['median']:.3g} ({low:.3g}–{high:.3g}, "
                f"n={len(found['seconds'])}) | {found['ratio']:.2f} | {format_bytes(found['temporary_bytes'])} |"
            )
    return "\n".join([*lines, ""])
