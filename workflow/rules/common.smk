"""The functions that rules share: from a node's id to its inputs and label."""

import sys
from pathlib import Path

SOURCE = Path(workflow.basedir) / "src"
sys.path.insert(0, str(SOURCE))

from espalier.store import Store

RESULTS = config["results"]
STORE = Store(RESULTS)


wildcard_constraints:
    id="[0-9a-f]{12}",


def reports(wildcards):
    """The report of each experiment. Only the main process composes; jobs read the nodes that it wrote."""
    from espalier.graph import expand, save, save_run
    from espalier.launch import tell_jobs

    if not workflow.is_main_process:
        raise RuntimeError("a job asked for the whole experiment; jobs read their node only")
    STORE.dry = workflow.dryrun
    targets = []
    for name in config["experiments"]:
        experiment = expand(name, config["overrides"], STORE)
        targets.append(STORE.path(save(experiment, STORE)))
        tell_jobs(SOURCE, save_run(experiment, STORE))
    return list(map(str, targets))


def parents(wildcards):
    """The artefacts that a node is made from."""
    paths = map(STORE.path, STORE.read_node(wildcards.id)["parents"])
    return list(dict.fromkeys(map(str, paths)))


def label(wildcards):
    return STORE.read_node(wildcards.id)["label"]


def results_folder(wildcards):
    return RESULTS
