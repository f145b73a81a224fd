"""The functions that rules share: from a node's id to its inputs and label."""

import sys
from pathlib import Path

SOURCE = Path(workflow.basedir) / "src"
sys.path.insert(0, str(SOURCE))

from espalier import stages
from espalier.artefacts import temporary
from espalier.artefacts.store import Store
from espalier.machine.hardware import Hardware
from espalier.workflow.job_requests import Requests

RESULTS = str(config["results"])  # a folder called 2026 is a number by now
STORE = Store(RESULTS)
RUN = {}  # the settings of the run, in the main process; and what its jobs ask for


wildcard_constraints:
    id="[0-9a-f]{12}",


def reports(wildcards):
    """The report of each experiment. Only the main process composes; jobs read the nodes that it wrote."""
    from dataclasses import replace

    from espalier.workflow.graph import expand, save, save_run
    from espalier.workflow.launch import tell_jobs

    if not workflow.is_main_process:
        raise RuntimeError("a job asked for the whole experiment; jobs read their node only")
    STORE.dry = workflow.dryrun
    experiments = [expand(name, config["overrides"], STORE) for name in config["experiments"]]
    targets = [STORE.path(save(experiment, STORE)) for experiment in experiments]
    last = experiments[-1]
    RUN["settings"] = dict(last.run)
    if "temporary" in last.run:  # what one experiment only scores, another may read
        RUN["settings"]["temporary"] = temporary.only_scored({n.id: n for e in experiments for n in e.nodes}.values())
    tell_jobs(SOURCE, save_run(replace(last, run=RUN["settings"]), STORE))
    return list(map(str, targets))


def settings():
    """The settings of the run, which jobs read from the file that the main process wrote."""
    if "settings" not in RUN:
        RUN["settings"] = stages.runtime(STORE)
    return RUN["settings"]


def parents(wildcards):
    """The artefacts that a node is made from.

    Of one that is there, those that are there too, and no matter how old they are: its id says what it is, so that
    nothing that becomes of them can make it another.
    """
    node = STORE.read_node(wildcards.id)
    paths = temporary.inputs(node, STORE, settings().get("temporary", ()))
    if STORE.path(node).exists():
        return [ancient(str(path)) for path in paths if path.exists()]
    return list(map(str, paths))


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
        return requests().of(wildcards.id, threads, attempt)[resource]

    return ask


def requests():
    if "requests" not in RUN:
        run = settings()
        temporaries, packs = frozenset(run.get("temporary", ())), workflow.group_settings.group_components
        machine, memory = Hardware.load(config["hardware"]), float(config["memory"])
        RUN["requests"] = Requests(STORE, machine, run["runtime"], temporaries, packs, memory)
    return RUN["requests"]


def pack(wildcards):
    """The pack of small jobs that a job goes into, if the profile has one (`group-components`)."""
    return requests().pack(wildcards.id)
