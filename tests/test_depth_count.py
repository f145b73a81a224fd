"""What a token uses of a model whose layers it may skip, counted apart from the runtime that runs it."""

from dataclasses import replace

import pytest
import torch

from dense_models import KINDS as SPLITS
from dense_models import save_dense, split_plan
from depth_plans import depth_plan
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.models import runtime
from espalier.models.active import count_parameters
from espalier.plans.operations import Keep
from espalier.surgery.apply import apply
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

IDS = torch.arange(3 * 10).reshape(3, 10) * 7 % VOCABULARY
MASK = torch.ones_like(IDS)
MASK[1, :4] = MASK[2, 9:] = 0


def counted(directory):
    """What count_parameters says, and the depth routers' choices [B, L] by layer."""
    model, checkpoint = runtime.load(directory, "float32", "cpu"), Checkpoint(directory)
    with torch.no_grad(), count_parameters(model, checkpoint) as active:
        model(input_ids=IDS, attention_mask=MASK)
    kept = {}
    for layer, part in enumerate(model.model.layers):
        for module in part.modules():
            if hasattr(module, "depth_router"):
                kept[layer] = module.depth_router.kept[MASK.bool()]
    return active, kept, model


def size(model, layer, part=None):
    module = model.model.layers[layer] if part is None else getattr(model.model.layers[layer], part)
    return sum(p.numel() for name, p in module.named_parameters() if "depth_router" not in name)


@pytest.mark.parametrize(
    "kind", ["threshold", "threshold_attention", "threshold_ffn", "all_keys", "random", "nothing_kept"]
)
def test_of_a_dense_model(kind, tmp_path):
    source = save_dense("llama", tmp_path / "source")
    apply(source, depth_plan(kind, Checkpoint(source).any_shape()), tmp_path / "out", prove=False)
    active, kept, model = counted(tmp_path / "out")
    part = {"threshold_attention": "self_attn", "threshold_ffn": "mlp", "all_keys": "mlp"}.get(kind)
    whole = sum(p.numel() for p in model.parameters())
    each = [whole - sum(size(model, layer, part) * (not own[t]) for layer, own in kept.items())
            for t in range(int(MASK.sum()))]  # fmt: skip
    assert active["parameters"] == pytest.approx(sum(each) / len(each))
    assert active["depth"] == {str(layer): pytest.approx(float(own.float().mean())) for layer, own in kept.items()}
    runs = [48 * (1 if part == "self_attn" else float(own.float().mean())) for own in kept.values()]
    assert active["neurons"] == pytest.approx(sum(runs))


@pytest.mark.parametrize("kind", ["drop", "drop_attention", "drop_ffn"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_of_a_model_without_a_part(family, kind, tiny_model, tmp_path):
    source = save_dense("llama", tmp_path / "source") if family == "llama" else tiny_model(family)
    apply(source, depth_plan(kind, Checkpoint(source).any_shape()), tmp_path / "out", prove=False)
    active, _, model = counted(tmp_path / "out")
    expected = sum(p.numel() for p in model.parameters())
    if family == "mixtral":
        left = list(active["experts_per_token"])
        one = Checkpoint(source).shape().expert_parameters
        expected += sum((active["experts_per_token"][layer] - 8) * one for layer in left)
    assert active["parameters"] == pytest.approx(expected)
    assert len(left) == 3 - (kind != "drop_attention") if family == "mixtral" else True


@pytest.mark.parametrize("kind", ["threshold", "threshold_ffn", "threshold_attention"])
def test_with_fewer_experts(kind, tiny_model, tmp_path):
    source = tiny_model("mixtral")
    shape = Checkpoint(source).shape()
    plan = depth_plan(kind, shape, layers=[0, 2])
    kept_experts = (0, 2, 3, 6)
    layers = {layer: (Keep(kept_experts), *plan.layers.get(layer, ())) for layer in shape.layers}
    apply(source, replace(plan, layers=layers), tmp_path / "out", prove=True)
    active, kept, model = counted(tmp_path / "out")
    one = shape.expert_parameters
    total = sum(p.numel() for p in model.parameters()) - 3 * 4 * one
    part = {"threshold_attention": "self_attn", "threshold_ffn": "mlp"}.get(kind)
    for layer in range(3):
        share = float(kept[layer].float().mean()) if layer in kept else 1.0
        runs = 1.0 if kind == "threshold_attention" else share
        assert active["experts_per_token"][str(layer)] == pytest.approx(2 * runs)
        total += 2 * runs * one
        idle = size(model, layer, part) - (0 if part == "self_attn" else 4 * one)
        total -= (1 - share) * idle
    assert active["parameters"] == pytest.approx(total)


def test_with_split_ffns(tmp_path):
    source = save_dense("llama", tmp_path / "source")
    shape = Checkpoint(source).dense_shape()
    split, depth = split_plan(SPLITS["dsmoe"]), depth_plan("threshold", shape, layers=[1])
    layers = {layer: (*split.layers[layer], *depth.layers.get(layer, ())) for layer in shape.layers}
    whole = replace(split, layers=layers, tensors=dict(split.tensors) | dict(depth.tensors))
    apply(source, whole, tmp_path / "out", prove=True)
    active, kept, model = counted(tmp_path / "out")
    share = float(kept[1].float().mean())
    assert 0 < share < 1
    own = size(model, 1, "mlp") - 48 * 3 * 32
    idle = (48 - active["neurons_per_token"]["0"]) * 96 + (48 - active["neurons_per_token"]["1"]) * 96
    rest = size(model, 1) - size(model, 1, "mlp") + own
    expected = sum(p.numel() for p in model.parameters()) - idle - (1 - share) * rest
    assert active["parameters"] == pytest.approx(expected)
    assert active["neurons_per_token"]["1"] < 48 * share
