"""The graphs that torch.compile traces for the compiled backend. They are few, and no number is in one."""

import functools

import pytest
import torch
from backend_runs import assert_like_eager, parameters, run
from stepping import LR, both_optimizers, both_rules, stream, take_steps
from versions import skip_before

from lorapre_peft import LoRAPreAdamW
from lorapre_peft.kernels.eager import UNROLLED


@pytest.fixture
def graphs(monkeypatch, fresh_backends):
    """The graphs that torch.compile traces from now on; they are run uncompiled. A graph break would raise
    (fullgraph).
    """
    traced = []

    def keep(graph, _):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    torch._dynamo.reset()
    yield traced
    torch._dynamo.reset()


@skip_before("torch", "2.8", "compiles once more when betas first change")
@both_optimizers
@both_rules
def test_no_recompile_as_numbers_change(graphs, cls, rule):
    """A schedule of lr, weight decay and betas, the step count, the clipping: none of them is in a graph."""
    params = parameters((19, 17))
    own = {"second_momentum_rank": 5} if cls is LoRAPreAdamW and rule == "als" else {}
    optimizer = cls(params, lr=LR, momentum_rank=5, update_rule=rule, backend="compiled", **own)
    group, grads = optimizer.param_groups[0], [stream((19, 17), 8, seed=i) for i in range(2)]
    decay = "betas" if cls is LoRAPreAdamW else "momentum"
    changes = [{}, {}, {"lr": 0.5}, {"lr": torch.tensor(0.1)}, {"weight_decay": 0.3}, {"max_param_grad_norm": 1.0}]
    changes += [{decay: (0.5, 0.9) if decay == "betas" else 0.5}, {"update_scale": 0.1}]
    functions = 8 if cls is LoRAPreAdamW else 7  # of `moments` and `eager`; Adam's scalars are the eighth
    for t, change in enumerate(changes):
        group.update(change)
        take_steps(optimizer, params, *([g[t]] for g in grads))
        assert len(graphs) == functions


@pytest.mark.slow
def test_few_graphs_for_many_shapes(graphs):
    """A set for all shapes, numbers of matrices and ranks above `UNROLLED`, one for a matrix alone, one for each lower
    rank.
    """
    # Moments of one rank: of two, each has a set.
    for n, shape, k in (3, (33, 31), 7), (2, (19, 17), 5), (2, (48, 40), 17), (5, (20, 300), 5), (2, (10, 3, 3, 3), 5):
        options = dict(n=n, second_momentum_rank=k)
        assert_like_eager(run("compiled", shape, k, 2, **options), shape, k, 2, **options)
        assert len(graphs) == 8
    for n, k in (1, 5), (2, 1), (2, UNROLLED):
        before = len(graphs)
        run("compiled", (19, 17), k, n=n, second_momentum_rank=k)
        first = len(graphs)
        assert (
            before < first <= before + 8 + 3 * (k == 1)
        )  # at k = 1 the factors of a first step have strides of their own
        run("compiled", (48, 40), k, n=n, second_momentum_rank=k)
        assert len(graphs) == first
