# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import copy

import pytest
import torch
from torch import nn

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorapre_optimizer


class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.hidden = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, ids):
        return self.head(self.norm(torch.tanh(self.hidden(self.embedding(ids)))).mean(1))


def build(**options):
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 8, "target_modules": ["hidden"], "modules_to_save": ["head"]} | options))
    return get_peft_model(SimpleNet(), config)


def train(model, optimizer, steps):
    ids = torch.randint(40, (32, 6), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids), ids[:, 0] % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_lorapre_lowers_the_loss():
    model = build()
    losses = train(model, create_lorapre_optimizer(model, lr=1e-2), 30)
    assert losses[-1] < 0.7 * losses[0]


def test_lorapre_state_is_low_rank_for_the_adapter_and_full_for_the_rest():
    model = build()
    optimizer = create_lorapre_optimizer(model, lr=1e-2, momentum_rank=3)
    train(model, optimizer, 2)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        state = optimizer.state[param]
        if "lora_" in name:
            assert {key: state[key].shape[0 if key.endswith("A") else 1] for key in ("m_A", "m_B", "v_A", "v_B")} == {
                "m_A": 3,
                "m_B": 3,
                "v_A": 1,
                "v_B": 1,
            }
        else:
            assert state["exp_avg"].shape == param.shape


def test_lorapre_default_momentum_rank_is_a_quarter_of_the_rank():
    model = build(r=16)
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    assert {group["momentum_rank"] for group in optimizer.param_groups} == {0, 4}


def test_lorapre_rest_is_trained_as_by_adamw():
    model = build()
    reference = copy.deepcopy(model)
    train(model, create_lorapre_optimizer(model, lr=1e-2, weight_decay=0.1), 1)
    head = [(name, param) for name, param in reference.named_parameters() if "head" in name and param.requires_grad]
    groups = [
        {"params": [param for name, param in head if "bias" not in name], "weight_decay": 0.1},
        {"params": [param for name, param in head if "bias" in name], "weight_decay": 0.0},
    ]
    train(reference, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)), 1)
    found, expected = dict(model.named_parameters()), dict(reference.named_parameters())
    for name in expected:
        if "modules_to_save" in name:
            torch.testing.assert_close(found[name], expected[name])


def test_lorapre_a_zero_first_gradient_starts_nothing():
    """LoRA's A has no gradient at the first step, since B is zero: its momenta must start at the second one."""
    model = build()
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    a = next(p for n, p in model.named_parameters() if "lora_A" in n)
    before = a.detach().clone()
    train(model, optimizer, 1)
    assert torch.equal(a, before)
    train(model, optimizer, 1)
    assert not torch.equal(a, before)


def test_lorapre_resumes_where_it_was():
    model = build()
    optimizer = create_lorapre_optimizer(model, lr=1e-2)
    train(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    other = create_lorapre_optimizer(resumed, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 3) == train(resumed, other, 3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"momentum_rank": 8}, "not below the rank 8"),
        ({"betas": (0.99, 0.9)}, "Invalid betas"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_lorapre_rejects(options, error):
    with pytest.raises(ValueError, match=error):
        create_lorapre_optimizer(build(), **({"lr": 1e-2} | options))


def test_lorapre_needs_a_lora_adapter():
    with pytest.raises(ValueError, match="did not find a LoRA adapter"):
        create_lorapre_optimizer(SimpleNet(), lr=1e-2)
