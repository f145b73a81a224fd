"""The functions that rules share: from a node's id to its inputs and label."""

import sys
from pathlib import Path

SOURCE = Path(workflow.basedir) / "src"
sys.path.insert(0, str(SOURCE))

from espalier import stages
from espalier.hardware import Hardware
from espalier.job_requests import Requests
from espalier.store import Store

RESULTS = config["results"]
STORE = Store(RESULTS)
RUN = {}  # the settings of the run, in the main process; and what its jobs ask for


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
        RUN["runtime"] = experiment.run["runtime"]
        tell_jobs(SOURCE, save_run(experiment, STORE))
    return list(map(str, targets))


def parents(wildcards):
    """The artefacts that a node is made from."""
    paths = map(STORE.path, STORE.read_node(wildcards.id)["parents"])
    return list(dict.fromkeys(map(str, paths)))


def label(wildcards):
    return STORE.read_node(wildcards.id)["label"]


def experiment(wildcards):
    """What Snakemake's own report calls a table or a report."""
    return {"experiment": label(wildcards)}


def results_folder(wildcards):
    return RESULTS


def asks(resource):
    """The function that says how much of a resource a job asks for, from its node and the machine it will run on."""

    def ask(wildcards, threads, attempt):
        if "requests" not in RUN:
            runtime = RUN.get("runtime") or stages.runtime(STORE)["runtime"]
            RUN["requests"] = Requests(STORE, Hardware.load(config["hardware"]), runtime)
        return RUN["requests"].of(wildcards.id, threads, attempt)[resource]

    return ask
