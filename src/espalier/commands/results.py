"""Commands that look at results, carry them elsewhere or remove them, and look at the machine."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from espalier.commands.app import LOOK, NodeId, Overrides, Results, app

if TYPE_CHECKING:
    from espalier.artefacts.store import Store
    from espalier.workflow.graph import Experiment

LISTED = 50  # pieces of garbage


@app.command(rich_help_panel=LOOK)
def show(node: NodeId, results: Results = Path("results")) -> None:
    """Print what a node is, what it was made from and how."""
    from espalier.artefacts import lineage
    from espalier.artefacts.store import Store

    print(lineage.show(Store(results), node))


@app.command(rich_help_panel=LOOK)
def peek(
    experiment: Annotated[str, typer.Argument(help="A name of conf/experiment.")],
    overrides: Overrides = None,
    results: Results = Path("results"),
) -> None:
    """Make the table of the rows that are scored, now and here, while a run is at work or without one."""
    from espalier import stages
    from espalier.artefacts.store import Store
    from espalier.workflow import finished, graph

    store, found = _expanded(experiment, overrides, results)
    node, waiting = finished.so_far(found, store)
    kept = Store(results)
    os.environ["ESPALIER_RUNTIME"] = graph.save_run(found, kept)
    graph.save(found, kept)
    kept.write_node(node)
    path = stages.run(node.id, kept)
    if node.id == finished.table_of(found).id:
        stages.link_table(kept.read_node(node.id), kept)
    print(f"{path.with_suffix('.md').read_text()}\n{path.with_suffix('.md')}")
    if waiting:
        print(f"{len(waiting)} rows are not scored and left out: {finished.names(waiting)}")


@app.command("export", rich_help_panel=LOOK)
def export_(
    experiment: Annotated[str, typer.Argument(help="A name of conf/experiment.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write, .tar.xz.")] = Path("results.tar.xz"),
    results: Results = Path("results"),
) -> None:
    """Put what an experiment's table is made from into one small file: no models, no checkpoints, no statistics."""
    from espalier.workflow import archive, finished

    store, found = _expanded(experiment, overrides, results)
    done = archive.export(found, store, out)
    total = len(done.rows) + len(done.waiting)
    print(f"{out}: {len(done.rows)} of {total} rows, {done.files} files, {out.stat().st_size / 1e6:.2f} MB")
    if done.waiting:
        print(f"not scored and left out: {finished.names(done.waiting)}")


@app.command("import", rich_help_panel=LOOK)
def import_(
    archive: Annotated[Path, typer.Argument(help="A file that `espalier export` wrote.")],
    results: Results = Path("results"),
) -> None:
    """Put exported results into a results folder, beside what is there: a run makes what is still missing."""
    from espalier.artefacts.store import Store
    from espalier.workflow import archive as archives

    done = archives.restore(archive, Store(results))
    print(f"{results}: {done.new} new files, {done.known} were there. Next: espalier run {done.experiment}, or peek")


def _expanded(experiment: str, overrides: list[str] | None, results: Path) -> tuple["Store", "Experiment"]:
    """Return an experiment's nodes and a store that knows them, which leaves the results folder as it is."""
    from espalier.artefacts.store import Store
    from espalier.workflow import graph

    store = Store(results, dry=True)
    found = graph.expand(experiment, overrides or [], store)
    graph.save(found, store)
    return store, found


@app.command(rich_help_panel=LOOK)
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="EXPERIMENT:ROW, EXPERIMENT, an id, or a path in results/.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    results: Results = Path("results"),
    other: Annotated[Path | None, typer.Option("--other", help="The folder of results of B. [default: A's]")] = None,
) -> None:
    """Say why two results differ: which keys of the configuration, at which stage, which code and machine.

    espalier diff 'demo:naee 50 %' 'demo:reap 50 %'
    """
    from espalier.artefacts import difference, difference_text
    from espalier.artefacts.store import Store

    store = Store(results)
    theirs = store if other is None else Store(other)
    found = difference.compare(difference.resolve(store, a), difference.resolve(theirs, b))
    difference_text.render(found)


@app.command(rich_help_panel=LOOK)
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Delete them, not only list them.")] = False,
    forget: Annotated[
        list[str] | None, typer.Option("--forget", metavar="EXPERIMENT", help="Its tables are needed no more.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every file, not only the largest.")] = False,
    results: Results = Path("results"),
) -> None:
    """List artefacts that no experiment's newest table and no name in results/refs needs."""
    from espalier import conf
    from espalier.artefacts.store import Store
    from espalier.workflow import garbage

    store = Store(results)
    found = garbage.delete(store, forget or []) if delete else garbage.find(store, forget or [])
    found = sorted(found, key=lambda item: -item.size)
    shown = found if every else found[:LISTED]
    for item in shown:
        print(f"{item.size / 1e6:10.2f} MB  {item.path}  {item.what}: {item.why}")
    if len(found) > len(shown):
        rest = sum(item.size for item in found[len(shown) :])
        print(f"{rest / 1e6:10.2f} MB  {len(found) - len(shown)} smaller ones; --all lists them")
    what = "deleted" if delete else "not needed" + ("; --delete removes them" if found else "")
    print(f"{sum(item.size for item in found) / 1e6:10.2f} MB in {len(found)} files and folders {what}")
    for name, size in garbage.kept_for(store, forget or []).items():
        gone = "" if name in conf.names("experiment") else f", which conf/experiment has no more: --forget {name}"
        print(f"{size / 1e6:10.2f} MB kept for {name}{gone}")


@app.command(rich_help_panel=LOOK)
def doctor(results: Results = Path("results")) -> None:
    """Look at this machine and say what will work. Asks no other machine."""
    from espalier import doctor as machine

    findings = machine.examine(results)
    machine.render(findings, machine.verdict(findings))


@app.command(rich_help_panel=LOOK)
def pin(
    name: Annotated[str, typer.Argument(help="A name of conf/model or conf/calibration.")],
    update: Annotated[bool, typer.Option("--update", help="Replace a commit that is there already.")] = False,
) -> None:
    """Ask the hub for a model's or data set's current commit and write it into its YAML."""
    from espalier.inputs import sources

    path, before, now = sources.pin(name, update)
    if before == now:
        print(f"{path}: revision is {now} already; --update asks the hub again")
    else:
        print(f"{path}: revision {before or 'null'} -> {now}")
