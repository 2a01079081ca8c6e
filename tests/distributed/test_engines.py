"""Trainer under DDP and FSDP2, as `accelerate launch` starts it: checkpoints, resuming, and the launch configs."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from peft import get_peft_model
from processes import run
from tiny_llama import build_llama
from torch.distributed.tensor import DTensor
from trainers import arguments, inner, lorapre_trainer, training_logs
from versions import skip_before

from lorapre_peft import LoRAPreCallback, LoRAPreConfig

FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
ENGINES = {
    "ddp": {},
    "fsdp2": FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": "FULL_STATE_DICT"}},
    "fsdp2-sharded": FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}},
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def trainer_for(folder, kind, adapters, options, callback=None, **changed):
    """As a script under `accelerate launch` or `torchrun` builds it: they set these variables."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    schedule = dict(max_steps=4, lr_scheduler_type="cosine", save_strategy="steps", save_steps=2)
    args = arguments(folder, per_device_train_batch_size=2, **schedule, **(options | changed))
    if args.fsdp:  # accelerate looks at its FSDP options only on accelerators, and goes on as DDP on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    ids = torch.randint(4, 64, (24, 12), generator=torch.Generator().manual_seed(1)).tolist()
    model = build_llama()
    if adapters:
        model = get_peft_model(model, LoRAPreConfig(r=8, target_modules="all-linear", lora_dropout=0.1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return lorapre_trainer(model, args, rows, kind=kind, callback=callback)


def everything(trainer):
    optimizer = inner(trainer.optimizer)
    held = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        "params": [whole(param) for param in held],
        "state": [{name: whole(value) for name, value in optimizer.state[param].items()} for param in held],
        "losses": [entry["loss"] for entry in training_logs(trainer)],
        "sharded": [isinstance(param, DTensor) for param in held],
    }


def straight_and_resumed(folder, options, kind, adapters):
    results = []
    for resume in (None, folder / "checkpoint-2"):
        trainer = trainer_for(folder, kind, adapters, options)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        results.append(everything(trainer))
    return results


@pytest.mark.parametrize(
    ("engine", "kind", "adapters"),
    [
        pytest.param(
            *("ddp", "adamw", True), marks=skip_before("torch", "2.8", "cannot load onto cpu:0, as Trainer asks for")
        ),
        ("fsdp2", "adamw", False),
        ("fsdp2-sharded", "muon", True),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, engine, kind, adapters):
    ranks = run(2, tmp_path / "run", straight_and_resumed, tmp_path / "out", ENGINES[engine], kind, adapters)
    for straight, resumed in ranks:
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
        assert all(sharded == (engine != "ddp") for sharded in straight["sharded"])
        torch.testing.assert_close(straight["params"], ranks[0][0]["params"], rtol=0, atol=0)


def with_a_nan_loss_on_rank_1(folder):
    """Return the step at which a rank stops, and its parameters, if the second loss of rank 1 is NaN."""
    trainer = trainer_for(folder, "adamw", True, {}, callback=LoRAPreCallback(stop_on_nan_loss=True))
    calls = iter(range(1, 100))

    def spoil(module, inputs, output):
        if next(calls) == 2 and dist.get_rank() == 1:
            output.loss = output.loss * float("nan")
        return output

    trainer.model.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match="the loss of step 2 is NaN or infinite: training stops"):
        trainer.train()
    return trainer.state.global_step, everything(trainer)["params"]


def test_all_ranks_stop_at_the_nan_loss_of_one(tmp_path):
    """Otherwise the others would wait for it at their next all-reduce."""
    ranks = run(2, tmp_path / "run", with_a_nan_loss_on_rank_1, tmp_path / "out")
    assert [step for step, _ in ranks] == [2, 2]
    for values in zip(*(params for _, params in ranks)):
        assert torch.equal(*values)
        assert values[0].isfinite().all()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes/accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_the_configs(path):
    config = load_config_from_file(str(path))
    assert (config.distributed_type == DistributedType.FSDP) == path.stem.startswith("fsdp2")
    assert not config.fsdp_config or config.fsdp_config["fsdp_version"] == 2
