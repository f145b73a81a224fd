"""Commands that make something: one call, the whole pipeline, and what a run will take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from espalier.commands.app import PIPELINE, Overrides, Results, app, parse_settings


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
            **parse_settings(settings or []),
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
        running = Running.of(collect_batch_size=batch_size, **parse_settings(overrides or []))
        forecast_text.render_model(name, machine, running, tokens, length)
