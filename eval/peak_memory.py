"""This module measures the peak memory of full-weight training of a model with random weights, beside the estimate.

    python -m eval.peak_memory meta-llama/Llama-2-7b-hf

The values of weights do not matter for memory, so nothing is downloaded for the built-in shapes.
"""

from __future__ import annotations

import argparse

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorapre_peft import create_lorapre_optimizer
from lorapre_peft.integrations.summary import format_bytes
from lorapre_peft.memory.models import find_config
from lorapre_peft.memory.peak import Measurement, MemoryEstimate, estimate, measure


def measured_and_estimated(
    config: PretrainedConfig, *, momentum_rank: int, batch: int, seq_len: int, steps: int, device: torch.device
) -> tuple[Measurement, MemoryEstimate]:
    """Train ``steps`` steps in bfloat16, and return the measurement of the peak memory, and its estimate.

    Each weight is updated in the backward pass, and activations are checkpointed.

    Args:
        config: shape of the model.
        momentum_rank: rank k of LoRA-Pre's momentum.
        batch, seq_len: shape of the batch of tokens.
        steps: number of steps.
        device: device that trains.
    """
    shared = dict(momentum_rank=momentum_rank, in_backward=True, batch=batch, seq_len=seq_len, checkpointing=True)
    expected = estimate(config, **shared)
    with measure(device) as measured:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = create_lorapre_optimizer(model, momentum_rank=momentum_rank, update_in_backward=True)
        for _ in tqdm(range(steps), desc="training"):
            tokens = torch.randint(0, config.vocab_size, (batch, seq_len), device=device)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
    return measured, expected


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.peak_memory", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="built-in shape, folder or config.json, or name on the hub")
    parser.add_argument("--momentum-rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="at least 2, as the first starts the factors")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: expected at least 2, as the first step starts the factors")
    try:
        config, _ = find_config(args.model)
    except ValueError as error:
        parser.error(str(error))
    measured, expected = measured_and_estimated(
        config,
        momentum_rank=args.momentum_rank,
        batch=args.batch,
        seq_len=args.seq_len,
        steps=args.steps,
        device=torch.device(args.device),
    )
    print(
        f"{args.model}, bfloat16, k={args.momentum_rank}, batch {args.batch} × {args.seq_len}, updates in the "
        "backward pass"
    )
    print(f"measured:  {format_bytes(measured.peak_bytes)} ({measured.what})")
    print(f"estimated: {format_bytes(expected.total)}")


if __name__ == "__main__":
    main()
