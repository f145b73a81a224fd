"""Hugging Face checkpoint directories, read lazily from their safetensors headers."""

import json
import re
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import dense_families
from espalier.checkpoints.decoder_shape import decoder_shape
from espalier.checkpoints.dtypes import ITEM_NUMBERS, TORCH_NAMES, not_finite, only_stored, torch_shape
from espalier.checkpoints.quantised import refuse_quantised
from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.checkpoints.tensor_files import TensorEntry, fill, read_header, unreadable
from espalier.dense_families import DenseFamily, dense_family_of
from espalier.errors import UserError
from espalier.families import Family, family_of, predicts_ahead

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A model directory with config.json and safetensors; opening it reads the headers only.

    UserError when the directory, config.json, a shard or part of one is missing, or without safetensors.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config = _config(self.directory)
        self.files = _shards(self.directory)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for name, entry in read_header(self.directory / file).items():
                if name in self.entries:
                    raise UserError(f"{self.directory}: tensor {name} lies in {self.entries[name].file} and in {file}.")
                self.entries[name] = entry
        self._check_index()

    def _check_index(self) -> None:
        if not (self.directory / INDEX).exists():
            return
        listed: dict[str, str] = json.loads((self.directory / INDEX).read_text())["weight_map"]
        for name, file in listed.items():
            if name not in self.entries or self.entries[name].file != file:
                raise UserError(f"{self.directory / INDEX}: {file} does not hold tensor {name}. Download it again.")

    @cached_property
    def family(self) -> Family:
        """The model's family; UserError for a dense or unknown model."""
        return family_of(self.config)

    @property
    def is_dense(self) -> bool:
        """Whether it is a model of a dense family."""
        return self.config.get("model_type") in dense_families.names()

    @cached_property
    def dense_family(self) -> DenseFamily:
        """The model's dense family; UserError for one with experts or an unknown model."""
        return dense_family_of(self.config)

    @cached_property
    def expert_counts(self) -> dict[int, int]:
        """Routed experts in the files, by decoder layer with a MoE block; a layer's need not equal another's."""
        counts, dropped = {}, self._dropped("block", "ffn")
        for layer in (layer for layer in self.family.moe_layers(self.config) if layer not in dropped):
            if self.family.stacked:
                stacked = self.entries.get(self.family.stacked_tensors(layer)[0])
                counts[layer] = stacked.shape[0] if stacked is not None else 0
            else:
                counts[layer] = next(e for e in count() if self.family.expert_tensors(layer, e)[0] not in self.entries)
        return counts

    @cached_property
    def fingerprint(self) -> list[list[Any]]:
        """Names, sizes and modification times of config.json and the shards: equal while nobody touches them."""
        paths = [self.directory / "config.json", *(self.directory / file for file in self.files)]
        return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

    def tensors_of(self, file: str) -> list[str]:
        """Names of the tensors in one shard, in the order in which they lie there."""
        return [name for name, entry in self.entries.items() if entry.file == file]

    def tensor(self, name: str) -> "torch.Tensor":
        """Return a tensor, read from its shard into memory of its own."""
        return self._tensor(self.entries[name])

    def _tensor(self, entry: TensorEntry) -> "torch.Tensor":
        import torch

        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._read_bytes(entry, raw)
        dtype = getattr(torch, TORCH_NAMES[entry.dtype])
        return raw.view(dtype).reshape(torch_shape(entry.dtype, entry.shape))

    def finite_tensor(self, name: str) -> "torch.Tensor":
        """Return a tensor; UserError when it holds NaN or infinity."""
        tensor = self.tensor(name)
        self._check_finite(name, tensor)
        return tensor

    def rows(self, name: str, index: int) -> "torch.Tensor":
        """Return tensor[index : index + 1], reading no other bytes; UserError when it holds NaN or infinity."""
        entry = self.entries[name]
        nbytes = entry.nbytes // entry.shape[0]
        part = replace(entry, shape=(1, *entry.shape[1:]), nbytes=nbytes, offset=entry.offset + index * nbytes)
        tensor = self._tensor(part)
        self._check_finite(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: "torch.Tensor") -> None:
        """Read a tensor into `tensor`, of its shape and any dtype; UserError when it holds NaN or infinity.

        Of the file's own dtype and contiguous in the processor's memory, it is filled without a copy on the way.
        """
        import torch

        entry = self.entries[name]
        if entry.dtype in ITEM_NUMBERS:
            self.refuse_stored(name)
        direct = tensor.device.type == "cpu" and tensor.is_contiguous()
        if direct and tensor.dtype == getattr(torch, TORCH_NAMES[entry.dtype]):
            self._read_bytes(entry, tensor.reshape(-1).view(torch.uint8))
        else:
            tensor.copy_(self.tensor(name).reshape(tensor.shape))
        self._check_finite(name, tensor)

    def _read_bytes(self, entry: TensorEntry, raw: "torch.Tensor") -> None:
        # Not memory-mapped: mapped pages count as the process's memory and grow to the size of the model.
        path = self.directory / entry.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                fill(file, raw.numpy().data)
        except OSError as error:
            raise unreadable(path, error) from error

    def _check_finite(self, name: str, tensor: "torch.Tensor") -> None:
        bad = not_finite(tensor) if tensor.is_floating_point() and tensor.numel() else 0
        if bad:
            raise UserError(
                f"{self.directory / self.entries[name].file}: tensor {name} holds {bad} NaN or infinite "
                f"numbers of {tensor.numel()}. Download the model again."
            )

    def refuse_stored(self, name: str) -> None:
        """Raise UserError when nothing can be computed with a tensor as it is stored, in float8 or float4."""
        entry = self.entries[name]
        if only_stored(entry.dtype):
            raise UserError(
                f"{self.directory / entry.file}: tensor {name} has dtype {entry.dtype}, which is quantised: it can "
                "only be copied. Use the unquantised model, or `espalier dequantise` where config.json declares fp8."
            )

    @property
    def parameters(self) -> int:
        """Parameters in the files: every tensor once, a tied `lm_head`, expert maps, skip factors not at all."""
        return sum(self._sizes.values())

    @property
    def idle_parameters(self) -> int:
        """Parameters of multi-token-prediction layers, which no token uses."""
        return sum(size for name, size in self._sizes.items() if predicts_ahead(self.config, name))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        tied = bool(self.config.get("tie_word_embeddings")) and "model.embed_tokens.weight" in self.entries
        skipped = {"lm_head.weight"} if tied else set()
        return {
            name: entry.size
            for name, entry in self.entries.items()
            if name not in skipped and not name.endswith((".expert_map", ".skip_factor"))
        }

    @property
    def always_active_parameters(self) -> int:
        """Parameters that every token uses: all but the routed experts, whatever their number by layer."""
        routed = sum(self.entries[name].size for layer in self.expert_counts for name in self.routed_tensors(layer))
        return self.parameters - routed - self.idle_parameters

    def routed_tensors(self, layer: int) -> list[str]:
        """Names of the tensors that hold the routed experts of a layer."""
        each = (self.family.expert_tensors(layer, expert) for expert in range(self.expert_counts[layer]))
        return [*self.family.stacked_tensors(layer), *(name for names in each for name in names)]

    def shape(self) -> ModelShape:
        """Return the sizes, taken from the tensors; `experts` is the largest number in a layer where they differ.

        UserError for a dense or unknown model, or when config.json disagrees with the tensors.
        """
        refuse_quantised(self.directory, self.config)
        family, counts = self.family, self.expert_counts
        where = f"{self.directory / 'config.json'}"
        experts, layers = family.expert_count(self.config), tuple(counts)
        if not layers:
            raise UserError(f"{where}: no decoder layer holds a MoE block.")
        self._check_layers(where)
        for layer in layers:
            if counts[layer] != experts and "espalier" not in self.config:
                raise UserError(
                    f"{where}: says {experts} experts, but layer {layer} holds {counts[layer]} in its shards. "
                    "Download the model again."
                )
        for key in ("hidden_size", *((family.width_key,) if family.stacked else ())):
            if self.config.get(key) is None:
                raise UserError(f"{where}: key {key!r} is missing. Download config.json again.")
        groups, groups_chosen = family.groups(self.config)
        if experts % groups:
            raise UserError(f"{where}: {experts} experts cannot be divided into {groups} router groups.")
        own = [self._entry(name) for name in family.expert_tensors(layers[0], 0)]
        stacked = [self._entry(name) for name in family.stacked_tensors(layers[0])]
        routers = [(self._entry(name), dim) for name, dim in family.router_tensors(layers[0]).items()]
        width = own[0].shape[0] if own else int(self.config[family.width_key])  # the gate projection is [F, D]
        parts = [entry.size for entry in own] + [entry.size // entry.shape[0] for entry in stacked]
        narrowable = sum(size for size, axis in zip(parts, family.neurons, strict=True) if axis is not None)
        self._check_sizes(where, layers[0])
        return ModelShape(
            family=family.model_type,
            layers=layers,
            experts=max(counts.values()),
            top_k=family.top_k(self.config),
            hidden=int(self.config["hidden_size"]),
            width=width,
            renormalise=family.renormalise(self.config),
            expert_parameters=sum(parts),
            router_row_parameters=sum(entry.size // entry.shape[dim] for entry, dim in routers),
            total_parameters=self.parameters,
            groups=groups,
            groups_chosen=groups_chosen,
            group_least=family.group_least,
            router=family.router_kind(self.config),
            idle_parameters=self.idle_parameters,
            neuron_parameters=narrowable // width,
            decoder=decoder_shape(self, self._sizes),
        )

    def any_shape(self) -> ModelShape | DenseShape:
        """Return the sizes of either kind of model."""
        return self.dense_shape() if self.is_dense else self.shape()

    def dense_shape(self) -> DenseShape:
        """Return the sizes of a dense model, of config.json and checked against the tensors.

        UserError for a model with experts or of an unknown family, or when config.json disagrees with the tensors.
        """
        refuse_quantised(self.directory, self.config)
        family, where = self.dense_family, f"{self.directory / 'config.json'}"
        for key in ("hidden_size", family.width_key, "num_hidden_layers"):
            if self.config.get(key) is None:
                raise UserError(f"{where}: key {key!r} is missing. Download config.json again.")
        self._check_layers(where)
        hidden, width = int(self.config["hidden_size"]), int(self.config[family.width_key])
        split = self.config.get("espalier", {}).get("layers", {})
        parameters, dropped = 0, self._dropped("block", "ffn")
        for layer in range(int(self.config["num_hidden_layers"])):
            if layer in dropped:
                continue
            stored = sum(split[str(layer)]["segments"]) if str(layer) in split else width
            parameters = 0
            for role, name in family.tensors(layer).items():
                entry = self._entry(f"{name}.weight")
                meant = (hidden, stored) if role == "down" else (stored, hidden)
                if entry.shape != meant:
                    raise _disagreement(where, f"{family.width_key}={width}", f"{name}.weight", entry)
                parameters += hidden + (role != "down" and f"{name}.bias" in self.entries)
        return DenseShape(
            family=family.model_type,
            layers=tuple(range(int(self.config["num_hidden_layers"]))),
            hidden=hidden,
            width=width,
            gated=family.gate is not None,
            neuron_parameters=parameters,
            total_parameters=self.parameters,
            pairs=family.head(self.config) // 2,
            pair_parameters=self._pair_parameters(family),
            decoder=decoder_shape(self, self._sizes),
        )

    def _pair_parameters(self, family: DenseFamily) -> int:
        """Parameters that two dimensions of all heads have in a layer's projections of queries and keys."""
        heads = int(self.config["num_attention_heads"])
        heads += int(self.config.get("num_key_value_heads") or heads)
        bias = f"{family.attention_tensor(0, 'query')}.bias" in self.entries
        return 2 * heads * (int(self.config["hidden_size"]) + bias)

    def _dropped(self, *granularities: str) -> set[int]:
        """Layers whose tensors of this kind are not in the files, since no token runs them (`espalier.plans.depth`)."""
        routed = self.config.get("espalier", {}).get("depth", {"layers": {}})["layers"]
        return {
            int(layer) for layer, own in routed.items() if own["rule"] == "drop" and own["granularity"] in granularities
        }

    def _check_layers(self, where: str) -> None:
        """Raise UserError unless the files hold as many decoder layers as config.json says."""
        said = int(self.config["num_hidden_layers"])
        # Layers behind the last that predict further tokens, where config.json announces any.
        ahead = sum(int(v or 0) for key, v in self.config.items() if re.match(r"num_(nextn|mtp)_", key))
        found = [re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in self.entries if "mtp" not in name]
        held = 1 + max((int(match[1]) for match in found if match), default=-1)
        gone = self._dropped("block")
        while said - 1 in gone and held < said:  # its tensors are not in the files
            said -= 1
        if not said <= held <= said + ahead:
            raise UserError(
                f"{where}: says num_hidden_layers={said}, but the shards hold {held} decoder layers. "
                "Download the model again."
            )

    def _check_sizes(self, where: str, layer: int) -> None:
        """Raise UserError when a key of config.json disagrees with the shape of a tensor that it gives."""
        family, hidden, width = self.family, "hidden_size", self.family.width_key
        means: dict[str, tuple[str | None, str | None]] = {"model.embed_tokens.weight": ("vocab_size", hidden)}
        own = None if "espalier" in self.config else width  # which says itself how wide they are
        means |= dict.fromkeys(family.expert_tensors(layer, 0)[:1], (own, hidden))
        means[next(iter(family.router_tensors(layer)))] = (None, hidden)
        for name, keys in means.items():
            entry = self.entries.get(name)
            for dim, key in enumerate(keys):
                said = self.config.get(key) if key else None
                if entry is not None and said not in (None, entry.shape[dim]):
                    raise _disagreement(where, f"{key}={said}", name, entry)
        for name in family.stacked_tensors(layer)[
            : own is not None
        ]:  # gate and up side by side: [E, D, 2 F] or [E, 2 F, D]
            meant = sorted((self.config[hidden], 2 * self.config[width]))
            if sorted(self.entries[name].shape[1:]) != meant:
                raise _disagreement(where, f"{width}={self.config[width]}", name, self.entries[name])

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise UserError(f"{self.directory}: tensor {name} is missing. Download the model again.")
        return self.entries[name]


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Name a Hugging Face model directory.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}). Download it again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no JSON object. Download it again.")
    return config


def _shards(directory: Path) -> list[str]:
    """Return the names of the safetensors files that make up the model, in order."""
    index = directory / INDEX
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not an index of shards ({error!r}). Download it again.") from None
        if SINGLE not in files and (directory / SINGLE).is_file():  # which transformers would read
            raise UserError(
                f"{directory}: holds both {SINGLE} and the {len(files)} shards of {INDEX}. Remove what is not meant."
            )
        missing = [file for file in files if not (directory / file).is_file()]
        if missing:
            raise UserError(
                f"{directory}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:3])}. "
                f"{INDEX} names them; download the model again."
            )
        return files
    files = [SINGLE] if (directory / SINGLE).is_file() else sorted(p.name for p in directory.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise UserError(f"{directory}: {len(files)} shards but no {INDEX}. Download the model again.")
    others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".gguf"))
    found = f"only {', '.join(others[:3])}" if others else "no weights"
    raise UserError(
        f"{directory}: no safetensors weights, {found}. Convert the model: "
        "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW) writes safetensors."
    )


def _disagreement(where: str, said: str, name: str, entry: TensorEntry) -> UserError:
    return UserError(
        f"{where}: says {said}, but tensor {name} in {entry.file} is {list(entry.shape)}. Download the model again."
    )
