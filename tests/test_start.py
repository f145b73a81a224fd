"""What a job loads before its stage: no torch where none is needed, and never what composes or schedules."""

import subprocess
import sys

import numpy as np

from espalier import stages
from espalier.workflow import graph
from test_graph import project

SLOW = ("torch", "transformers", "scipy.optimize", "sklearn", "matplotlib", "hydra", "omegaconf", "snakemake", "wandb")
METHODS = ("random", "frequency", "reap", "ean", "soft_count", "naee", "hc_smoe", "m_smoe")
JOBS = """
import sys
from pathlib import Path
from espalier import cli, stages
from espalier.artefacts.store import Store
for id in sys.argv[2:]:
    stages.run(id, Store(Path(sys.argv[1])))
import espalier.tables.table
print([name for name in {slow} if name in sys.modules])
"""


def loaded(store, ids):
    """Run jobs in one process; return which of the slow modules are loaded in the end."""
    command = [sys.executable, "-c", JOBS.format(slow=SLOW), str(store.root), *ids]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_jobs_without_a_model_load_no_torch(tmp_path, tiny_model, monkeypatch):
    np.savez(tmp_path / "tokens.npz", input_ids=np.random.default_rng(0).integers(3, 95, (4, 16)))
    sweep = f"{{method: [{', '.join(METHODS)}], method.ratio: 0.25}}"
    store = project(tmp_path, monkeypatch, [sweep])
    overrides = [f"model.id={tiny_model('mixtral')}", f"calibration={tmp_path / 'tokens.npz'}"]
    experiment = graph.expand("mine", overrides, store)
    graph.save(experiment, store)
    by_stage = {stage: [] for stage in ("fetch", "tokens", "probe", "plan")}
    for node in experiment.nodes:
        if node.stage in by_stage:
            by_stage[node.stage].append(store.read_node(node.id)["made_by"] or node.id)
    assert loaded(store, by_stage["fetch"] + by_stage["tokens"]) == "[]"
    stages.run(by_stage["probe"][0], store)
    assert loaded(store, by_stage["plan"]) == "[]"
    assert len(list((store.root / "plans").glob("*.run.json"))) == len(METHODS)
