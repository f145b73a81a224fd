"""The functions that rules share: from a node's id to its inputs and label."""

import os
import sys
from pathlib import Path

SOURCE = Path(workflow.basedir) / "src"
sys.path.insert(0, str(SOURCE))

from espalier.store import Store

RESULTS = config["results"]
STORE = Store(RESULTS)

# Jobs run the Python that runs Snakemake; they inherit this, on this machine and through sbatch --export=ALL.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE.resolve()), os.environ.get("PYTHONPATH")]))


wildcard_constraints:
    id="[0-9a-f]{12}",


def reports(wildcards):
    """The report of each experiment. Only the main process composes; jobs read the nodes that it wrote."""
    from espalier.graph import expand, save, save_run

    if not workflow.is_main_process:
        raise RuntimeError("a job asked for the whole experiment; jobs read their node only")
    STORE.dry = workflow.dryrun
    targets = []
    for name in config["experiments"]:
        experiment = expand(name, config["overrides"], STORE)
        targets.append(STORE.path(save(experiment, STORE)))
        os.environ["ESPALIER_RUNTIME"] = save_run(experiment, STORE)
    return list(map(str, targets))


def parents(wildcards):
    """The artefacts that a node is made from."""
    paths = map(STORE.path, STORE.read_node(wildcards.id)["parents"])
    return list(dict.fromkeys(map(str, paths)))


def label(wildcards):
    return STORE.read_node(wildcards.id)["label"]
