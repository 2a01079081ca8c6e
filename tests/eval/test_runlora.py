"""RunLoRA's layer: PEFT's numbers in every order of products, and the order with the fewest operations."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eval.runlora import ORDERS, LoRAProduct, RunLoRALinear, cheapest

# torch counts addmm, but not the same products in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda y, a, b, **options: 2 * a[0] * a[1] * b[1]}


def make_layer(out_features=12, in_features=20, rank=3, bias=False, **options):
    """PEFT's layer in float64, with a B that is not zero."""
    torch.manual_seed(0)
    base = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64).requires_grad_(False)
    layer = Linear(base, "default", config=LoraConfig(**options), r=rank, lora_alpha=2 * rank)
    for module in (layer.lora_A, layer.lora_B):
        nn.init.normal_(module["default"].to(torch.float64).weight)
    return layer


def gradients(output, *inputs):
    return torch.autograd.grad(output, inputs, torch.ones_like(output).cumsum(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_numbers_of_pefts_layer(order):
    layer = make_layer()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    found = LoRAProduct.apply(x, layer.weight, A, B, layer.scaling["default"], order)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, x, A, B), gradients(expected, x, A, B))


@pytest.mark.parametrize("tokens", [3, 7, 60])
def test_operations_are_those_that_torch_counts(tokens):
    """And the layer takes the order with the fewest."""
    layer = make_layer()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(tokens, 20, dtype=torch.float64, requires_grad=True)

    def counted(forward):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            forward().sum().backward()
        return counter.get_total_flops()

    of_orders = {
        order: counted(lambda order=order: LoRAProduct.apply(x, layer.weight, A, B, 2.0, order)) for order in ORDERS
    }
    assert of_orders == {order: order.flops(tokens, 12, 20, 3) for order in ORDERS}
    assert counted(lambda: RunLoRALinear(layer)(x)) == min(of_orders.values())


def test_many_tokens_are_multiplied_by_the_merged_weight():
    """W + s B A costs r p q, which pays from p q / (p + q) tokens on: 2,048 for a square matrix of 4,096."""
    assert not cheapest(2047, 4096, 4096, 8).merge
    assert cheapest(2049, 4096, 4096, 8).merge


def test_shapes_of_batches_are_kept():
    layer = make_layer()
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    torch.testing.assert_close(RunLoRALinear(layer)(x), layer(x))


@pytest.mark.parametrize("options", [{"bias": True}, {"lora_bias": True}, {"lora_dropout": 0.1}, {"use_dora": True}])
def test_layers_of_another_kind_are_refused(options):
    with pytest.raises(ValueError, match="expected a layer without bias, under one plain adapter"):
        RunLoRALinear(make_layer(**options))
