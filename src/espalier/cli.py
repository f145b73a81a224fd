"""The command line: one subcommand a stage, one for the whole pipeline, one that needs none."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from espalier.errors import InterruptedWork, UserError

# Modules are imported where they are used: `espalier --help` and `espalier plan` start without torch.
app = typer.Typer(
    name="espalier",
    help="Make large language models sparse, and measure what each step cost and saved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PIPELINE, LOOK, STAGE = "The pipeline", "Results and machine", "One stage (what the pipeline's rules call)"

LISTED = 50  # pieces of garbage

Results = Annotated[Path, typer.Option("--results", help="The folder of results.")]
NodeId = Annotated[str, typer.Argument(metavar="NODE", help="Id of a node, or its first digits.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides, such as model=mixtral_8x7b.")
]


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 2 and one line for a user's mistake, 130 for an interrupt.

    128 plus the signal's number, and one line, where a stage saved its state before it ended.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; a log gets lines
    try:
        app(arguments, prog_name="espalier")
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}no space left on the disk. Free some space or write elsewhere, then run again.")
    except InterruptedWork as stopped:
        print(f"espalier: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print("espalier: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        from espalier import __version__

        print(f"espalier {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Make large language models sparse, and measure what each step cost and saved."""


@app.command(rich_help_panel=PIPELINE)
def compress(
    model: Annotated[str, typer.Argument(help="A name of conf/model, a directory, or org/name@COMMIT.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of conf/method/NAME.yaml; then.KEY of the second method."),
    ] = None,
    *,
    method: Annotated[str, typer.Option("--method", "-m", help="A name of conf/method.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write; must not exist.")],
    calibration: Annotated[
        str, typer.Option("--calibration", "-c", help="A name of conf/calibration, or a file.")
    ] = "embedded",
    then: Annotated[str | None, typer.Option("--then", help="A second method on top, such as naee_skip.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the calibration pass. [default: the model's]")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Calibration sequences a forward pass.")] = 8,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. [default: a GPU if there is one]")
    ] = None,
    stream: Annotated[
        str, typer.Option("--stream", help="Run the model layer by layer: auto (if it does not fit), always, never.")
    ] = "auto",
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep tokens, statistics and plans in OUT.work.")
    ] = False,
    prove: Annotated[bool, typer.Option("--prove/--no-prove", help="Load OUT in a fresh process and compare.")] = True,
    results: Results = Path("results"),
) -> None:
    """Compress one model with one method, in one go and without the pipeline.

    espalier compress MODEL --method hc_smoe ratio=0.5 linkage=ward --calibration embedded --out DIR
    """
    from espalier.oneshot import compress as run
    from espalier.progress import show as show_progress

    with show_progress() as progress:
        report = run(
            model,
            method,
            calibration,
            out,
            then=then,
            dtype=dtype,
            batch_size=batch_size,
            device=device,
            stream=stream,
            keep_work=keep_work,
            prove=prove,
            results=results,
            progress=progress,
            **_settings(settings or []),
        )
    counts, source = report["counts"], report["source_parameters"]
    more = counts["stored"] / source - 1  # routers of a dense model's blocks, say
    change = f"grown by {more:.2%}" if more > 0 else f"{-more:.1%} saved"
    print(f"{report['out']}: {counts['stored']:,.0f} of {source:,} parameters stored ({change}), plan.json")
    print(f"at most {counts['active']:,.0f} active a token; {report['apply'][-1]['loads_in']}; {report['seconds']} s")


@app.command(rich_help_panel=PIPELINE)
def dequantise(
    source: Annotated[Path, typer.Argument(help="A model directory with fp8 (in blocks) or mxfp4 weights.")],
    out: Annotated[Path, typer.Argument(help="The directory to write; must not exist.")],
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads that write. [default: one a core, at most 4]")
    ] = None,
) -> None:
    """Rewrite a quantised checkpoint with bf16 weights, which every other command reads."""
    from espalier.progress import show as show_progress
    from espalier.surgery.dequantise import dequantise as run

    with show_progress() as progress:
        report = run(source, out, workers=workers, progress=lambda done, total: progress("dequantise", done, total))
    tensors, size = report["tensors"], report["bytes"] / 1e9
    print(f"{out}: {tensors['dequantised']} tensors of {report['method']} now bf16, {tensors['copied']} copied")
    print(f"{size:.2f} GB in {report['shards']} files; {report['seconds']} s")


def _settings(words: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE words; values are YAML scalars or lists."""
    import yaml

    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word}: not a setting. Write KEY=VALUE, such as ratio=0.5.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{word}: the value is not YAML. Put it in quotes.") from None
    return settings


@app.command(rich_help_panel=PIPELINE)
def run(
    experiment: Annotated[str, typer.Argument(help="A name of conf/experiment.")],
    overrides: Overrides = None,
    *,
    dry: Annotated[bool, typer.Option("--dry-run", "-n", help="Show the jobs; write nothing.")] = False,
    cores: Annotated[int | None, typer.Option("--cores", min=1, help="Processors to use. [default: all]")] = None,
    profile: Annotated[
        str, typer.Option("--profile", help="A folder of workflow/profiles, such as slurm.")
    ] = "default",
    tracking: Annotated[str | None, typer.Option("--tracking", help="A name of conf/tracking.")] = None,
    results: Results = Path("results"),
) -> None:
    """Run an experiment: every job that is not done yet, then the table and the report."""
    from espalier.workflow import launch

    code = launch.run(
        experiment, overrides or [], results=results, dry=dry, cores=cores, profile=profile, tracking=tracking
    )
    folder = results / "refs" / experiment
    if code == 0 and not dry and folder.is_dir():
        print(f"\n{(folder / 'table.md').read_text()}")
        for name in ("table.md", "report.html", "checkpoints"):
            if (folder / name).exists():
                print(f"{name.split('.')[0]:12}{folder / name}")
    raise typer.Exit(code)


@app.command(rich_help_panel=PIPELINE)
def prefetch(
    experiment: Annotated[str, typer.Argument(help="A name of conf/experiment.")],
    overrides: Overrides = None,
    *,
    results: Results = Path("results"),
) -> None:
    """Download the models, texts and tasks' data of an experiment, so that its jobs need no network."""
    from espalier.workflow.prefetch import prefetch as run

    run(experiment, overrides or [], results, print)


@app.command(rich_help_panel=PIPELINE)
def estimate(
    name: Annotated[str, typer.Argument(help="An experiment, a model of conf/model, or a model directory.")],
    overrides: Overrides = None,
    *,
    hardware: Annotated[str, typer.Option("--hardware", help="A name of conf/hardware; `here` is measured.")] = "here",
    flops: Annotated[float | None, typer.Option("--flops", help="Another FLOP/s of a large matrix product.")] = None,
    disk: Annotated[float | None, typer.Option("--disk", help="Other bytes per second of the disk.")] = None,
    startup: Annotated[float | None, typer.Option("--startup", help="Other seconds until a job works.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Calibration tokens of a model's estimate.")] = 65536,
    length: Annotated[int, typer.Option("--length", help="Tokens of one of its sequences.")] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Its sequences a forward pass.")] = 8,
    results: Results = Path("results"),
) -> None:
    """Compute bytes, FLOPs, peak memory, disk and time of each stage before anything runs, from config.json alone."""
    import dataclasses

    from espalier import conf
    from espalier.machine.hardware import HERE, Hardware
    from espalier.models.running import Running
    from espalier.workflow import forecast, forecast_text

    machine = Hardware.load(hardware)
    if hardware == HERE and (flops is None or disk is None):
        machine = machine.measured(results)
    said: dict[str, Any] = {"flops": flops, "gpu_flops": flops, "disk": disk, "startup": startup}
    machine = dataclasses.replace(machine, **{key: value for key, value in said.items() if value is not None})
    if name in conf.names("experiment"):
        forecast_text.render(forecast.forecast(name, overrides or [], results, machine), machine)
    else:
        running = Running.of(collect_batch_size=batch_size, **_settings(overrides or []))
        forecast_text.render_model(name, machine, running, tokens, length)


@app.command(rich_help_panel=LOOK)
def show(node: NodeId, results: Results = Path("results")) -> None:
    """Print what a node is, what it was made from and how."""
    from espalier.artefacts import lineage
    from espalier.artefacts.store import Store

    print(lineage.show(Store(results), node))


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


def _stage(name: str, what: str) -> None:
    @app.command(name, help=what, rich_help_panel=STAGE)
    def stage(node: NodeId, results: Results = Path("results")) -> None:
        from espalier import stages
        from espalier.artefacts import lineage
        from espalier.artefacts.store import Store

        store = Store(results)
        document = lineage.find(store, node)
        if document["stage"] != name:
            raise UserError(f"{node} is a {document['stage']} node: run `espalier {document['stage']} {node}`.")
        print(stages.run(document["id"], store))


_stage("fetch", "Bring a model to this machine.")
_stage("tokens", "Make calibration tokens.")
_stage("collect", "Run the model once over the tokens and keep statistics.")
_stage("reduce", "Join the statistics of a calibration's shards.")
_stage("fit", "Learn what a method needs to be learnt, by running the model.")
_stage("plan", "Decide from statistics what to keep, merge or skip.")
_stage("apply", "Write the checkpoint that a plan says.")
_stage("teacher", "Keep the original model's likeliest tokens on a tuning text.")
_stage("tune", "Tune the routers of a checkpoint.")
_stage("score", "Score a checkpoint on its tasks.")
_stage("speed", "Time a checkpoint against the uncompressed model.")
_stage("table", "Put an experiment's scores into a table.")
_stage("report", "Write an experiment's HTML report.")
