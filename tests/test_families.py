"""What differs between families: names and keys, stacked experts, layers that predict ahead."""

import json
from collections import Counter
from itertools import product

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from espalier import families
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.collecting.collect import collect
from espalier.errors import UserError
from espalier.families import family_of
from espalier.models import runtime
from espalier.plans.operations import Keep, Merge, Skip
from espalier.plans.plan import Plan
from espalier.surgery.apply import apply
from espalier.surgery.prove import TOLERANCE, prove
from example_plans import GROUPS, KINDS, WEIGHTS, example_plan, examples, moe_layers
from plain_block import NAMES, tensors_of
from tiny import FAMILIES, ONE_EXPERT, VOCABULARY, save_tiny, tiny_config

pytestmark = pytest.mark.usefixtures("proof_here")

IDS = torch.arange(2 * 12).reshape(2, 12) * 7 % VOCABULARY
STACKED = ("gpt_oss", "granitemoe", "llama4_text")


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def plan_of(family_name, *operations):
    return Plan({"name": "example"}, dict.fromkeys(moe_layers(family_name), operations))


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_every_family_is_one_of_transformers_and_is_tested():
    assert sorted(FAMILIES) == families.names()
    for name in families.names():
        family = family_of({"model_type": name})
        config_class = getattr(transformers, family.architecture).config_class
        assert config_class.model_type == name == family.model_type
        held = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}
        aliases = {key for pair in (config_class.attribute_map or {}).items() for key in pair} & held
        assert aliases <= set(family.expert_keys)
        assert bool(family.experts) != bool(family.stacked)
        # Of two keys that disagree, the one that transformers takes: mostly the alias.
        both = tiny_config(name).to_dict() | {key: 10 + n for n, key in enumerate(family.expert_keys)}
        config = config_class(**{key: value for key, value in both.items() if key != "model_type"})
        if len(family.expert_keys) > 1 and aliases:
            assert family.expert_count(both) == getattr(config, family.expert_keys[-1])


@pytest.mark.parametrize("family_name", FAMILIES)
def test_moe_layers_are_those_of_the_model(family_name, tiny_model):
    source = tiny_model(family_name)
    config = Checkpoint(source).config
    blocks = runtime.moe_blocks(runtime.load(source), family_of(config))
    assert family_of(config).moe_layers(config) == list(blocks) == moe_layers(family_name)


def test_layers_by_other_settings():
    layers = {
        ("ernie4_5_moe", "moe_layer_end_index", -1): [1, 2],
        ("ernie4_5_moe", "moe_layer_end_index", 1): [1],
        ("ernie4_5_moe", "moe_layer_interval", 2): [1],
        ("deepseek_v3", "first_k_dense_replace", 2): [2],
        ("deepseek_v2", "first_k_dense_replace", 0): [0, 1, 2],
        ("jamba", "expert_layer_offset", 1): [1],
        ("qwen3_next", "decoder_sparse_step", 3): [2],
    }
    for (name, key, value), expected in layers.items():
        config = tiny_config(name, **{key: value})
        document = config.to_dict() | {key: value}
        model = AutoModelForCausalLM.from_config(config)
        assert list(runtime.moe_blocks(model, family_of(document))) == expected, (name, key)
        assert family_of(document).moe_layers(document) == expected, (name, key)
    for step, expected in {1: [0, 1, 2], 2: [1], 3: [2]}.items():  # a file may leave the list out
        config = tiny_config("llama4_text", moe_layers=None, interleave_moe_layer_step=step)
        model = AutoModelForCausalLM.from_config(config)
        for document in (config.to_dict(), config.to_dict() | {"moe_layers": None}):
            assert family_of(document).moe_layers(document) == expected
        assert list(runtime.moe_blocks(model, family_of(config.to_dict()))) == expected


@pytest.mark.parametrize("family_name", FAMILIES)
def test_every_key_that_holds_the_number_of_experts_is_rewritten(family_name, tmp_path):
    source = save_tiny(family_name, tmp_path / "source")
    keys = family_of({"model_type": family_name}).expert_keys
    edit_config(source, **dict.fromkeys(keys, 8))
    apply(source, example_plan(family_name, "keep"), tmp_path / "out", prove=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [written[key] for key in keys] == [4] * len(keys)
    model, loading = runtime.load_with_info(tmp_path / "out")
    assert not any(loading.values())
    block = runtime.moe_blocks(model, Checkpoint(source).family)[2]
    assert len(block.experts.down_proj) == 4
    assert not type(model).__name__.startswith("Espalier")


@pytest.mark.parametrize("family_name", FAMILIES)
def test_identity_plans_leave_the_logits_bit_equal(family_name, tmp_path, tiny_model):
    source = tiny_model(family_name)
    expected, before = logits(runtime.load(source)), tensors_of(source)
    singletons = tuple((e,) for e in range(8))
    for name, operation in {
        "keep": Keep(tuple(range(8))),
        **{router: Merge(singletons, ((1.0,),) * 8, router) for router in ("remap", "slice", "tie")},
    }.items():
        report = apply(source, plan_of(family_name, operation), tmp_path / name, prove=False)
        after = tensors_of(tmp_path / name)
        assert all(torch.equal(after.pop(key), tensor) for key, tensor in before.items())
        assert all(key.endswith("expert_map") for key in after)
        assert report["tensors"]["copied"] == len(before)
        found = logits(runtime.load(tmp_path / name))
        if (family_name, name) == ("gpt_oss", "remap"):  # its shipped code runs another kernel on a processor
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found, expected), name


@pytest.mark.parametrize(("family_name", "kind"), [*examples("remap_skip", "keep"), *product(ONE_EXPERT, ("remap",))])
def test_the_proof_holds_and_catches_a_wrong_router(family_name, kind, tmp_path, applied):
    source, out, plan = applied(family_name, kind)
    report = prove(source, out, plan)
    assert "error" not in report
    assert report["max_abs_diff"] <= TOLERANCE * report["max_abs_logit"]
    if kind == "keep":
        for path in out.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        block, _, router = NAMES[family_name]
        name = f"{block.format(2)}.{router[-1]}"
        tensors[name] = tensors[name].flip(-1 if len(tensors[name]) == 1 else 0).contiguous()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        assert "logits differ" in prove(source, tmp_path, plan)["error"]


@pytest.mark.parametrize("kind", ["keep", "remap_skip"])
@pytest.mark.parametrize("family_name", ["deepseek_v3", "ernie4_5_moe", "gpt_oss", "granitemoe", "minimax_m2"])
def test_bfloat16_keeps_each_tensors_dtype(family_name, kind, applied):
    source, out, plan = applied(family_name, kind, "bfloat16")
    before = {name: entry.dtype for name, entry in Checkpoint(source).entries.items()}
    after = {name: entry.dtype for name, entry in Checkpoint(out).entries.items()}
    assert "BF16" in after.values()
    assert all(after[name] == before[name] for name in after if not name.endswith("expert_map"))
    assert "error" not in prove(source, out, plan)
    assert logits(runtime.load(out)).isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_kernel_leaves_out_biased_experts(implementation, applied):
    model = runtime.load(applied("gpt_oss", "remap_skip")[1])
    expected = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family_name", ["deepseek_v3", "ernie4_5_moe", "gpt_oss", "granitemoe", "jamba", "minimax_m2"])
def test_shipped_models_survive_save_pretrained(family_name, tmp_path, applied):
    for kind in ("uneven_remap", "few"):
        model = runtime.load(applied(family_name, kind)[1])
        model.save_pretrained(tmp_path / kind)
        again, loading = runtime.load_with_info(tmp_path / kind)
        assert not any(loading.values())
        assert torch.equal(logits(again), logits(model))


# Stacked experts


def expected_stack(tensor, kind):
    """What KINDS[kind] makes of a tensor of 8 experts, in fp64 and rounded once."""
    if kind == "keep":
        return torch.stack([tensor[e] for e in KINDS["keep"][0].experts])
    merged = [
        sum(tensor[e].double() * w for e, w in zip(group, weights, strict=True)).to(tensor.dtype)
        for group, weights in zip(GROUPS, WEIGHTS, strict=True)
    ]
    if kind == "tie":
        merged = [next(m for m, group in zip(merged, GROUPS, strict=True) if e in group) for e in range(8)]
    return torch.stack(merged)


@pytest.mark.parametrize("kind", ["keep", "remap", "slice", "tie"])
@pytest.mark.parametrize("family_name", STACKED)
def test_stacked_experts_are_made_one_at_a_time(family_name, kind, tmp_path, tiny_model, monkeypatch):
    source = tiny_model(family_name, "bfloat16")
    reads = Counter()
    real = Checkpoint._read_bytes

    def watch(checkpoint, entry, raw):
        reads[entry.shape] += 1
        real(checkpoint, entry, raw)

    monkeypatch.setattr(Checkpoint, "_read_bytes", watch)
    report = apply(source, example_plan(family_name, kind), tmp_path / "out", prove=False)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    block, parts, router = NAMES[family_name]
    changed = 0
    for layer in moe_layers(family_name):
        for part in parts:
            name = f"{block.format(layer)}.{part}"
            assert torch.equal(after[name], expected_stack(before[name], kind))
            assert reads[(1, *before[name].shape[1:])] >= 4
            routers = 3 * (part == "experts.down_proj_bias")  # of the same shape
            assert reads[tuple(before[name].shape)] == routers
            changed += 1
    changed += len(router) * len(moe_layers(family_name)) * (kind in ("keep", "slice"))
    maps = sum(name.endswith("expert_map") for name in after)
    assert report["tensors"] == {
        "copied": len(before) - changed,
        "transformed": changed,
        "dropped": 0,
        "written": len(before) + maps,
    }
    assert maps == (len(moe_layers(family_name)) if kind == "remap" else 0)


def test_rows_reads_one_expert_and_names_what_is_not_finite(tmp_path):
    source = save_tiny("gpt_oss", tmp_path / "source", torch.bfloat16, max_shard_size="20KB")
    checkpoint = Checkpoint(source)
    name = "model.layers.1.mlp.experts.down_proj"
    for expert in (0, 5, 7):
        assert torch.equal(checkpoint.rows(name, expert), checkpoint.tensor(name)[expert : expert + 1])
    path = source / checkpoint.entries[name].file
    tensors = load_file(path)
    tensors[name][5, 2, 3] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    Checkpoint(source).rows(name, 4)
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.experts\.down_proj holds 1 NaN or infinite"):
        Checkpoint(source).rows(name, 5)
    with pytest.raises(UserError, match="holds 1 NaN or infinite"):
        apply(source, example_plan("gpt_oss", "remap"), tmp_path / "out")


@pytest.mark.parametrize("family_name", STACKED)
def test_a_stack_that_is_missing_or_of_another_size_is_named(family_name, tmp_path):
    source = save_tiny(family_name, tmp_path)
    tensors = load_file(source / "model.safetensors")
    block, parts, _ = NAMES[family_name]
    name = f"{block.format(0)}.{parts[0]}"
    save_file(tensors | {name: tensors[name][:7].clone()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="says 8 experts, but layer 0 holds 7 in its shards"):
        Checkpoint(source).shape()
    del tensors[name]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="says 8 experts, but layer 0 holds 0 in its shards"):
        Checkpoint(source).shape()


@pytest.mark.parametrize("family_name", ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral"])
def test_a_tensor_of_the_router_that_the_family_does_not_know_is_refused(family_name, tmp_path):
    source = save_tiny(family_name, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    block, _, router = NAMES[family_name]
    name = f"{block.format(2)}.{router[0].rpartition('.')[0]}.scale"
    save_file(tensors | {name: torch.ones(8)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor {name} is unknown to family {family_name}"):
        apply(source, example_plan(family_name, "keep"), tmp_path / "out")


# Llama 4, whose router scales the experts' input


def test_llama4_counts_one_expert_a_token(applied):
    for kind in ("keep", "remap", "few"):
        source, out, _ = applied("llama4_text", kind)
        model, family = runtime.load(out), Checkpoint(source).family
        with torch.inference_mode(), runtime.count_active(model, family) as counter:
            model(input_ids=IDS, attention_mask=torch.ones_like(IDS).index_fill(1, torch.tensor([11]), 0))
        assert counter.means() == {0: 1.0, 2: 1.0}
        assert counter.tokens == {0: 22, 2: 22}


def test_llama4_refuses_what_it_has_no_meaning_for(tmp_path, tiny_model, applied):
    with pytest.raises(UserError, match="layer 0: skip has nothing to leave out, the router picks top_k=1"):
        Plan({"name": "x"}, {0: (Skip(0.5, "tail"),)}).check(Checkpoint(tiny_model("llama4_text")).shape())
    with pytest.raises(UserError, match=r"num_experts_per_tok=2; of llama4_text Espalier knows models with 1"):
        Checkpoint(save_tiny("llama4_text", tmp_path, top_k=2)).shape()
    merged = Checkpoint(applied("llama4_text", "remap")[1])
    with pytest.raises(UserError, match=r"the router has 8 rows for 4 experts .* probe usage has no meaning"):
        collect(runtime.load(merged.directory), merged.shape(), merged.family, IDS, None, ["usage"])


def test_llama4_says_which_rows_of_a_merged_router_tokens_chose(applied):
    out = Checkpoint(applied("llama4_text", "remap")[1])
    model = runtime.load(out.directory)
    seen = {}
    hooks = [
        block.router.register_forward_hook(lambda _, args, output, layer=layer: seen.__setitem__(layer, output[1]))
        for layer, block in runtime.moe_blocks(model, out.family).items()
    ]
    ids = IDS.clamp(min=3)  # not the padding, for which all logits are 0
    stats = collect(model, out.shape(), out.family, ids, None, ["routing"])
    for hook in hooks:
        hook.remove()
    for layer, found in seen.items():
        arrays = stats.layer("routing", layer)
        assert arrays["experts"][:, 0].tolist() == found.argmax(-1).tolist()
        assert set(arrays["experts"][:, 0].tolist()) - set(range(4))
        torch.testing.assert_close(torch.tensor(arrays["weights"][:, 0]), found.amax(-1).sigmoid())


def test_llama4_can_be_observed_again_after_pruning(applied):
    """The second method of METHOD@THEN: its statistics are those of the pruned model."""
    out = Checkpoint(applied("llama4_text", "keep")[1])
    model = runtime.load(out.directory)
    stats = collect(model, out.shape(), out.family, IDS, None, ["usage", "mean_output"])
    for layer, block in runtime.moe_blocks(model, out.family).items():
        chosen = []
        handle = block.router.register_forward_hook(lambda _, args, output, chosen=chosen: chosen.append(output[0]))
        logits(model)
        handle.remove()
        counts = torch.bincount(chosen[0].argmax(-1), minlength=4)
        assert stats.layer("usage", layer)["counts"].tolist() == counts.tolist()
        assert stats.layer("mean_output", layer)["all_tokens"].shape == (4, 32)


def test_a_language_model_beside_other_parts_says_how_to_write_it_out(tmp_path):
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 8, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16}
    config = transformers.Llama4Config(
        text_config=tiny_config("llama4_text").to_dict(), vision_config=vision | {"projector_output_dim": 16}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Llama4ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "whole")
    message = (
        r"model_type='llama4' holds a language model \(llama4_text\) beside other parts, .*"
        r"transformers\.Llama4ForCausalLM\.from_pretrained\(SOURCE\)\.save_pretrained\(OUT\)\.$"
    )
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path / "whole").shape()
    transformers.Llama4ForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "text")
    assert Checkpoint(tmp_path / "text").shape().layers == (0, 2)
    assert torch.equal(logits(runtime.load(tmp_path / "text")), logits(model))


# Layers that predict ahead


def with_layer_ahead(source, prefix):
    """Add a multi-token-prediction layer with 8 experts, copied from layer 2, under another name; return its names."""
    tensors = load_file(source / "model.safetensors")
    ahead = {name.replace("model.layers.2.", prefix): t.clone() for name, t in tensors.items() if ".layers.2." in name}
    save_file(tensors | ahead, source / "model.safetensors", {"format": "pt"})
    return ahead


@pytest.mark.parametrize(
    ("family_name", "prefix"),
    [
        ("deepseek_v3", "model.layers.3."),
        ("glm4_moe", "model.layers.3."),
        ("qwen3_next", "mtp.layers.0."),
        ("ernie4_5_moe", "model.mtp_block.0."),
    ],
)
def test_layers_that_predict_ahead_stay_whole(family_name, prefix, tmp_path):
    source = save_tiny(family_name, tmp_path / "source")
    plain = Checkpoint(source).shape()
    expected = logits(runtime.load(source))
    ahead = with_layer_ahead(source, prefix)
    size = sum(tensor.numel() for tensor in ahead.values())
    shape = Checkpoint(source).shape()
    assert shape.layers == plain.layers
    assert shape.total_parameters == plain.total_parameters + size
    assert shape.idle_parameters == size
    assert shape.always_active_parameters == plain.always_active_parameters
    assert Checkpoint(source).always_active_parameters == plain.always_active_parameters
    assert torch.equal(logits(runtime.load(source)), expected)
    before = json.loads((source / "config.json").read_text())
    for kind in ("keep", "remap"):
        plan = example_plan(family_name, kind)
        apply(source, plan, tmp_path / kind, prove=False)
        after = tensors_of(tmp_path / kind)
        assert all(torch.equal(after[name], tensor) for name, tensor in ahead.items())
        written = json.loads((tmp_path / kind / "config.json").read_text())
        assert written.get("num_nextn_predict_layers") == before.get("num_nextn_predict_layers")
        assert "error" not in prove(source, tmp_path / kind, plan)  # what the source leaves out may be left out


def test_a_family_that_only_transformers_knows_says_what_to_add(tmp_path):
    config = AutoConfig.for_model("dots1", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"that Espalier does not know; known: .*Add src/espalier/families/dots1\.py"):
        family_of(config.to_dict())
