"""State and checkpoints: what is stored, and that a run which stops and resumes is the run that did not stop."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from stepping import LR, both_optimizers, both_rules, stream, take_steps
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

PLAIN_STATE = ["step", "exp_avg", "exp_avg_sq"]
FACTORED_STATE = {
    (LoRAPreAdamW, "als"): ["step", "m_B", "m_A", "v_B", "v_A", "v_energy", "v_scale"],
    (LoRAPreAdamW, "newton"): ["step", "m_B", "m_A", "v_B", "v_A"],
    (LoRAPreMuon, "als"): ["step", "m_B", "m_A"],
    (LoRAPreMuon, "newton"): ["step", "m_B", "m_A"],
}


def small_model(dtype=torch.float32):
    """Compressed matrices of two shapes, two of them alike; biases and a norm on the AdamW path."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, 20), nn.LayerNorm(20), nn.Linear(20, 10)
    return nn.Sequential(*layers).to(dtype)


def build(model, cls, rule="als", **options):
    return cls(model.parameters(), lr=LR, weight_decay=0.1, momentum_rank=2, update_rule=rule, **options)


def train(model, optimizer, steps, scheduler=None):
    """Steps ``steps`` of a run: the batch of a step depends on its number alone."""
    for step in steps:
        data = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(data).sin().square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_run(model_a, optimizer_a, model_b, optimizer_b):
    for a, b in zip(model_a.parameters(), model_b.parameters()):
        assert torch.equal(a, b)
        state_a, state_b = optimizer_a.state[a], optimizer_b.state[b]
        assert state_a.keys() == state_b.keys()
        for name in state_a:
            assert state_a[name].dtype == state_b[name].dtype
            assert torch.equal(state_a[name], state_b[name])


@both_optimizers
@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_state_is_named_float32_tensors(cls, rule, dtype):
    """Only tensors, so that `weights_only` loading works (GaLore's projector breaks it), and none of them rounded."""
    model = small_model(dtype)
    optimizer = build(model, cls, rule)
    train(model, optimizer, range(2))
    names = FACTORED_STATE[cls, rule]
    for param in model.parameters():
        state = optimizer.state[param]
        assert list(state) == (names if param.ndim == 2 else PLAIN_STATE)
        assert all(type(value) is torch.Tensor and value.dtype == torch.float32 for value in state.values())
        assert {value.device for value in state.values()} == {param.device}
        assert state["step"].shape == ()
        assert state["step"].item() == 2
        for moment in {name[0] for name in names if name[1] == "_"} & {"m", "v"} if param.ndim == 2 else ():
            k = 1 if (moment, rule) == ("v", "als") else 2
            assert state[f"{moment}_B"].shape == (param.shape[0], k)
            assert state[f"{moment}_A"].shape == (k, param.shape[1])
        assert all(state[name].shape == () for name in ("v_energy", "v_scale") if name in state)


@both_optimizers
@both_rules
def test_round_trip_through_a_file(cls, rule):
    model = small_model()
    optimizer = build(model, cls, rule)
    train(model, optimizer, range(3))
    saved = through_file(optimizer.state_dict())
    twin = copy.deepcopy(model)
    other = build(twin, cls, rule, seed=7)
    other.load_state_dict(saved)
    assert_same_run(model, optimizer, twin, other)
    ours, theirs = (
        [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in (optimizer, other)
    )
    assert ours == theirs


@both_optimizers
@both_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_equals_uninterrupted(cls, rule, dtype):
    """In every bit, with a schedule: torch's own loading would round the factors of a bfloat16 parameter."""
    options = {"adamw_lr": 0.003} if cls is LoRAPreMuon else {}

    def start():
        model = small_model(dtype)
        optimizer = build(model, cls, rule, **options)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)

    whole, whole_optimizer, whole_schedule = start()
    train(whole, whole_optimizer, range(10), whole_schedule)

    first, first_optimizer, first_schedule = start()
    train(first, first_optimizer, range(4), first_schedule)
    saved = through_file([first.state_dict(), first_optimizer.state_dict(), first_schedule.state_dict()])
    second, second_optimizer, second_schedule = start()
    for part, state in zip((second, second_optimizer, second_schedule), saved):
        part.load_state_dict(state)
    train(second, second_optimizer, range(4, 10), second_schedule)
    assert_same_run(whole, whole_optimizer, second, second_optimizer)


@both_optimizers
def test_resume_before_the_first_gradient(cls):
    """LoRA's A may be saved after a step of zero gradients: its state exists and has not started."""
    runs = []
    for resume in (False, True):
        param = nn.Parameter(torch.ones(20, 12))
        optimizer = cls([param], lr=LR, momentum_rank=2)
        param.grad = torch.zeros(20, 12)
        optimizer.step()
        assert optimizer.state[param]["step"].item() == 0
        if resume:
            saved = through_file(optimizer.state_dict())
            optimizer = cls([param], lr=LR, momentum_rank=2)
            optimizer.load_state_dict(saved)
        for seed in range(4):
            param.grad = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        runs.append(param)
    assert torch.equal(*runs)
    assert (runs[0] != 1).all()


@both_optimizers
def test_loads_by_keyword_and_before_any_step(cls):
    """torch.distributed.checkpoint calls load_state_dict(state_dict=…); the empty state of a new run is one too."""
    model = small_model()
    optimizer = build(model, cls)
    optimizer.load_state_dict(state_dict=build(small_model(), cls).state_dict())
    assert not optimizer.state
    train(model, optimizer, range(3))
    fresh = copy.deepcopy(model)
    other = build(fresh, cls)
    other.load_state_dict(state_dict=optimizer.state_dict())
    assert_same_run(model, optimizer, fresh, other)


@both_optimizers
def test_loads_more_than_once(cls):
    """torch adds an entry to `defaults` as it loads, and accelerate loads once while it prepares."""
    model = small_model()
    optimizer = build(model, cls)
    train(model, optimizer, range(3))
    saved = through_file(optimizer.state_dict())
    train(model, optimizer, range(3, 5))
    optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


@both_optimizers
def test_a_state_of_the_same_parameters_in_another_order_is_refused(cls):
    """torch matches states by their places, which for matrices of equal shapes would exchange them in silence."""

    def built(names):
        return cls([(name, nn.Parameter(torch.ones(12, 8))) for name in names], lr=LR, momentum_rank=2)

    saved = built(["a", "b", "c"]).state_dict()
    with pytest.raises(ValueError, match=r"in another order: 'b' is where this LoRAPre.* has 'c', .* by its place"):
        built(["a", "c", "b"]).load_state_dict(saved)
    built(["x", "y", "z"]).load_state_dict(saved)  # Wrappers rename parameters.


@both_optimizers
def test_loaded_state_is_a_copy(cls):
    """Training on must not write into the state_dict that was loaded: it may be loaded again."""
    model = small_model()
    optimizer = build(model, cls)
    train(model, optimizer, range(2))
    saved = through_file(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(2, 4))
    for index, state in kept["state"].items():
        assert all(torch.equal(saved["state"][index][name], value) for name, value in state.items())


@both_optimizers
def test_load_hooks_of_the_user(cls):
    """A pre-hook may replace what is loaded; a post-hook finds the state complete."""
    model = small_model(torch.bfloat16)
    optimizer = build(model, cls)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    twin = copy.deepcopy(model)
    other, calls = build(twin, cls), []

    def unwrap(_, state_dict):
        calls.append("pre")
        return state_dict["wrapped"]

    def look(loaded):
        assert_same_run(model, optimizer, twin, loaded)
        calls.append("post")

    handles = other.register_load_state_dict_pre_hook(unwrap), other.register_load_state_dict_post_hook(look)
    other.load_state_dict({"wrapped": saved})
    assert calls == ["pre", "post"]
    for handle in handles:
        handle.remove()
    other.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert not other._optimizer_load_state_dict_pre_hooks
    assert not other._optimizer_load_state_dict_post_hooks


@both_optimizers
@both_rules
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_train_on_alike(cls, rule, way):
    model = small_model()
    optimizer = build(model, cls, rule)
    train(model, optimizer, range(3))
    twin, other = way((model, optimizer))
    assert type(other) is cls
    assert other.skipped_updates == 0
    assert other.metrics() == {}
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same_run(model, optimizer, twin, other)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_same_run(model, optimizer, twin, other)


@pytest.fixture
def accelerator():
    """On the CPU, and without leaving that choice to the tests that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@both_optimizers
def test_state_stays_where_it_lies(cls):
    """A step writes into the state's own tensors, whatever else lies in their storage; other tools hold references to
    them.
    """
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(8, 40), (40, 8)] * 3]
    grads = [stream(param.shape, 3, seed=i) for i, param in enumerate(params)]
    optimizer = cls(params, lr=LR, momentum_rank=2)
    take_steps(optimizer, params, *([g[0]] for g in grads))
    held = [dict(optimizer.state[param]) for param in params]
    before = [{name: value.clone() for name, value in state.items()} for state in held]
    take_steps(optimizer, params, *(g[1:] for g in grads))
    for param, state, old in zip(params, held, before):
        assert all(optimizer.state[param][name] is value for name, value in state.items())
        assert not any(torch.equal(value, old[name]) for name, value in state.items())


def test_muon_loads_a_state_saved_at_lr_0(accelerator):
    """accelerate's prepare does, as soon as a scheduler with a warmup exists; adamw_lr keeps its ratio to lr."""
    model = small_model()
    optimizer = LoRAPreMuon(model.parameters(), lr=0.1, adamw_lr=0.01, momentum_rank=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    wrapped = accelerator.prepare(optimizer)
    scheduler.step()
    assert wrapped.optimizer._adamw_options(wrapped.optimizer.param_groups[0]).lr == pytest.approx(0.005)


@both_optimizers
def test_accelerate_round_trip(cls, accelerator):
    """What `Trainer` and `Accelerator` do: the wrapper loads an empty state as it prepares, the real one later."""

    def start():
        model = small_model()
        optimizer = build(model, cls)
        model, wrapped = accelerator.prepare(model, optimizer)
        return model, wrapped

    whole, whole_optimizer = start()
    train(whole, whole_optimizer, range(6))
    first, first_optimizer = start()
    train(first, first_optimizer, range(3))
    saved = through_file([first.state_dict(), first_optimizer.state_dict()])
    second, second_optimizer = start()
    second.load_state_dict(saved[0])
    second_optimizer.load_state_dict(saved[1])
    train(second, second_optimizer, range(3, 6))
    assert_same_run(whole, whole_optimizer.optimizer, second, second_optimizer.optimizer)


@both_optimizers
@both_rules
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_round_trip(cls, rule, flatten):
    """set_optimizer_state_dict fills a fresh optimizer by a step of zero gradients at lr 0, then loads by name."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = small_model()
    optimizer = build(model, cls, rule)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = copy.deepcopy(model)
    other = build(resumed, cls, rule)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    assert_same_run(model, optimizer, resumed, other)
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_same_run(model, optimizer, resumed, other)


@both_optimizers
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("cut", [(0, 0), (2, 0), (0, 1), (2, 1)], ids=str)
def test_distributed_checkpoint_into_other_places(cls, flatten, cut):
    """Parameters in another order and in other groups: torch matches them by name. An embedding is spared by its
    place. cut: the number of parameters in the first of two groups, before and after, or 0 for one group.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build(named, cut):
        groups = [{"params": part} for part in (named[:cut], named[cut:]) if part]
        with pytest.warns(UserWarning, match="momentum_rank"):
            return cls(groups, lr=LR)

    def step(model, optimizer, t):
        tokens = torch.randint(50, (8,), generator=torch.Generator().manual_seed(t))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    layers = {"embed_tokens": nn.Embedding(50, 16), "first": nn.Linear(16, 24), "second": nn.Linear(24, 16)}
    model = nn.Sequential(OrderedDict(layers))
    optimizer = build(list(model.named_parameters()), cut[0])
    step(model, optimizer, 0)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = copy.deepcopy(model)
    other = build(list(resumed.named_parameters())[::-1], cut[1])
    if cut[1] and not flatten:  # torch finds no saved group with the same first parameter.
        with pytest.raises(ValueError, match="a saved group has no options: the saved run divided its parameters"):
            set_optimizer_state_dict(resumed, other, saved, options=options)
        return
    set_optimizer_state_dict(resumed, other, saved, options=options)
    for which in (0, 1):
        step(model, optimizer, which + 1)
        step(resumed, other, which + 1)
    for (name, param), again in zip(model.named_parameters(), resumed.parameters()):
        assert ("exp_avg" in other.state[again]) == ("second.weight" != name != "first.weight")
        assert torch.equal(param, again)


@both_optimizers
def test_distributed_checkpoint_of_a_fresh_optimizer(cls):
    """The same step of zero gradients, on asking for the state of a run that has not begun: `als` does not start."""
    model, untouched = small_model(), small_model()
    optimizer = build(model, cls)
    get_optimizer_state_dict(model, optimizer)
    for param, before in zip(model.parameters(), untouched.parameters()):
        assert torch.equal(param, before)
        if param.ndim == 2:
            assert all(not value.any() for value in optimizer.state[param].values())
    assert optimizer.param_groups[0]["lr"] == LR
    control = build(untouched, cls)
    train(model, optimizer, range(1))
    train(untouched, control, range(1))
    for a, b in zip(model.parameters(), untouched.parameters()):
        if a.ndim == 2:
            assert torch.equal(a, b)
