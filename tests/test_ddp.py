"""Two processes under DistributedDataParallel, on the CPU: the ranks stay equal, and equal to one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre_peft import LoRAPreAdamW, LoRAPreConfig, create_lorapre_optimizer

STEPS = 6


def adapted_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    return get_peft_model(LlamaForCausalLM(config), LoRAPreConfig(r=8, target_modules="all-linear"))


def run(model, batches):
    """Train on ``batches``; every process has its own global RNG state, which no step may read."""
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [value for param in optimizer.state.values() for value in param.values()]
    return [p.detach().clone() for p in model.parameters() if p.requires_grad] + [t.clone() for t in state]


def batches():
    return torch.randint(0, 64, (STEPS, 4, 12), generator=torch.Generator().manual_seed(1))


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(adapted_llama())
    torch.manual_seed(100 + rank)
    mine = run(model, [ids[2 * rank : 2 * rank + 2] for ids in batches()])
    try:
        LoRAPreAdamW([torch.nn.Parameter(torch.ones(8, 8))], update_in_backward=True)
    except NotImplementedError as error:
        torch.save({"tensors": mine, "error": str(error)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first["tensors"], second["tensors"]))
    alone = run(adapted_llama(), batches())
    # The mean of two halves' gradients rounds otherwise than the whole batch's: 6 steps of 1e-2 stay within 1e-4.
    for a, b in zip(first["tensors"], alone):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    assert "update_in_backward=True in a run of 2 processes" in first["error"]
