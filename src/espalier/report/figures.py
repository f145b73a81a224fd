"""The figures of a report, each a section with its caption and what it says in words."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.artefacts.store import canonical
from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.figures import activity, experts, losses, neurons, similarity, speed, style, training
from espalier.figures.quality import quality
from espalier.plans.plan import Plan
from espalier.report import page
from espalier.report.material import LINES, Line, Material
from espalier.report.page import Section
from espalier.report.results import spoken
from espalier.report.skipping import Word
from espalier.training.curves import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS = 12  # plans whose distances between experts are drawn


def drawn(material: Material, folder: Path) -> list[Section]:
    """Return the sections with figures that the material has something for, and save each figure in `folder`."""
    sections: list[Section] = []
    shown = material.lines
    plans = {line.label: line.plans for line in shown if line.plans}
    active = {line.label: line.active for line in shown}
    summary, baselines = material.table["summary"], material.table["baselines"]
    source, width = _experts(material), _width(material)

    def add(id: str, title: str, draw: "Callable[[], Figure | None]", caption: str, alt: str) -> None:
        figure = draw()
        if figure is not None:
            element = style.svg(figure)
            style.save(element, folder / f"{id}.svg")
            sections.append(Section(id, title, page.figure(element, caption + _left_out(id, material), alt, id)))

    add(
        "quality",
        "Quality against parameters",
        lambda: quality(summary, baselines),
        "Quality against the parameters that are left (unique) and those that a token uses (active). Bars: 95 % "
        "intervals of the comparison with the uncompressed model of each (star and dashed line). Grey: the Pareto "
        "front, on which no other method is both smaller and better. Methods that leave equally many are drawn side by "
        "side.",
        "Quality by method. " + spoken(material.table),
    )
    add(
        "speed",
        "Speed",
        lambda: speed.speed(summary[:LINES]),
        "Time of one sequence over the uncompressed model's (dashed line): geometric means of the rounds with 95 % "
        "intervals, and what would be ideal. How they were timed: see How to read it.",
        "Times of each method, as in the table of means.",
    )
    add(
        "usage",
        "What the router chooses",
        lambda: experts.usage(material.stats),
        "Share of the router's choices that goes to each expert of the uncompressed model, by layer. The line in "
        "the colour bar is an even share.",
        "Heat map of layers by experts.",
    )
    if source:
        add(
            "decisions",
            "What each method decided",
            lambda: experts.decisions(plans, source),
            "Experts by layer: blue is kept as it is, grey is removed, orange is replaced by a constant; experts of "
            "one colour and number in a layer are merged with each other.",
            "A matrix of layers by experts for each method.",
        )
    if width:
        add(
            "neurons",
            "Where the neurons are",
            lambda: neurons.neurons(plans, active, width),
            "Neurons of each layer's FFN: those that every token runs (shared ones, or all that stay), those of which "
            "a token runs some, and those that are gone. Points: what a token ran on held-out text.",
            "Stacked bars by layer for each method.",
        )
        add(
            "expert-neurons",
            "How many neurons an expert has",
            lambda: neurons.expert_neurons(plans, width),
            "Neurons of each expert, in percent of those that the uncompressed FFN or expert has, where they differ.",
            "A matrix of layers by experts for each method.",
        )
    sections += _similarities(material, folder)
    sections += _skipping(material, folder, plans, active, add)
    add(
        "depth",
        "Which layers tokens enter",
        lambda: activity.tokens_entering(active, plans),
        "Percent of the tokens of held-out text that enter each layer that they may skip; 0 is a layer that is gone. "
        "Layers without a number are run by all. a: only attention is skipped, f: only the FFN.",
        "A matrix of methods by layers.",
    )
    add(
        "losses",
        "What each layer loses",
        lambda: losses.losses(plans),
        "What each method measured of its decision, by layer. Methods measure different things: lines compare within a "
        "panel, not between two.",
        "Lines over the layers for each method.",
    )
    _trainings(material, add)
    return sections


def _experts(material: Material) -> int:
    """Experts of a layer of the uncompressed model; 0 for a dense one, or where nothing tells their number."""
    shapes = [material.shape, *(one.shape for one in material.stats)]
    return max((shape.experts for shape in shapes if isinstance(shape, ModelShape)), default=0)


def _width(material: Material) -> int:
    """Neurons of the uncompressed model's FFN, or of one of its experts; 0 where it is gone."""
    shapes = [material.shape, *(one.shape for one in material.stats)]
    return max((shape.width for shape in shapes if isinstance(shape, ModelShape | DenseShape)), default=0)


def _left_out(id: str, material: Material) -> str:
    lines = len(material.table["summary"])
    if lines <= len(material.lines) or id in ("quality", "usage"):
        return ""
    return f" Of {lines} lines of the table the first {len(material.lines)}."


def _similarities(material: Material, folder: Path) -> list[Section]:
    """Return the section with the trees and maps of distances of the methods that group experts."""
    lines: dict[str, list[Line]] = {}  # those that are tuned, or skip on top, share a plan
    for line in material.lines:
        if line.plans:
            lines.setdefault(canonical(line.plans[0].document()), []).append(line)
    parts: list[str] = []
    for line, *others in lines.values():
        figure = similarity.similarity(line.plans[0], line.distances) if len(parts) < MAPS else None
        if figure is None:
            continue
        id, name = f"similarity-{len(parts)}", style.several([one.label for one in (line, *others)])
        element = style.svg(figure)
        style.save(element, folder / f"{id}.svg")
        alt = f"Dendrograms and heat maps of the layers for {name}."
        parts.append(page.part(name, page.figure(element, _on_similarity(line), alt, id)))
    return [Section("similarity", "Which experts are alike", "\n".join(parts))] if parts else []


def _on_similarity(line: Line) -> str:
    """Return the caption of a line's maps of distances."""
    caption = "Distances between the experts of a layer; dark is far, the diagonal is 0. Frames: the groups."
    if any("linkage" in found for found in line.plans[0].evidence.values()):
        caption += (
            " The tree above joins experts from the nearest on; what lies below its dashed line (blue) is one group."
        )
    if not line.distances:
        caption += " The map shows the heights at which the tree joins two experts; the distances are not kept."
    return caption


def _skipping(
    material: Material,
    folder: Path,
    plans: Mapping[str, tuple[Plan, ...]],
    active: Mapping[str, Any],
    add: Callable[..., None],
) -> list[Section]:
    """Add the maps of skipping, and return the tables of the tokens that skip most and least."""
    add(
        "skipping",
        "How many experts a token runs",
        lambda: activity.experts_run(active, plans),
        "Mean number of experts that a token of held-out text runs, by layer, of the methods that let tokens skip.",
        "A matrix of methods by layers.",
    )
    skips = {line.label: line.skipping for line in material.lines if line.skipping is not None}
    add(
        "skipping-shares",
        "How skipping is spread over tokens",
        lambda: activity.experts_run_shares({label: skip.shares for label, skip in skips.items()}),
        "Share of the calibration tokens that run one expert, two, and so on, by layer.",
        "Stacked bars by layer for each method.",
    )
    if not any(skip.fewest for skip in skips.values()):
        return []
    parts = []
    for label, skip in skips.items():
        rows = [
            [*_word(material, few), *_word(material, many)] for few, many in zip(skip.fewest, skip.most, strict=True)
        ]
        header = ["runs fewest", "times", "experts", "runs most", "times", "experts"]
        parts.append(page.table(header, rows, f"{label}: tokens of the calibration, means over the layers."))
    return [Section("skipped-tokens", "Which tokens skip", page.side_by_side(parts))]


def _word(material: Material, word: Word) -> list[str]:
    """Return a token's text in quotes, line breaks to be seen (its id where there is no tokenizer), and its numbers."""
    text = repr(material.words[word.id]) if word.id in material.words else f"token {word.id}"
    return [text, str(word.times), f"{word.experts:.2f}"]


def _trainings(material: Material, add: Callable[..., None]) -> None:
    by_kind: dict[str, dict[Any, list[Curve]]] = {}
    layered: dict[str, dict[int, Curve]] = {}
    for line in material.lines:
        for curve in line.curves:
            if curve.layer is None:  # lines that differ only in what is done afterwards share a training
                same = (curve.places, tuple(curve.terms.items()))
                by_kind.setdefault(curve.kind, {}).setdefault(same, []).append(curve)
            else:
                layered.setdefault(curve.label, {})[curve.layer] = curve
    for number, (kind, found) in enumerate(by_kind.items()):
        curves = [replace(same[0], label=style.several([curve.label for curve in same])) for same in found.values()]
        add(
            f"training-{number}",
            f"Training: {kind}",
            lambda curves=curves: training.training(curves),
            "The terms of the loss, and what was measured on the way; faint: every step, strong: means of neighbours. "
            "Of several seeds the first.",
            "Lines over the training for each method.",
        )
    add(
        "training-layers",
        "Training, layer by layer",
        lambda: training.layerwise(layered),
        "The loss of routers that are tuned one layer after another, means of neighbouring steps.",
        "Lines over the training for each layer.",
    )
