"""Bring what an experiment downloads to this machine before it runs: models, calibration texts, the tasks' data."""

from collections.abc import Callable
from pathlib import Path

from espalier.artefacts.store import Store
from espalier.inputs import hub, sources
from espalier.workflow.graph import expand


def prefetch(experiment: str, overrides: list[str], results: Path, say: Callable[[str], None]) -> None:
    """Download what is not here yet, and `say` a line for each thing; jobs then need no network.

    Models go to `results`/models, texts and tasks to the hub libraries' cache (HF_HOME), which compute nodes have to
    see too. UserError as for running the experiment, and where something cannot be had.
    """
    from espalier.scoring.score import fetch_data

    nodes = expand(experiment, overrides, Store(results, dry=True)).nodes
    for node in nodes:
        config = node.config
        if node.stage == "fetch":
            say(f"model {config['id']}: {sources.resolve(config['id'], config['revision'], results)}")
        elif node.stage == "tokens" and config["source"] == "hub":
            say(f"text {config['id']}: {hub.data_file(config['id'], config['revision'], config['file'])}")
    for task in dict.fromkeys(str(node.config["task"]) for node in nodes if node.stage == "task"):
        fetch_data(task)
        say(f"task {task}")
