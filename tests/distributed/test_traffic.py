"""What `eval.traffic` says that a step sends is what its collectives carry."""

import pytest
import torch
import torch.distributed as dist
from processes import run
from stacking import group
from stepping import weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from eval.traffic import all_gather, all_reduce, main, payloads
from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

SHAPES = [(20, 12), (20, 12), (7, 16), (9,)]  # 7 rows and 9 numbers are not shared evenly by 2 processes
CASES = [(cls, rule) for cls in (LoRAPreAdamW, LoRAPreMuon) for rule in ("als", "newton")]


def carried(world, sharded):
    """Bytes of a step's all-reduces and all-gathers, for each of `CASES`, beside what `payloads` says."""
    mesh, results = init_device_mesh("cpu", (world,)), []
    for cls, rule in CASES:
        whole = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]
        params = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]) if sharded else value) for value in whole]
        optimizer = cls(params, momentum_rank=3, update_rule=rule)
        for param in params:
            param.grad = param.detach().clone()
        bytes_of = {"all_reduce": 0, "all_gather_into_tensor": 0}
        with pytest.MonkeyPatch.context() as patch:
            for name in bytes_of:
                plain = getattr(dist, name)

                def counting(tensor, *args, plain=plain, name=name, bytes_of=bytes_of, **kwargs):
                    bytes_of[name] += tensor.nbytes
                    return plain(tensor, *args, **kwargs)

                patch.setattr(dist, name, counting)
            optimizer.step()
        results.append((list(bytes_of.values()), list(payloads(optimizer, world))))
    return results


def test_payloads_are_those_of_the_collectives(tmp_path):
    for process in run(2, tmp_path / "run", carried, 2, True):
        for found, said in process:
            assert found == said


def test_whole_parameters_send_nothing(tmp_path):
    """As under DDP, which has averaged the gradients."""
    assert all(found == [0, 0] for found, _ in run(2, tmp_path / "run", carried, 2, False)[0])


def test_a_ring_sends_each_part_once_or_twice():
    """Four processes: in a ring, three quarters of what is gathered leave each of them, and twice that of a sum."""
    assert all_gather(400, 4) == 300
    assert all_reduce(400, 4) == 600


def test_one_matrix_by_hand():
    """20×12, k = 3, k_v = 1, als: 16 bytes of norms, 4·(3 + 1)·12 of projections, 8·2·(9 + 1) of Gram matrices."""
    adamw = LoRAPreAdamW([weights(20, 12)], momentum_rank=3)
    muon = LoRAPreMuon([weights(20, 12)], momentum_rank=3, update_rule="newton")
    assert payloads(adamw, 8) == (16 + 192 + 160, 0)
    assert payloads(muon, 8) == (16 + 144 + 72, 4 * 24 * 12)


def test_stacks_of_experts_by_hand():
    """Four experts of 20×12: one after the other each is whole on a process, interleaved each is a matrix as above."""
    after = LoRAPreAdamW([group("3-D", weights(4, 20, 12), 4)], momentum_rank=3)
    interleaved = LoRAPreAdamW([group("lora_B", weights(20, 12 * 4), 4)], momentum_rank=3)
    assert payloads(after, 8) == (0, 0)
    assert payloads(interleaved, 8) == (4 * (16 + 192 + 160), 0)


def test_a_single_process_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--processes", "1"])
    assert "--processes 1: expected at least 2" in capsys.readouterr().err
