"""The scripts of `examples/`, each for a few steps; that of Lightning where Lightning is installed."""

import importlib
import math

import pytest
import torch

UNIFORM = math.log(256)  # the loss of a model that knows nothing about the next byte


@pytest.mark.parametrize("name", ["adapter", "full_weights", "muon", "accelerate_loop"])
def test_example_lowers_the_loss(capsys, name):
    losses = importlib.import_module(f"examples.{name}").main(steps=8)
    assert losses[0] == pytest.approx(UNIFORM, abs=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert capsys.readouterr().out.splitlines()[-1].startswith("loss 5.5")


def test_lightning_module_trains():
    lightning = pytest.importorskip("lightning")
    module = importlib.import_module("examples.lightning_module").Adapter(steps=4)
    before = torch.nn.utils.parameters_to_vector(module.parameters())
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module)
    assert trainer.callback_metrics["loss"] < UNIFORM
    assert not torch.equal(torch.nn.utils.parameters_to_vector(module.parameters()), before)
