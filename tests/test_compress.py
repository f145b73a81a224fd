"""One-shot compression: from a saved model and a token file to a checkpoint that a fresh process loads."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import espalier
from espalier.errors import UserError
from espalier.plans.plan import Plan
from tiny import save_tiny

LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for path in sys.argv[1:]:
    trust = "espalier" in json.load(open(path + "/config.json"))
    model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust, output_loading_info=True)
    AutoTokenizer.from_pretrained(path)
    logits = model(torch.arange(3, 20)[None]).logits
    found[path] = {
        "keys": [sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "finite": bool(torch.isfinite(logits).all()),
    }
assert "espalier" not in sys.modules
print(json.dumps(found))
"""

CASES = [
    ("mixtral", torch.float32, "reap"),
    ("mixtral", torch.bfloat16, "naee"),
    ("mixtral", torch.float32, "hc_smoe"),
    ("qwen2_moe", torch.bfloat16, "reap"),
    ("qwen2_moe", torch.float32, "naee"),
    ("qwen2_moe", torch.bfloat16, "hc_smoe"),
]
PROVEN = ("mixtral", "hc_smoe"), ("qwen2_moe", "naee")  # the others are loaded by a test
EVIDENCE = {"reap": "scores", "naee": "loss", "hc_smoe": "linkage"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of two families in two dtypes, and a token file."""
    base = tmp_path_factory.mktemp("models")
    for family in ("mixtral", "qwen2_moe"):
        for dtype in (torch.float32, torch.bfloat16):
            save_tiny(family, base / f"{family}-{dtype}", dtype)
    np.savez(base / "tokens.npz", input_ids=np.random.default_rng(0).integers(3, 95, (6, 24)))
    return base


@pytest.fixture(scope="module")
def made(folder):
    """Every case's report, by case."""
    reports = {}
    for family, dtype, method in CASES:
        out = folder / f"{family}-{method}"
        model, tokens, results = folder / f"{family}-{dtype}", folder / "tokens.npz", folder / "results"
        prove = (family, method) in PROVEN
        reports[family, method] = espalier.compress(model, method, tokens, out, ratio=0.5, prove=prove, results=results)
    return reports


@pytest.mark.parametrize(("family", "dtype", "method"), CASES)
def test_plan_says_what_was_done_and_why(made, folder, family, dtype, method):
    plan = Plan.load(folder / f"{family}-{method}" / "plan.json")
    layers = [0, 1, 2] if family == "mixtral" else [0, 2]
    assert sorted(plan.layers) == sorted(plan.evidence) == layers
    for layer in layers:
        (operation,) = plan.layers[layer]
        kept = operation.groups if method == "hc_smoe" else operation.experts
        assert len(kept) == 4
        assert EVIDENCE[method] in plan.evidence[layer]
    assert plan.method["name"] == method
    assert plan.method["ratio"] == 0.5
    assert plan.model["id"] == str(folder / f"{family}-{dtype}")
    assert plan.model["revision"].startswith("sha256:")
    report = made[family, method]
    assert report["counts"] == plan.counts
    removed = len(layers) * 4 * 3 * 32 * 24
    assert report["source_parameters"] - plan.counts["stored"] >= removed
    proof = report["apply"][0]["proof"]
    assert (family, method) not in PROVEN or proof["max_abs_diff"] <= proof["tolerance"] * proof["max_abs_logit"]


def test_a_fresh_process_without_espalier_loads_them(made, folder):
    paths = {str(folder / f"{family}-{method}"): (family, dtype, method) for family, dtype, method in CASES}
    command = [sys.executable, "-c", LOAD, *paths]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    for path, found in json.loads(run.stdout.splitlines()[-1]).items():
        family, dtype, method = paths[path]
        assert found["keys"] == [[], [], []]
        assert found["finite"]
        assert found["dtype"] == str(dtype).removeprefix("torch.")
        assert found["parameters"] == made[family, method]["counts"]["stored"]


def test_only_the_output_is_left(made, folder):
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.startswith(".") or name.endswith(".work")]
    assert "results" not in names  # nothing was downloaded, so nothing is kept there


def test_a_second_method_sees_what_the_first_left(folder):
    out = folder / "both"
    tokens, lines = folder / "tokens.npz", []
    report = espalier.compress(
        folder / "mixtral-torch.float32",
        "frequency",
        tokens,
        out,
        ratio=0.25,
        then="naee_skip",
        **{"then.beta": 0.5},
        keep_work=True,
        prove=False,
        results=folder / "results",
        progress=lambda what, done, total: lines.append((what, done, total)),
    )
    plan = Plan.load(out / "plan.json")
    for layer in range(3):
        keep, skip = plan.layers[layer]
        assert (keep.op, len(keep.experts), skip.op, skip.beta) == ("keep", 6, "skip", 0.5)
    assert [step["name"] for step in report["methods"]] == ["frequency", "naee_skip"]
    work = folder / "both.work"
    names = {path.name for path in work.iterdir()}
    assert {"tokens.safetensors", "0-frequency.stats.safetensors", "1-naee_skip.plan.json"} <= names
    from espalier.collecting.stats import Stats

    assert Stats.load(work / "1-naee_skip.stats.safetensors").shape.experts == 6
    assert ("frequency: collect", 6, 6) in lines


def test_a_method_without_probes_reads_no_tokens_into_the_model(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("espalier.models.runtime.load", refuse)
    report = espalier.compress(
        folder / "mixtral-torch.float32", "random", folder / "tokens.npz", folder / "r", ratio=0.5, seed=3, prove=False
    )
    assert report["counts"]["stored"] < report["source_parameters"]


def test_settings_reach_the_method_and_equal_input_gives_equal_bytes(folder):
    outs = []
    for n in range(2):
        out = folder / f"again{n}"
        settings = {"ratio": 0.5, "linkage": "ward", "router": "slice", "prove": False}
        espalier.compress(folder / "qwen2_moe-torch.float32", "hc_smoe", folder / "tokens.npz", out, **settings)
        outs.append(out)
    plan = Plan.load(outs[0] / "plan.json")
    assert plan.method["linkage"] == "ward"
    assert plan.layers[0][0].router == "slice"
    for name in ("plan.json", "model.safetensors"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_then_keys_need_a_second_method(folder):
    with pytest.raises(UserError, match=r"then.beta: no second method is named. Add --then NAME"):
        espalier.compress("x", "reap", "embedded", folder / "none", **{"then.beta": 0.5})
