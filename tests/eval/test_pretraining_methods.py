"""A method as the optimizer of a whole model: who trains what, at which rate, and what is saved."""

import copy

import pytest
import rivals
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments

from eval.methods import METHODS, pretraining_optimizer
from eval.optimizers.chained import ChainedOptimizer
from eval.optimizers.scale import Scale
from eval.optimizers.sinkgd import SinkGD

WEIGHTS = [name for name, method in METHODS.items() if method.trains == "weights"]
LR = 1e-2


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), learning_rate=LR, adam_beta2=0.95, use_cpu=True)


@pytest.fixture
def model(make_llama):
    """Large enough for 8-bit moments."""
    return make_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=1)


def named(name):
    method = METHODS[name]
    if reason := method.unavailable():
        pytest.skip(reason)
    return method, method.merged({})


def train(model, optimizer, steps, seed=0, graph=False):
    """Weights after so many steps on random tokens. graph: of the gradients, kept."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(4, 60, (2, 16), generator=generator)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            model(input_ids=ids, labels=ids).loss.backward(create_graph=graph)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("others_lr", [None, 1e-3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_parameter_is_trained_and_stays_trainable(name, others_lr, model, args):
    method, options = named(name)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = pretraining_optimizer(method, model, args, options, others_lr)
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())
    after = train(model, optimizer, 2, graph=method.second_order)
    assert all(param.requires_grad for param in model.parameters())
    assert not [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_saved_optimizer_goes_on_as_it_would_have(name, model, args, tmp_path):
    """Through a file, into an optimizer that has not stepped, bit for bit."""
    method, options = named(name)
    optimizer = pretraining_optimizer(method, model, args, options, 1e-3)
    train(model, optimizer, 2, graph=method.second_order)
    twin = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = pretraining_optimizer(method, twin, args, options, 1e-3)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))  # as Trainer does
    torch.manual_seed(0)  # MLorc's sketches
    expected = train(model, optimizer, 2, seed=1, graph=method.second_order)
    torch.manual_seed(0)
    found = train(twin, other, 2, seed=1, graph=method.second_order)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize("name", ["scale", "sinkgd", "racs", "alice", "adamw"])
def test_the_others_take_adamws_steps_at_their_own_rate(name, model, args):
    """In every row the same, whatever becomes of the matrices: after one step they are where AdamW puts them."""
    method, options = named(name)
    optimizer = pretraining_optimizer(method, model, args, options, 1e-3)
    head = model.lm_head.weight
    start = head.detach().double().numpy().copy()
    ids = torch.randint(4, 60, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = head.grad.double().numpy()
    optimizer.step()
    rule = rivals.Adam(lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    allowed = rivals.room(rule, start, [gradient], torch.float32)
    assert abs(head.detach().double().numpy() - rule.step(gradient, start)).max() <= allowed


def test_scales_own_way_of_head_embeddings_and_norms(model, args):
    """arXiv 2506.16659: momentum in the head alone; an embedding's inputs are its tokens; norms by AdamW at 2e-2."""
    optimizer = pretraining_optimizer(METHODS["scale"], model, args, {})
    by_param = {param: group for group in optimizer.param_groups for param in group["params"]}
    head, embedding = by_param[model.lm_head.weight], by_param[model.model.embed_tokens.weight]
    matrix, norm = by_param[model.model.layers[0].mlp.up_proj.weight], by_param[model.model.norm.weight]
    assert [(group["momentum"], group["dim"]) for group in (matrix, head, embedding)] == [(0.0, 1), (0.9, 1), (0.0, 0)]
    assert (norm["betas"], norm["lr"]) == ((0.9, 0.999), 2e-2)
    assert {group["lr"] for group in (matrix, head, embedding)} == {LR}
    before = model.model.embed_tokens.weight.detach().clone()
    after = train(model, optimizer, 1)["model.embed_tokens.weight"]
    moved = ((before - after) / LR).square().mean(0).sqrt()  # over the tokens, of each number of the width
    # 64 squares are summed, and weights of up to 4 numbers rounded at 1e-2 of them.
    torch.testing.assert_close(moved, torch.ones_like(moved), rtol=rivals.gamma(100), atol=rivals.gamma(4) * 4 / LR)


def test_a_tied_head_is_a_head(make_llama, args):
    model = make_llama(tie_word_embeddings=True, num_hidden_layers=1)
    optimizer = pretraining_optimizer(METHODS["scale"], model, args, {})
    (group,) = (g for g in optimizer.param_groups if any(p is model.lm_head.weight for p in g["params"]))
    assert (group["momentum"], group["dim"]) == (0.9, 1)


def test_pretraining_needs_weights_and_something_beside_matrices(model, args):
    with pytest.raises(ValueError, match="LoRA trains an adapter"):
        pretraining_optimizer(METHODS["lora"], model, args, {})
    METHODS["adamw"].attach(model, None)  # freezes all but the matrices
    with pytest.raises(ValueError, match="no trainable parameter beside the matrices"):
        pretraining_optimizer(METHODS["adamw"], model, args, {})


def test_a_scheduler_reaches_every_part_before_and_after_loading(model, args):
    optimizer = pretraining_optimizer(METHODS["scale"], model, args, {}, 1e-3)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does at once
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    rates = [{group["lr"] for group in part.param_groups} for part in optimizer.optimizers]
    assert rates == [{LR / 2}, {1e-3 / 2}]


def test_chained_optimizers_refuse_what_does_not_fit():
    one, two = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match="a parameter in common"):
        ChainedOptimizer(torch.optim.SGD([one]), torch.optim.SGD([one, two]))
    chained = ChainedOptimizer(torch.optim.SGD([one]), torch.optim.SGD([two]))
    with pytest.raises(ValueError, match="found 1 saved parameter groups; expected 2"):
        chained.load_state_dict(torch.optim.SGD([one]).state_dict())
    assert chained.step(lambda: 7) == 7


def test_looking_at_a_chained_state_adds_nothing_to_it():
    one, two = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    chained = ChainedOptimizer(torch.optim.Adam([one]), torch.optim.Adam([two]))
    one.grad = two.grad = torch.ones(2, 2)
    chained.step()
    assert chained.state[two] is chained.optimizers[1].state[two]
    assert set(chained.state) == {one, two}
    assert sorted(chained.state_dict()["state"]) == [0, 1]
    with pytest.raises(KeyError):
        chained.state[torch.nn.Parameter(torch.ones(1))]


def test_own_optimizers_take_matrices_only():
    with pytest.raises(ValueError, match=r"SinkGD got a parameter of shape \(3,\); expected matrices"):
        SinkGD([torch.nn.Parameter(torch.zeros(3))])


def test_own_state_keeps_its_dtype_when_it_is_loaded():
    """float32 beside bfloat16 weights, where `torch.optim.Optimizer` would round it."""
    param = torch.nn.Parameter(torch.randn(4, 8).bfloat16())
    optimizer, other = (Scale([param], momentum=0.9) for _ in range(2))
    param.grad = torch.randn(4, 8).bfloat16()
    for _ in range(2):
        optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    held, loaded = (made.state[param]["exp_avg"] for made in (optimizer, other))
    assert loaded.dtype == torch.float32
    assert torch.equal(held, loaded)
