"""Experts read from the files against the plain block's tensors and loops, in every family."""

import pytest
import torch

from espalier.models.experts import ExpertWeights
from plain_block import PlainBlock, neurons_of
from tiny import FAMILIES


@pytest.mark.parametrize("family_name", FAMILIES)
def test_routers_neurons_and_what_experts_compute(family_name, tiny_model):
    directory, layer = tiny_model(family_name), 2
    experts, plain = ExpertWeights(directory), PlainBlock(directory, layer)
    torch.testing.assert_close(experts.router(layer).double(), plain.rows)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    block = experts.block(layer)
    assert block.number == len(plain.experts) == 8
    for e, tensors in enumerate(plain.experts):
        rows = [neurons_of(plain, part, tensor) for part, tensor in enumerate(tensors) if tensor.dim() == 2]
        rows = [row for row in rows if row is not None and row.dim() > 1]
        gate, up, down = rows if len(rows) == 3 else (rows[0][:, 0], rows[0][:, 1], rows[1])
        found = experts.neurons(layer, e)
        assert set(found) == {"gate", "up", "down"}
        for name, expected in (("gate", gate), ("up", up), ("down", down)):
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=0)
        inner = torch.stack([plain.inner(tensors, x) for x in hidden])
        torch.testing.assert_close(block.inner(e, hidden).double(), inner, rtol=1e-5, atol=1e-6)
        output = torch.stack([plain.run(tensors, x) for x in hidden])
        torch.testing.assert_close(block.output(e, hidden).double(), output, rtol=1e-5, atol=1e-5)


def test_a_block_asked_for_twice_is_read_once(tiny_model):
    experts = ExpertWeights(tiny_model("mixtral"))
    assert experts.block(1) is experts.block(1)
    assert experts.block(1) is not experts.block(2)
