"""What each stage makes of a tiny model, held to values frozen for the stage's VERSION.

A failure means that a stage's output changed: raise VERSION[stage] in store.py if that was meant, since results
made before would otherwise be taken for new ones, then write the values again: `python tests/test_golden.py`.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from espalier.artefacts.store import VERSION

GOLDEN = Path(__file__).parent / "golden"
STAGES = ("tokens", "collect", "fit", "plan", "apply", "teacher", "tune", "score")
RATIO = {"ratio": 0.5}


def source(work, dtype="float32"):
    import torch

    from tiny import save_tiny

    directory = work / dtype
    return directory if directory.exists() else save_tiny("mixtral", directory, getattr(torch, dtype))


def statistics(work):
    import torch

    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.collecting.collect import collect
    from espalier.models import runtime
    from espalier.probes import PROBES

    directory = source(work)
    checkpoint = Checkpoint(directory)
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    model = runtime.load(directory, "float32")
    return collect(model, checkpoint.shape(), checkpoint.family, ids, None, list(PROBES)), checkpoint


def tokens(work):
    from espalier import conf
    from espalier.inputs import assets
    from espalier.inputs.tokens import make_tokens

    ids, mask, _ = make_tokens(conf.load("calibration", "embedded"), assets.model_directory())
    assert mask is None
    return {"shape": list(ids.shape), "sha256": hashlib.sha256(np.ascontiguousarray(ids, "<i4").tobytes()).hexdigest()}


def collected(work):
    stats, _ = statistics(work)
    return {
        f"{probe}.{layer}.{name}": [float(np.sum(array)), float(np.linalg.norm(array.astype(np.float64)))]
        for (probe, layer), named in sorted(stats.arrays.items())
        for name, array in sorted(named.items())
    }


def fitted(work, fitting):
    from espalier.models.running import Running
    from espalier.training.fit import fit

    fitting = replace(fitting, epochs=2, batch=3)
    running = Running.of(device="cpu", stream="never")
    return fit(source(work), fitting, words(), None, running, work / f"{fitting.name}.state")


def learnt(work):
    from espalier import conf
    from espalier.methods import build, fit_of

    found = {}
    for name in conf.names("method"):
        fitting = None if name == "none" else fit_of(build(conf.load("method", name)))
        if fitting is not None and name != "tomoe":
            stats, curve = fitted(work, fitting)
            sums = {f"{layer}.{key}": round(float(np.sum(array**2)), 3)
                    for (_, layer), named in stats.arrays.items() for key, array in named.items()}  # fmt: skip
            found[name] = sums | {"loss": [step.loss for step in curve]}
    return found


def plans(work):
    from espalier import conf
    from espalier.methods import build, fit_of, is_for_dense, make_plan
    from tiny import save_tiny

    stats, checkpoint = statistics(work)
    before = save_tiny("mixtral", work / "before", seed=1)  # what the model was tuned from, say
    found = {}
    for name in conf.names("method"):
        if name != "none":
            config = conf.load("method", name)
            method = build(config | (RATIO if "ratio" in config else {}))
            if name in ("threshold", "depth_rule", "tomoe"):  # which need a model that was split or routed, or learn
                continue
            if is_for_dense(method):
                found[name] = split_plan_of(method, work)
                continue
            base = before if "base" in config else None
            evidence = stats if fit_of(method) is None else fitted(work, fit_of(method))[0]
            plan = make_plan(method, evidence, checkpoint.shape(), source(work), base)
            found[name] = plan.document()["layers"]
    return json.loads(json.dumps(found))


def split_plan_of(method, work):
    """What a method for dense models makes of a tiny one: operations, and sums of the tensors that they name."""
    from dense_models import save_dense
    from espalier.checkpoints.checkpoint import Checkpoint
    from espalier.methods import make_plan

    directory = work / "dense"
    if not directory.exists():
        save_dense("llama", directory, intermediate_size=64)
    method = replace(method, **({"blocks": 4} if hasattr(method, "blocks") and method.blocks > 16 else {}))
    shape = Checkpoint(directory).dense_shape()
    plan = make_plan(method, dense_statistics(directory, method.probes), shape, directory)
    sums = {key: [float(np.sum(t.read())), round(float(np.sum(t.read() ** 2.0)), 3)] for key, t in plan.tensors.items()}
    return {"layers": plan.document()["layers"], "tensors": sums}


def dense_statistics(directory, probes):
    from espalier.collecting.collect import collect_checkpoint
    from espalier.models.running import Running

    running = Running.of(device="cpu", stream="never")
    return collect_checkpoint(directory, "float32", running, words(), None, probes)


def applied(work):
    from safetensors.numpy import load_file

    from espalier.plans.operations import Keep, Merge, Skip
    from espalier.plans.plan import Plan
    from espalier.surgery.apply import apply

    merge = Merge(((0, 3), (1,), (2, 4, 5), (6,), (7,)), ((0.25, 0.75), (1.0,), (0.5, 0.25, 0.25), (1.0,), (1.0,)))
    plans = {
        "keep": Plan({"name": "golden"}, {n: (Keep((0, 2, 3, 7)),) for n in range(3)}),
        "merge": Plan({"name": "golden"}, dict.fromkeys(range(3), (merge,))),
        "skip": Plan({"name": "golden"}, {n: (Skip(0.5),) for n in range(3)}),
    }
    found = {}
    for name, plan in plans.items():
        apply(source(work), plan, work / name, prove=False)
        tensors = load_file(work / name / "model.safetensors")
        total = hashlib.sha256()
        for key in sorted(tensors):
            total.update(key.encode() + np.round(tensors[key].astype(np.float64), 5).tobytes())
        found[name] = {"tensors": len(tensors), "sha256": total.hexdigest()}
    return found


def words():
    return np.random.default_rng(2).integers(3, 90, (6, 16)).astype(np.int32)


def taught(work):
    from espalier.models.running import Running
    from espalier.training.teacher import make_teacher

    tensors = make_teacher(source(work), words(), None, 8, "float32", Running.of(device="cpu", stream="never"))
    return {name: [list(t.shape), round(float(t.double().sum()), 2)] for name, t in tensors.items()}


def tuned(work):
    from espalier.models.running import Running
    from espalier.plans.operations import Keep
    from espalier.plans.plan import Plan
    from espalier.surgery.apply import apply
    from espalier.training.teacher import make_teacher, save_teacher
    from espalier.training.tune import Text, tune
    from espalier.training.tune_settings import Tuning

    running = Running.of(device="cpu", stream="never")
    kept = Plan({"name": "golden"}, {n: (Keep((0, 2, 3, 7)),) for n in range(3)})
    apply(source(work), kept, work / "kept", prove=False)
    save_teacher(work / "teacher", make_teacher(source(work), words(), None, 8, "float32", running), {})
    found = {}
    for objective in ("lm", "distill", "layerwise"):
        out, given = work / objective, {"original": source(work), "teacher": work / "teacher"}
        settings = Tuning(f"router_{objective}", objective, rate=0.01, tokens=96, batch=2, entropy=0.01)
        if objective == "lm":
            given.pop("teacher")
        tune(work / "kept", out, settings, Text(words()), running, work / f"{objective}.state", **given)
        found[objective] = [row["loss"] for row in json.loads((out / "tuning.json").read_text())["curve"]]
    return found


def scored(work):
    from transformers import AutoTokenizer

    from espalier.models import runtime
    from espalier.scoring.perplexity import Text, document_scores

    directory = source(work)
    texts = [(str(n), " ".join(f"w{3 + (7 * n + 5 * m) % 90}" for m in range(10 + 9 * n))) for n in range(6)]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = document_scores(runtime.load(directory, "float32"), tokenizer, Text(texts, 16))
    return {score.id: [score.nll, score.tokens, score.bytes] for score in found}


MAKE = {
    "tokens": tokens,
    "collect": collected,
    "fit": learnt,
    "plan": plans,
    "apply": applied,
    "teacher": taught,
    "tune": tuned,
    "score": scored,
}


def same(found, golden):
    """Equal, floats to 1e-5: another processor sums in another order."""
    if isinstance(golden, dict):
        return found.keys() == golden.keys() and all(same(found[key], golden[key]) for key in golden)
    if isinstance(golden, list):
        return len(found) == len(golden) and all(map(same, found, golden))
    return found == (pytest.approx(golden, rel=1e-5, abs=1e-6) if isinstance(golden, float) else golden)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_makes_what_its_version_made(stage, tmp_path):
    path = GOLDEN / f"{stage}-{VERSION[stage]}.json"
    assert path.exists(), f"VERSION[{stage!r}] is {VERSION[stage]}: run python tests/test_golden.py"
    golden, found = json.loads(path.read_text()), MAKE[stage](tmp_path)
    different = [key for key in golden if key not in found or not same(found[key], golden[key])]
    assert not different, f"{stage}: {different[:3]} changed, and VERSION[{stage!r}] did not"
    assert found.keys() == golden.keys()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for stage in sys.argv[1:] or STAGES:
            target = GOLDEN / f"{stage}-{VERSION[stage]}.json"
            target.write_text(json.dumps(MAKE[stage](Path(folder)), indent=1, sort_keys=True) + "\n")
