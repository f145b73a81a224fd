"""Proof of a written checkpoint in a fresh process: it loads whole and computes what the live plan computes.

`python -m espalier.surgery.prove [--streamed] SOURCE OUT [PLAN]` prints one JSON line. PLAN (default OUT/plan.json) is
the plan that led from SOURCE to OUT. Exit code 1 when the proof fails, or, with `short`, had no memory or disk to end.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from espalier.artefacts.partial import FULL
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.decoder_shape import ffn_module, layer_parts
from espalier.errors import UserError, out_of_memory
from espalier.families import Family
from espalier.models.live_depth import LiveDepth
from espalier.models.live_split import LiveSplit, LiveValues, change_layer
from espalier.models.runtime import change_block, decoder, live, load_with_info, moe_blocks, skeleton
from espalier.models.stream import Batch, StreamedModel
from espalier.plans.depth import Depth, DepthRule
from espalier.plans.plan import Plan
from espalier.surgery.depth_rewrite import without_depth

Loading = dict[str, list[str]]  # missing, unexpected and mismatched keys

STREAMED = "--streamed"
ROWS, LENGTH = 4, 16
# Largest difference of two logits over the largest logit. Both models compute in fp32 whatever the
# checkpoint's dtype, so that rounding cannot hide a wrong tensor: measured 1e-7 to 3e-6.
TOLERANCE = 1e-4
# Where so small a relative change of a router's input changes a token's experts, rounding decides: the token and the
# rest of its sequence are left out. Tried a few times: each draw changes only half of the choices that hang on it.
NUDGE, DRAWS = 1e-5, 8
# What a change as large as rounding, of every layer's input, does to a token's logits says how far two right models may
# differ there: an FFN in which large terms cancel makes them differ 100 times as much as elsewhere.
ROUNDING, REPEATS = 3e-7, 3


def prove(source: Path, out: Path, plan: Plan, streamed: bool = False) -> dict[str, Any]:
    """Compare the logits of the checkpoint `out` with those of `source` changed in memory by `plan`.

    `streamed`: one decoder layer of each at a time, for models that do not fit. Returns `max_abs_diff`,
    `max_abs_logit`, `tolerance` (relative), `tokens` compared, `streamed`, or `error`: what is wrong. Tokens whose
    logits rounding alone moves that far are left out, unless they are more than half of all.
    """
    checkpoint = Checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(checkpoint.config["vocab_size"]), (ROWS, LENGTH), generator=generator)
    run = _run_streamed if streamed else _run
    planned = _planned_dense if checkpoint.is_dense else _planned
    expected, choices, before = planned(checkpoint, plan, ids, streamed)
    decided = torch.ones(ROWS, LENGTH).bool()
    if choices:  # a token's logits hang on its own choices and on those of the tokens before it
        decided = torch.stack(choices).all(dim=0).reshape(ROWS, LENGTH).long().cumprod(dim=1).bool()
    gc.collect()
    found, loading = run(out, ids)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Layers that transformers leaves out (multi-token prediction) are left out of the source too.
        known = before[what] if what == "unexpected_keys" else []
        new = [name for name in loading[what] if name not in known]
        if new:
            return {"error": f"{what.replace('_', ' ')}: {', '.join(new[:3])}"}
    difference = (found - expected).abs().amax(dim=2)
    largest = float(expected.abs().max())
    compared = difference[decided] if decided.any() else difference.flatten()
    if not compared.max() <= TOLERANCE * largest:
        nudged, _, _ = planned(checkpoint, plan, ids.repeat(REPEATS, 1), streamed, nudge=True)
        moved = (nudged.reshape(REPEATS, *expected.shape) - expected).abs().amax(dim=(0, 3))
        # One that differs by far more than rounding moves it, or is not a number, is never left out.
        excused = (moved > TOLERANCE * largest / 2) & (difference <= 10 * moved)
        steady = decided & ~excused
        if steady.sum() * 2 >= decided.sum() > 0:
            compared = difference[steady]
    worst = float(compared.max())
    report: dict[str, Any] = {
        "max_abs_diff": worst,
        "max_abs_logit": largest,
        "tolerance": TOLERANCE,
        "tokens": len(compared),
        "streamed": streamed,
    }
    if not worst <= TOLERANCE * largest:
        report |= {"error": f"logits differ by {worst:.3g} of {largest:.3g}, tolerance {TOLERANCE:g} of that"}
    return report


def _planned(
    checkpoint: Checkpoint, plan: Plan, ids: torch.Tensor, streamed: bool, nudge: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], Loading]:
    """Return the source's logits under the live plan, its routers' choices and what it reported when it was loaded.

    With `nudge` every layer's input is changed by as much as rounding changes it.
    """
    source, family = checkpoint.directory, checkpoint.family
    rest = without_depth(plan)[0]
    depths: list[LiveDepth] = []
    if streamed:
        stored = skeleton(source).dtype
        renormalise = family.renormalise(checkpoint.config)

        def change(layer: int, module: Any) -> None:
            if layer in rest.layers:
                block = getattr(module, family.module)
                attention = getattr(module, "self_attn", None)
                change_block(block, rest.layers[layer], family, renormalise, plan.tensors, attention)
                for parameter in block.experts.parameters(recurse=False):
                    parameter.data = parameter.data.to(stored).float()
            depths.extend(_live_depth(checkpoint, plan, layer, module))
            if nudge:
                _nudge_input(module, layer)

        stream = StreamedModel(source, torch.float32, prefetch=False, prepare=change)
        choices = _watch_choices(stream.model, family)
        logits, loading = _stream(stream, ids)
    else:
        # The weights are merged and rounded in the checkpoint's own dtype, then both compute in fp32.
        model, loading = load_with_info(source)
        model = live(model, rest, family).float()
        for layer, module in enumerate(decoder(model).layers):
            depths.extend(_live_depth(checkpoint, plan, layer, module))
            if nudge:
                _nudge_input(module, layer)
        choices = _watch_choices(model, family)
        logits = _logits(model, ids)
    return logits, choices + [torch.tensor(depth.decided) for depth in depths], loading


def _planned_dense(
    checkpoint: Checkpoint, plan: Plan, ids: torch.Tensor, streamed: bool, nudge: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], Loading]:
    """Return what `_planned` does for a dense model, with what its tokens run instead of its routers' choices."""
    source, family = checkpoint.directory, checkpoint.dense_family
    rest = without_depth(plan)[0]
    split_before = "layers" in checkpoint.config.get("espalier", {})
    lives: list[LiveSplit | LiveValues | LiveDepth] = []
    config = skeleton(source).config

    def change(layer: int, module: Any) -> None:
        operations = rest.layers.get(layer, ())
        if not split_before:
            lives.extend(change_layer(module, operations, family, plan.tensors, config))
        elif operations:
            getattr(module, family.module).router.threshold = operations[-1].value  # type: ignore[union-attr]
        lives.extend(_live_depth(checkpoint, plan, layer, module))
        if nudge:
            _nudge_input(module, layer)

    if streamed:
        logits, loading = _stream(StreamedModel(source, torch.float32, prefetch=False, prepare=change), ids)
    else:
        loaded, loading = load_with_info(source)
        for layer, module in enumerate(loaded.model.layers):
            change(layer, module)
        logits = _logits(loaded.float(), ids)
    return logits, [torch.tensor(live.decided) for live in lives], loading


def _nudge_input(module: Any, layer: int) -> None:
    """Change what goes into a decoder layer by as much as rounding does, in each sequence differently."""
    generator = torch.Generator().manual_seed(layer)
    stock: Any = type(module)

    def forward(itself: Any, hidden_states: torch.Tensor, *args: Any, **settings: Any) -> Any:
        noise = torch.randn(hidden_states.shape, generator=generator) * ROUNDING
        return stock.forward(itself, hidden_states * (1 + noise), *args, **settings)

    # Not a hook: one that is run a layer at a time is not called, but asked for its class's forward.
    module.__class__ = type(stock.__name__, (stock,), {"forward": forward})


def _live_depth(checkpoint: Checkpoint, plan: Plan, layer: int, module: Any) -> list[LiveDepth]:
    """Let a decoder layer be skipped as the plan says; return what decides, of a layer that was not routed before."""
    found = []
    for operation in plan.layers.get(layer, ()):
        if isinstance(operation, Depth):
            parts, ffn = layer_parts(checkpoint), ffn_module(checkpoint)
            found.append(LiveDepth(module, layer, operation, parts, ffn, plan.tensors, _window(checkpoint, layer)))
        elif isinstance(operation, DepthRule):
            routed = checkpoint.config["espalier"]["depth"]
            granularity = routed["layers"][str(layer)]["granularity"]
            place = module if granularity == "block" else getattr(module, routed["modules"][granularity])
            router = place.depth_router
            router.rule = operation.rule or router.rule
            router.threshold = router.threshold if operation.threshold is None else operation.threshold
    return found


def _window(checkpoint: Checkpoint, layer: int) -> int | None:
    config = checkpoint.config
    kinds = config.get("layer_types")
    sliding = config.get("use_sliding_window", True) if kinds is None else kinds[layer] == "sliding_attention"
    return config.get("sliding_window") if sliding else None


def _run(out: Path, ids: torch.Tensor) -> tuple[torch.Tensor, Loading]:
    """Return the written model's logits and what it reported when it was loaded."""
    written, loading = load_with_info(out)
    return _logits(written.float(), ids), loading


def _run_streamed(out: Path, ids: torch.Tensor) -> tuple[torch.Tensor, Loading]:
    return _stream(StreamedModel(out, torch.float32, prefetch=False), ids)


@torch.inference_mode()
def _stream(model: StreamedModel, ids: torch.Tensor) -> tuple[torch.Tensor, Loading]:
    batches = [Batch(ids, torch.ones_like(ids))]
    states = model.activations(batches)
    for turn in model.turns(batches, states):
        turn.run(0)
    with model.head(states) as head:
        logits = head.logits(batches[0], 0).float()
    # A missing tensor or a wrong shape is an error of StreamedModel itself.
    return logits, {"missing_keys": [], "unexpected_keys": model.weights.unexpected, "mismatched_keys": []}


@torch.inference_mode()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [ROWS, LENGTH, vocabulary] in fp32."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float()


def _watch_choices(model: Any, family: Family) -> list[torch.Tensor]:
    """Return a list to which each router adds, a token, whether it chooses the same experts when slightly nudged."""
    choices: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def watch(router: Any, inputs: Any, output: Any) -> None:
        hidden, *rest = inputs
        chosen = _chosen(output, family)
        same = torch.ones(len(chosen), dtype=torch.bool)
        for _ in range(DRAWS):
            noise = torch.randn(hidden.shape, generator=generator) * NUDGE
            again = router.forward(hidden * (1 + noise), *rest)  # not called: hooks stay out of it
            same &= (_chosen(again, family) == chosen).all(dim=-1)
        choices.append(same)

    for block in moe_blocks(model, family).values():
        getattr(block, family.router_module).register_forward_hook(watch)
    return choices


def _chosen(output: Any, family: Family) -> torch.Tensor:
    """Return a router's choice in a form that can be compared: the K experts in order, or a flag for each of E."""
    chosen: torch.Tensor = output[0] > 0 if family.scales_input else output[2].sort(dim=-1).values
    return chosen


def main(argv: list[str]) -> int:
    """Prove and print the report; return 1 when the proof fails."""
    streamed = STREAMED in argv
    source, out, *rest = (Path(word) for word in argv if word != STREAMED)
    try:
        report = prove(source, out, Plan.load(rest[0] if rest else out / "plan.json"), streamed)
    except UserError as error:
        report = {"error": str(error)}
    except Exception as error:
        if not out_of_memory(error) and getattr(error, "errno", None) not in FULL:
            raise
        report = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", "short": True}
    print(json.dumps(report))
    return 1 if "error" in report else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
