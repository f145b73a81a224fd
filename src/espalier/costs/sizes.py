"""The sizes of a model that its costs are computed from: of its config.json, of `_facts`, or of its files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from espalier import conf
from espalier.artefacts.store import read_json
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.costs.parameters import Count, Layer, count, is_moe
from espalier.errors import UserError
from espalier.families import family_of
from espalier.inputs import sources
from espalier.models.running import DTYPE_BYTES

# By the names of their config.json, which transformers does not know; the same architecture.
SAME_AS = {"kimi_k2": "deepseek_v3"}
EAGER = ("gpt_oss",)  # families whose attention holds the scores of all pairs of tokens


@dataclass(frozen=True)
class Sizes:
    """What the formulas need to know of a model; a dense one has no experts.

    `width` is that of an expert, `dense_width` that of a dense layer.
    `bytes_per_parameter` are those of the files.
    """

    count: Count
    hidden: int
    width: int
    dense_width: int
    top_k: int
    heads: int
    vocabulary: int
    bytes_per_parameter: float
    eager: bool = False
    positions: int = 0  # tokens of the longest sequence, 0 where config.json does not say
    stacked: bool = False  # whether the files hold a layer's experts in one tensor

    @property
    def parameters(self) -> int:
        """Parameters in the files; a tied head counts once, multi-token-prediction layers count."""
        return self.count.loaded + self.count.idle

    @property
    def loaded(self) -> int:
        """Parameters of the model that transformers builds."""
        return self.count.loaded

    @property
    def moe(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.count.layers if layer.experts)

    @property
    def experts(self) -> int:
        return max((layer.experts for layer in self.moe), default=0)

    @property
    def expert_parameters(self) -> int:
        return max((layer.expert for layer in self.moe), default=0)

    @property
    def largest_layer(self) -> int:
        return max(layer.total for layer in self.count.layers)

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest matrix of a layer that is read at once: of one expert, or of what is dense."""
        return self.hidden * max(self.width, self.dense_width, self.hidden)

    def narrower(self, ratio: float) -> "Sizes":
        """Return the sizes of a dense model whose FFNs lost the fraction `ratio` of their neurons."""
        kept = self.dense_width - round(ratio * self.dense_width)
        layers = tuple(replace(layer, rest=layer.rest * kept // self.dense_width) for layer in self.count.layers)
        return replace(self, count=replace(self.count, layers=layers), dense_width=kept)

    @property
    def outside(self) -> int:
        """Parameters outside of the decoder layers."""
        return self.count.embedding + self.count.head + self.count.norm

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        idle = sum(max(layer.experts - self.top_k, 0) * layer.expert for layer in self.moe)
        return self.loaded - idle

    @property
    def disk_bytes(self) -> float:
        return self.bytes_per_parameter * self.parameters

    def slots(self, prefetch: bool = True) -> int:
        """Parameters that streaming holds room for: two neighbouring layers (one without `prefetch`).

        Room is kept for the next tensor of the same shape, so that parts of different sizes add up.
        """
        total = 0
        for parts in ([x.mixer for x in self.count.layers], [x.feed_forward for x in self.count.layers]):
            pairs = list(pairwise(parts)) if prefetch else []
            for size in set(parts):
                total += size * max((pair.count(size) for pair in pairs), default=1)
        return total

    def without(self, removed: int, rows: bool = True) -> "Sizes":
        """Sizes after removing `removed` experts (and their router rows) from each MoE layer."""
        layers = tuple(
            replace(
                layer,
                experts=layer.experts - removed,
                rest=layer.rest - (removed * layer.router_row if rows else 0),
            )
            if layer.experts
            else layer
            for layer in self.count.layers
        )
        return replace(self, count=replace(self.count, layers=layers), top_k=min(self.top_k, self.experts - removed))


def sizes_of(name: str) -> Sizes:
    """Return the sizes of a model: of its files where they are here, else of `_facts` in conf/model/NAME.yaml.

    UserError when neither is there.
    """
    config = sources.model_config(name)
    id = str(config["id"])
    if sources.is_local(id):
        return sizes_of_directory(Path(id).expanduser())
    if id == sources.EMBEDDED:
        return sizes_of_directory(sources.resolve(id, None, Path("results")))
    facts = config.get("_facts")
    if facts is None:
        raise UserError(
            f"{name}: its sizes are not known without its files. Give it a file in conf/model with `_facts`, "
            "or name a directory with its config.json."
        )
    return sizes_of_config(facts["config"], facts.get("bytes_per_parameter", 2), facts.get("total_parameters"))


def sizes_of_source(id: str, fetched: Path | None = None) -> Sizes:
    """Return the sizes of the model of a `fetch` node by its id; `fetched` is the node's artefact, where it is there.

    UserError as for `sizes_of`.
    """
    name = next((name for name in conf.names("model") if conf.load("model", name).get("id") == id), id)
    if fetched is not None and fetched.exists() and not sources.is_local(id):
        return sizes_of_directory(Path(read_json(fetched, "espalier.model/1")["path"]))
    return sizes_of(name)


def sizes_of_directory(directory: Path) -> Sizes:
    """Return the sizes of a model directory, from the headers of its shards or, without any, config.json alone."""
    if not any(directory.glob("*.safetensors")):
        config = _known(json.loads((directory / "config.json").read_text()))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        return sizes_of_config(config, DTYPE_BYTES.get(dtype, 2))
    checkpoint = Checkpoint(directory)
    checkpoint.config = _known(checkpoint.config)
    stored = sum(entry.nbytes for entry in checkpoint.entries.values())
    counts = checkpoint.expert_counts if is_moe(checkpoint.config) else {}
    sizes = sizes_of_config(checkpoint.config, stored / checkpoint.parameters)
    layers = list(sizes.count.layers)
    for layer, experts in counts.items():  # of a compressed model they may be other than config.json says
        layers[layer] = replace(layers[layer], experts=experts)
    idle = checkpoint.idle_parameters
    sizes = replace(sizes, count=replace(sizes.count, layers=tuple(layers), idle=idle))
    return _fitted(sizes, checkpoint.parameters - idle)


def sizes_of_config(config: dict[str, Any], bytes_per_parameter: float, loaded: int | None = None) -> Sizes:
    """Return the sizes that a config.json says; `loaded` are the model's parameters where they were counted elsewhere.

    UserError for a MoE model of an unknown family.
    """
    config = _known(config)
    dense_width = int(config.get("intermediate_size") or 0)
    if is_moe(config):
        family = family_of(config)
        width, top_k = int(config[family.width_key]), family.top_k(config)
        eager, stacked = family.model_type in EAGER, bool(family.stacked)
    else:
        width, top_k, eager, stacked = 0, 0, False, False
    sizes = Sizes(
        count=count(config),
        hidden=int(config["hidden_size"]),
        width=width,
        dense_width=dense_width,
        top_k=top_k,
        heads=int(config["num_attention_heads"]),
        vocabulary=int(config["vocab_size"]),
        bytes_per_parameter=float(bytes_per_parameter),
        eager=eager,
        stacked=stacked,
        positions=int(config.get("max_position_embeddings") or 0),
    )
    return sizes if loaded is None else _fitted(sizes, loaded)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json under the name that transformers gives its architecture."""
    model_type = config.get("model_type")
    return config | {"model_type": SAME_AS.get(str(model_type), model_type)}


def _fitted(sizes: Sizes, loaded: int) -> Sizes:
    """Put what the arithmetic missed of `loaded` parameters into the layers, in equal parts, the rest into the norm."""
    layers: Sequence[Layer] = sizes.count.layers
    each, rest = divmod(loaded - sizes.loaded, len(layers))
    fitted = tuple(replace(layer, mixer=layer.mixer + each) for layer in layers)
    return replace(sizes, count=replace(sizes.count, layers=fitted, norm=sizes.count.norm + rest))
