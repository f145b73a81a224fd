"""Proofs where rounding decides: a token that amplifies it is left out, a wrong tensor is found all the same."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dense_models import WIDTH, save_dense, split_plan
from espalier.models import runtime
from espalier.plans.split import Split
from espalier.surgery import prove as proofs
from espalier.surgery.apply import apply
from espalier.surgery.prove import LENGTH, ROWS, TOLERANCE, prove
from tiny import VOCABULARY

pytestmark = pytest.mark.usefixtures("proof_here")

IDS = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))  # those of a proof
LAST = IDS[1, -1].item()
LEFT = 1e-4  # what the first layer leaves of that token's embedding


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory):
    """Return a model whose first FFN takes nearly all of a token's embedding away, and a plan that sorts neurons."""
    directory = save_dense("llama", tmp_path_factory.mktemp("sensitive"))
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[LAST] *= 100 / embedding[LAST].square().mean().sqrt()
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    mlp = runtime.load(directory).model.layers[0].mlp
    norm = tensors["model.layers.0.post_attention_layernorm.weight"]
    with torch.no_grad():
        x = embedding[LAST] / embedding[LAST].square().mean().sqrt() * norm
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        missing = -embedding[LAST] * (1 - LEFT) - mlp.down_proj(inner)
    tensors["model.layers.0.mlp.down_proj.weight"] += torch.outer(missing, inner) / inner.square().sum()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory, split_plan(Split((WIDTH,), neurons="{layer}.neurons"))


@pytest.mark.parametrize("streamed", [False, True])
def test_tokens_that_rounding_moves_are_left_out(sensitive, streamed, tmp_path):
    source, plan = sensitive
    apply(source, plan, tmp_path / "out", prove=False)
    with torch.no_grad():
        found, expected = (runtime.load(path)(input_ids=IDS).logits for path in (tmp_path / "out", source))
    apart = (found - expected).abs().amax(dim=2) > TOLERANCE * expected.abs().max()
    assert apart[IDS == LAST].all()
    report = prove(source, tmp_path / "out", plan, streamed)
    assert "error" not in report
    assert ROWS * LENGTH // 2 < report["tokens"] <= ROWS * LENGTH - apart.sum()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("rounding", [proofs.ROUNDING, 1.0])
def test_wrong_tensor_is_found_all_the_same(sensitive, rounding, streamed, tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "ROUNDING", rounding)  # 1.0: as if it moved every token, when none may be left out
    source, plan = sensitive
    apply(source, plan, tmp_path / "out", prove=False)
    wrong = shutil.copytree(tmp_path / "out", tmp_path / "wrong") / "model.safetensors"
    tensors = load_file(wrong)
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= 1.5
    save_file(tensors, wrong, {"format": "pt"})
    assert "logits differ" in prove(source, wrong.parent, plan, streamed)["error"]
