"""This module compares thousands of steps with crashes at random moments with the same run without any.

`python tests/helpers/soak.py` trains a tiny Llama's LoRA adapter twice on the same batches. The second run writes a
checkpoint at random steps and "crashes" at other random steps: model, optimizer and schedule are thrown away, built
anew with other seeds, and loaded from the last checkpoint. In the end the weights and optimizer states of both runs
must be equal in every bit. The memory of the process and the number of live tensors must not have grown.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
from pathlib import Path

import psutil
import torch
from peft import get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre_peft import LoRAPreConfig, create_lorapre_optimizer

WARMUP = 0.25  # After this share of the steps allocator and caches have settled.
RSS_GROWTH = 16_000_000  # The process may grow by so many bytes after the warmup.


class Run:
    """Holds everything that a crash loses: model, optimizer, schedule and the number of steps.

    Args:
        steps: number of steps of the whole schedule.
        seed: seed of the adapter's start.
        optimizer: ``"adamw"`` or ``"muon"``.
        dtype: dtype of the weights.
        options: further options of `create_lorapre_optimizer`.
    """

    def __init__(self, steps: int, seed: int, optimizer: str, dtype: torch.dtype, **options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).to(dtype)
        torch.manual_seed(seed)
        config = LoRAPreConfig(r=8, target_modules="all-linear", use_dora=True)
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False)
        rounding = "stochastic" if dtype == torch.bfloat16 else "nearest"
        self.optimizer = create_lorapre_optimizer(
            self.model, optimizer, lr=5e-3, weight_decay=0.01, bf16_rounding=rounding, **options
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.step = 0

    def train_step(self) -> None:
        """Train on the batch of this step, which depends on its number alone."""
        ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(self.step))
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1

    def weights(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, not copied."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, path: Path) -> None:
        """Write a checkpoint, which replaces the one before in a single operation."""
        parts = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        torch.save({"step": self.step, "weights": self.weights(), **parts}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        for name, value in self.weights().items():
            value.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step = saved["step"]

    def result(self) -> dict[str, Tensor]:
        """Return all weights and state tensors by name."""
        state = self.optimizer.state_dict()["state"]
        return self.weights() | {f"{i}.{name}": value for i, one in state.items() for name, value in one.items()}


def live_tensors() -> int:
    """Return the number of tensors that the garbage collector knows."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())  # isinstance would load lazy objects.


def soak(
    steps: int, seed: int = 0, optimizer: str = "adamw", dtype: torch.dtype = torch.float32, **options
) -> dict[str, int]:
    """Make both runs, and return counts of what happened.

    seed: seed of the moments of saves and crashes. Other arguments are those of `Run`. Raises AssertionError if any
    bit differs or memory grows.
    """
    chance, process = random.Random(seed), psutil.Process()
    saves, crashes = max(0.01, 10 / steps), max(0.005, 5 / steps)  # These are probabilities at each step.
    straight = Run(steps, 1, optimizer, dtype, **options)
    start = {name: value.clone() for name, value in straight.weights().items()}
    for _ in tqdm(range(steps), desc="uninterrupted"):
        straight.train_step()
    expected = {name: value.clone() for name, value in straight.result().items()}
    assert not any(torch.equal(start[name], expected[name]) for name in start)
    del straight

    figures = {"saves": 0, "crashes": 0, "steps done twice": 0}
    resident, tensors, loaded = [], [], 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps, desc="with crashes") as bar:
        path = Path(folder) / "checkpoint.pt"
        run = Run(steps, 1, optimizer, dtype, **options)
        run.save(path)
        while run.step < steps:
            run.train_step()
            event = chance.random()
            if event < saves:
                run.save(path)
                figures["saves"] += 1
            elif event < saves + crashes:
                lost = run.step
                del run
                run = Run(steps, chance.randrange(2**32), optimizer, dtype, **options)
                run.load(path)
                figures["crashes"] += 1
                figures["steps done twice"] += lost - run.step
                loaded = run.step
            if event < saves + crashes and run.step > WARMUP * steps:
                resident.append(process.memory_info().rss)
                # The first step after a load stacks the state that was loaded, whose tensors are gone at the next
                # step.
                if run.step > loaded + 1:
                    tensors.append(live_tensors())
            bar.update(run.step - bar.n)
    found = run.result()
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, (
        f"{len(different)} of {len(expected)} tensors differ from the uninterrupted run's: {different[:3]}"
    )
    figures["most tensors"], figures["least tensors"] = max(tensors), min(tensors)
    assert len(set(tensors)) == 1, f"between {min(tensors)} and {max(tensors)} live tensors"
    figures["bytes grown"] = max(resident) - resident[0]
    assert figures["bytes grown"] < RSS_GROWTH, f"{figures['bytes grown']:,} bytes more than after the warmup"
    return figures


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of saves and crashes")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--update_rule", choices=("als", "newton"), default="als")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights, written with stochastic rounding")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    print(soak(args.steps, args.seed, args.optimizer, dtype, update_rule=args.update_rule))


if __name__ == "__main__":
    main()
