"""Stacked experts: each is a matrix that is trained alone, and one without tokens is left alone."""

import copy
import warnings

import numpy as np
import oracle
import pytest
import torch
from backend_runs import eager_and_cpp
from roundoff import assert_same_steps, oracle_room
from stacking import LAYOUTS, group, stacked, unstacked
from stepping import LR, both_optimizers, both_rules, flat, newton_starts, products, stream, take_steps, weights
from torch import nn

import lorapre_peft.lowrank.moments
import lorapre_peft.optim.base
from lorapre_peft import LoRAPreAdamW, LoRAPreMuon

EXPERTS, SHAPE, RANK, STEPS = 4, (20, 12), 3, 12
# Experts without tokens, by step: one before its first gradient, one in between, one in every step.
IDLE = {0: (1, 3), 1: (1, 3), 5: (0, 3)} | dict.fromkeys((2, 3, 4, *range(6, STEPS)), (3,))
OPTIONS = {"weight_decay": 0.1, "momentum_rank": RANK}

every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def expert_weights(dtype=torch.float32):
    return [weights(*SHAPE, seed=e, dtype=dtype).detach() for e in range(EXPERTS)]


def expert_gradients(idle=IDLE):
    """By expert, a gradient for each step; zeros where it has no tokens."""
    streams = [stream(SHAPE, STEPS, seed=10 + e) for e in range(EXPERTS)]
    return [[g * (e not in idle.get(t, ())) for t, g in enumerate(grads)] for e, grads in enumerate(streams)]


@both_optimizers
def test_experts_of_two_parameters_all_have_starts_of_their_own(cls):
    """A second parameter's first expert must not have the position of the first parameter's second one."""
    params = [nn.Parameter(torch.ones(EXPERTS, *SHAPE)) for _ in range(2)]
    groups = [{"params": [param], "experts": EXPERTS} for param in params]
    starts = newton_starts(cls(groups, lr=LR, update_rule="newton", momentum_rank=RANK))
    rows = np.concatenate([factor.reshape(-1, SHAPE[1]) for start in starts for factor in start])
    assert len(np.unique(rows, axis=0)) == len(rows) == 2 * EXPERTS * RANK * len(starts[0])


def one_parameter(layout, matrices):
    return nn.Parameter(stacked(layout, [m.clone() for m in matrices]))


def steps_of(layout, grads):
    """The gradients of the whole parameter, step by step."""
    return [stacked(layout, list(of_step)) for of_step in zip(*grads)]


def of_expert(state, e):
    return {name: value[e] for name, value in state.items()}


@both_optimizers
@both_rules
@eager_and_cpp
@every_layout
def test_each_expert_is_a_matrix_trained_alone(cls, rule, backend, layout):
    """Against the float64 oracle of each expert, which takes the steps in which the expert has tokens."""
    start, grads = expert_weights(), expert_gradients()
    param = one_parameter(layout, start)
    optimizer = cls([group(layout, param, EXPERTS)], lr=LR, update_rule=rule, backend=backend, **OPTIONS)
    starts = newton_starts(optimizer)[0] if rule == "newton" else None
    take_steps(optimizer, [param], steps_of(layout, grads))
    for e, found in enumerate(unstacked(layout, param.detach(), EXPERTS)):
        own = [g for g in flat(grads[e]) if g.any()]
        theta, state = start[e].double().numpy(), of_expert(optimizer.state[param], e)
        assert state["step"] == len(own)
        if not own:
            assert torch.equal(found, start[e])
            continue
        begin = [None, None] if starts is None else [A[e] for A in starts]
        truth = (
            oracle.Adam(rule, RANK, starts=begin[:2])
            if cls is LoRAPreAdamW
            else oracle.Muon(rule, RANK, start=begin[0])
        )
        room, product_room = oracle_room(truth, theta, own, LR, 0.1)
        path = oracle.train(truth, theta, own, LR, 0.1)
        np.testing.assert_allclose(found, path[-1], rtol=0, atol=room[-1])
        np.testing.assert_allclose(products(state)[0], truth.m.product, rtol=0, atol=product_room)


@both_optimizers
@eager_and_cpp
@pytest.mark.parametrize("layout", ["3-D", "lora_A"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_separate_parameters(cls, backend, layout, dtype):
    """Where an expert's rows lie as those of a matrix of its own do, so are sums added in the same order.

    bfloat16 is rounded to nearest: stochastically, it depends on the parameter's position.
    """
    start, grads = expert_weights(dtype), expert_gradients(idle={})
    param, alone = one_parameter(layout, start), [nn.Parameter(m.clone()) for m in start]
    options = OPTIONS | {"backend": backend, "bf16_rounding": "nearest"}
    one = cls([group(layout, param, EXPERTS)], lr=LR, **options)
    many = cls(alone, lr=LR, **options)
    take_steps(one, [param], steps_of(layout, grads))
    take_steps(many, alone, *grads)
    for e, found in enumerate(unstacked(layout, param, EXPERTS)):
        assert torch.equal(found, alone[e])
        for name, value in many.state[alone[e]].items():
            assert torch.equal(one.state[param][name][e], value)


@both_optimizers
@both_rules
@eager_and_cpp
@every_layout
@pytest.mark.parametrize("masked", [False, True], ids=["read", "masked"])
def test_an_expert_without_tokens_loses_nothing(cls, rule, backend, layout, masked, monkeypatch):
    """Weight, factors and counters stay in every bit, before and after its first gradient; also where the host reads
    no norm.
    """
    if masked:
        for module in (lorapre_peft.optim.base, lorapre_peft.lowrank.moments):
            monkeypatch.setattr(module, "reads_are_free", lambda device: False)
    param = one_parameter(layout, expert_weights())
    optimizer = cls([group(layout, param, EXPERTS)], lr=LR, update_rule=rule, backend=backend, **OPTIONS)
    for step, grad in enumerate(steps_of(layout, expert_gradients())):
        before, state = param.detach().clone(), copy.deepcopy(optimizer.state.get(param))
        take_steps(optimizer, [param], [grad])
        for e, (new, old) in enumerate(
            zip(unstacked(layout, param, EXPERTS), unstacked(layout, before, EXPERTS), strict=True)
        ):
            idle = e in IDLE[step]
            assert torch.equal(new, old) == idle
            if idle and state:
                for name, value in of_expert(state, e).items():
                    assert torch.equal(optimizer.state[param][name][e], value), name
    assert optimizer.skipped_updates == 0
    before = [param.detach().clone(), *copy.deepcopy(list(optimizer.state[param].values()))]
    take_steps(optimizer, [param], [torch.zeros_like(param), None])
    assert all(map(torch.equal, [param, *optimizer.state[param].values()], before))


@both_optimizers
@eager_and_cpp
@every_layout
def test_one_expert_with_a_gradient_that_is_not_finite(cls, backend, layout):
    """It alone is skipped, and counted once."""
    start, grads = expert_weights(), expert_gradients(idle={})
    spoilt = [copy.deepcopy(of) for of in grads]
    spoilt[2][4][3, 3] = float("inf")
    without = [copy.deepcopy(of) for of in grads]
    without[2][4].zero_()
    found = []
    for given in (spoilt, without):
        param = one_parameter(layout, start)
        optimizer = cls([group(layout, param, EXPERTS)], lr=LR, backend=backend, **OPTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            take_steps(optimizer, [param], steps_of(layout, given))
        found.append([param.detach(), *optimizer.state[param].values()])
        assert optimizer.skipped_updates == (given is spoilt)
    assert all(map(torch.equal, *found))


@both_optimizers
@eager_and_cpp
def test_figures_are_those_of_the_experts_with_tokens(cls, backend):
    """The same as those of experts that were stepped as parameters of their own."""
    grads = expert_gradients()

    def figures(optimizer):
        return [torch.tensor(value) for _, value in sorted(optimizer.metrics().items())]

    def alone(prepare):
        params = [nn.Parameter(m.clone()) for m in expert_weights()]
        optimizer = prepare(cls(params, lr=LR, backend="eager", **OPTIONS))
        for t in range(STEPS):
            optimizer.record_metrics = t == STEPS - 1
            take_steps(optimizer, params, *([of[t] if of[t].any() else None] for of in grads))
        return figures(optimizer)

    param = one_parameter("3-D", expert_weights())
    optimizer = cls([group("3-D", param, EXPERTS)], lr=LR, backend=backend, **OPTIONS)
    take_steps(optimizer, [param], steps_of("3-D", grads)[:-1])
    optimizer.record_metrics = True
    take_steps(optimizer, [param], steps_of("3-D", grads)[-1:])
    assert_same_steps(figures(optimizer), alone)


@eager_and_cpp
def test_experts_have_random_bits_of_their_own(backend):
    """Stochastic rounding falls differently in equal experts with equal gradients."""
    param = one_parameter("3-D", [weights(*SHAPE, dtype=torch.bfloat16).detach()] * EXPERTS)
    one = [{"params": [param], "experts": EXPERTS, "experts_dim": 0, "bf16_rounding": "stochastic"}]
    optimizer = LoRAPreAdamW(one, lr=1e-4, momentum_rank=RANK, backend=backend)
    take_steps(optimizer, [param], [stacked("3-D", [stream(SHAPE, 1)[0]] * EXPERTS)])
    assert len({tuple(expert.flatten().tolist()) for expert in param}) == EXPERTS


def test_experts_have_starts_of_their_own():
    param = one_parameter("3-D", expert_weights())
    (starts,) = newton_starts(LoRAPreMuon([group("3-D", param, EXPERTS)], update_rule="newton", momentum_rank=RANK))
    assert len(np.unique(starts[0])) == starts[0].size


@both_optimizers
@every_layout
def test_state_shapes_and_bytes_are_the_real_ones(cls, layout):
    param = one_parameter(layout, expert_weights())
    optimizer = cls([group(layout, param, EXPERTS)], **OPTIONS)
    promised = optimizer.state_shapes(param, optimizer.param_groups[0])
    assert promised["m_B"] == (EXPERTS, SHAPE[0], RANK)
    assert promised["step"] == (EXPERTS,)
    take_steps(optimizer, [param], steps_of(layout, expert_gradients())[:1])
    state = optimizer.state[param]
    assert {name: tuple(value.shape) for name, value in state.items()} == promised
    held = sum(value.nbytes for value in state.values())
    assert optimizer.param_state_bytes(param, optimizer.param_groups[0]) == held


@both_optimizers
@both_rules
@every_layout
def test_a_resumed_run_is_the_uninterrupted_one(cls, rule, layout, tmp_path):
    def build(matrices):
        param = one_parameter(layout, matrices)
        return param, cls([group(layout, param, EXPERTS)], lr=LR, update_rule=rule, **OPTIONS)

    grads = steps_of(layout, expert_gradients())
    param, optimizer = build(expert_weights(torch.bfloat16))
    take_steps(optimizer, [param], grads[:4])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, resumed = build(unstacked(layout, param.detach(), EXPERTS))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    take_steps(optimizer, [param], grads[4:])
    take_steps(resumed, [again], grads[4:])
    assert torch.equal(param, again)
    assert all(map(torch.equal, optimizer.state[param].values(), resumed.state[again].values()))


@both_optimizers
def test_updates_in_the_backward_pass(cls):
    grads = steps_of("3-D", expert_gradients())
    params = [one_parameter("3-D", expert_weights()) for _ in range(2)]
    optimizers = [
        cls([group("3-D", p, EXPERTS)], lr=LR, update_in_backward=early, **OPTIONS)
        for p, early in zip(params, (True, False))
    ]
    for g in grads:
        for param, optimizer in zip(params, optimizers):
            (param * g).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(*params)


def test_a_stack_is_none_on_the_adamw_path():
    """Where k is too large for an expert, or 0, the parameter takes torch's AdamW as a whole."""
    param, twin = one_parameter("3-D", expert_weights()), one_parameter("3-D", expert_weights())
    ours = LoRAPreAdamW([group("3-D", param, EXPERTS)], lr=LR, momentum_rank=SHAPE[1])
    theirs = torch.optim.AdamW([twin], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    grads = steps_of("3-D", expert_gradients())
    take_steps(ours, [param], grads)
    take_steps(theirs, [twin], grads)
    assert torch.equal(param, twin)
    assert ours.state[param].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 6, 5), {"experts": 3}, r"shape \(4, 6, 5\) in a group of experts=3.*expected \[experts, p, q\]"),
        ((10, 6), {"experts": 4}, r"shape \(10, 6\) in a group of experts=4"),
        ((10, 6), {"experts": 4, "experts_dim": -1}, r"expected \[p, q · experts\]"),
        ((8, 6, 4), {"experts": 4, "experts_dim": -1}, r"expected \[p, q · experts\]"),
        ((8,), {"experts": 4}, "Put other parameters into a group of their own"),
        ((8, 6), {"experts": 0}, "experts=0, experts_dim=0: expected the number of experts"),
        ((8, 6), {"experts": True}, "experts=True"),
        ((8, 6), {"experts": 2, "experts_dim": 1}, "experts_dim=1"),
    ],
)
def test_what_is_no_stack_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        LoRAPreAdamW([{"params": [weights(*shape)], **options}])


def test_a_checkpoint_of_other_experts_is_refused():
    def build(experts):
        param = weights(24, 20)
        return param, LoRAPreAdamW([group("lora_A", param, experts)], momentum_rank=1)

    param, optimizer = build(4)
    take_steps(optimizer, [param], stream((24, 20), 1))
    _, other = build(3)
    with pytest.raises(ValueError, match=r"experts=4, experts_dim=0; this LoRAPreAdamW has .*experts=3"):
        other.load_state_dict(optimizer.state_dict())
