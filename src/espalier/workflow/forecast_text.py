"""Forecasts as tables on the terminal."""

from rich.console import Console
from rich.table import Table

from espalier.costs.estimate import Cost, apply_cost, collect_cost, score_cost
from espalier.costs.sizes import Sizes, sizes_of
from espalier.inputs import sources
from espalier.machine.hardware import EFFICIENCY, Hardware
from espalier.models.running import DTYPE_BYTES, Running
from espalier.workflow.forecast import Forecast


def render(forecast: Forecast, hardware: Hardware) -> None:
    """Print a forecast as a table."""
    table = Table(title=f"{forecast.experiment}: what is left to do", title_justify="left")
    gpu = forecast.total.gpu
    columns = ["stage", "jobs", "done", "TFLOP", "GB read", "GB written", "GB disk", "time", "GB memory"]
    for column in [*columns, *(["GB GPU"] if gpu else [])]:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in forecast.stages.values():
        table.add_row(stage.stage, str(stage.jobs), str(stage.done), *_cells(stage.cost, stage.seconds, gpu))
    jobs, done = (sum(getattr(stage, key) for stage in forecast.stages.values()) for key in ("jobs", "done"))
    table.add_section()
    table.add_row("all", str(jobs), str(done), *_cells(forecast.total, forecast.seconds, gpu))
    console = Console()
    console.print(table)
    if forecast.total.streamed:
        console.print("The model does not fit whole: one decoder layer at a time.", highlight=False)
    console.print(_terms(hardware), highlight=False)
    for row in forecast.stages.values():
        _warn(console, row.stage, row.cost, hardware)
    if forecast.slow:
        console.print(forecast.slow, highlight=False)
    for line in forecast.unknown:
        console.print(f"not counted: {line}", highlight=False)


def render_model(name: str, hardware: Hardware, running: Running, tokens: int, length: int) -> None:
    """Print what one model takes to store, calibrate, compress and score."""
    sizes = sizes_of(name)
    table = Table(title=f"{name}: {sizes.parameters:,} parameters", title_justify="left", show_header=False)
    experts = f"{sizes.experts} in each of {len(sizes.moe)} layers, {sizes.top_k} a token" if sizes.experts else "none"
    table.add_row("experts", experts)
    table.add_row("active parameters a token", f"{sizes.active:,}")
    table.add_row("checkpoint on disk", f"{sizes.disk_bytes / 1e9:.2f} GB")
    for ratio in (0.25, 0.5) if sizes.experts else ():
        smaller = sizes.without(round(ratio * sizes.experts))
        table.add_row(f"  with {ratio:.0%} of the experts removed", f"{smaller.disk_bytes / 1e9:.2f} GB")
    dtype = _dtype(name, sizes)
    stages = _stages(sizes, dtype, hardware, running, tokens, length)
    for what, cost in stages:
        table.add_row(what, _sentence(cost, hardware))
    console = Console()
    console.print(table)
    for what, cost in stages:
        _warn(console, what, cost, hardware)
    console.print(f"{tokens:,} tokens in sequences of {length}, in {dtype}. {_terms(hardware)}", highlight=False)


def _stages(
    sizes: Sizes, dtype: str, hardware: Hardware, running: Running, tokens: int, length: int
) -> list[tuple[str, Cost]]:
    probes = [("calibration", frozenset({"usage", "output_norm"}))]
    if sizes.experts:
        probes.append(("calibration, all experts (hc_smoe)", frozenset({"usage", "mean_output"})))
        probes.append(("calibration, Gram matrices (naee)", frozenset({"residual_gram"})))
    rows = [(what, collect_cost(sizes, tokens, length, own, dtype, running, hardware)) for what, own in probes]
    if sizes.experts:
        half = sizes.without(sizes.experts // 2)
        rows.append(("pruned checkpoint and its proof, 50%", apply_cost(sizes, half, False, running, hardware)))
        rows.append(("merged checkpoint and its proof, 50%", apply_cost(sizes, half, True, running, hardware)))
    flops = collect_cost(sizes, tokens, length, frozenset(), dtype, running, hardware).flops
    rows.append(("perplexity", score_cost(sizes, 0, tokens, length, flops, dtype, running, hardware)))
    return rows


def _warn(console: Console, what: str, cost: Cost, hardware: Hardware) -> None:
    """Say where a machine's memory is too small."""
    pairs = [("memory", cost.memory, hardware.memory), ("GPU memory", cost.gpu_memory, hardware.gpu_memory)]
    for kind, needed, there in pairs:
        if there is not None and needed > there:
            console.print(
                f"too large for {hardware.name}: {what} needs {needed / 1e9:.1f} of {there / 1e9:.1f} GB of {kind}. "
                "Lower runtime.collect_batch_size or score_batch_size, set stream=auto, or use another machine.",
                highlight=False,
            )


def _dtype(name: str, sizes: Sizes) -> str:
    dtype = str(sources.model_config(name).get("dtype"))
    return dtype if dtype in DTYPE_BYTES else "float32" if sizes.bytes_per_parameter > 2 else "bfloat16"


def _sentence(cost: Cost, hardware: Hardware) -> str:
    parts = [f"{cost.flops / 1e12:,.2f} TFLOP"] if cost.flops else []
    parts += [f"{_time(cost.seconds(hardware))}", f"{cost.memory / 1e9:.2f} GB of memory"]
    if cost.gpu:
        parts.append(f"{cost.gpu_memory / 1e9:.2f} GB of the GPU's")
    parts.append(f"{cost.read / 1e9:,.2f} GB read, {cost.written / 1e9:,.2f} written, {cost.disk / 1e9:,.2f} of disk")
    return ("layer by layer: " if cost.streamed else "") + ", ".join(parts)


def _cells(cost: Cost, seconds: float, gpu: bool) -> list[str]:
    scales = ((cost.flops, 1e12), (cost.read, 1e9), (cost.written, 1e9), (cost.disk, 1e9))
    numbers = [f"{value / scale:,.2f}" for value, scale in scales]
    row = [*numbers, _time(seconds), f"{cost.memory / 1e9:,.2f}"]
    return [*row, f"{cost.gpu_memory / 1e9:,.2f}"] if gpu else row


def _terms(hardware: Hardware) -> str:
    gpu = f", a GPU of {hardware.gpu_flops / 1e12:,.0f} TFLOP/s" if hardware.gpu_memory and hardware.gpu_flops else ""
    return (
        f"On {hardware.name}, jobs one after another: {hardware.flops / 1e9:,.0f} GFLOP/s on {hardware.cores} cores"
        f"{gpu} ({EFFICIENCY:.0%} of it reached), {hardware.disk / 1e6:,.0f} MB/s, {hardware.startup:g} s to start each"
        f", {hardware.memory / 1e9:,.0f} GB of memory; formulas in src/espalier/costs/estimate.py."
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
