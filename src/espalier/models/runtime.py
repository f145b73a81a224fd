"""Loaded models: load a checkpoint, change a stock model in memory as a plan says, count the experts that run."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from espalier import families, kernels
from espalier.checkpoints.checkpoint import Checkpoint
from espalier.checkpoints.dtypes import TORCH_NAMES
from espalier.checkpoints.quantised import refuse_quantised
from espalier.errors import UserError
from espalier.families import Family
from espalier.models.live_skip import LiveSkip
from espalier.plans.operations import Constant, Keep, Merge, Narrow, Operation, Skip
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def load(
    directory: Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust: bool | None = None,
    experts: str | None = None,
) -> Any:
    """Return the model in eval mode; `dtype` is a torch dtype, its name, or `auto` for the checkpoint's own.

    The directory's own code is trusted only where Espalier wrote it (config.json has `espalier`), unless
    `trust` says otherwise. `experts`: how MoE blocks compute, by default `eager` on a processor. UserError when tensors
    are missing or of another shape than config.json says.
    """
    model, loading = load_with_info(directory, dtype, device, trust, experts)
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            raise UserError(f"{directory}: {what.replace('_', ' ')} {loading[what][:3]}. Download or apply it again.")
    return model


def load_with_info(
    directory: Path,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    trust: bool | None = None,
    experts: str | None = None,
) -> tuple[Any, dict[str, list[str]]]:
    """Return the model as `load` does, and the lists `missing_keys`, `unexpected_keys` and `mismatched_keys`."""
    from transformers import AutoModelForCausalLM

    trusted, kernel = _settings(directory, device, trust, experts)
    # The caller decides about tensors of another shape; transformers' own report of them takes twenty lines.
    wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=trusted, **wanted, **kernel
        )
    except RuntimeError as error:
        raise UserError(f"{directory}: transformers cannot load it: {str(error).strip().splitlines()[-1]}") from error
    finally:
        logger.setLevel(level)
    names = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys")}
    names["mismatched_keys"] = sorted(
        f"{name} {list(stored)} (config.json: {list(expected)})"
        for name, stored, expected in loading["mismatched_keys"]
    )
    model = model.to(device).eval()
    if experts == "espalier":
        kernels.attach(model)
    return model, names


def skeleton(directory: Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> Any:
    """Return the model in eval mode on the meta device, without weights, as `load` would return it with them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted, kernel = _settings(directory, device, None, None)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted, local_files_only=True)
    if dtype == "auto":
        dtype = config.dtype or _stored_dtype(Checkpoint(directory))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted, **kernel)
    return model.eval()


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = next(entry.dtype for entry in checkpoint.entries.values() if entry.dtype in ("F32", "F16", "BF16"))
    found: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return found


def _settings(directory: Path, device: str, trust: bool | None, experts: str | None) -> tuple[bool, dict[str, str]]:
    """Return whether the directory's own code is trusted, and the experts' implementation to ask for."""
    config = Checkpoint(directory).config
    refuse_quantised(directory, config)
    trusted = "espalier" in config if trust is None else trust
    if trusted and "auto_map" in config:
        _cache_code(directory, config["auto_map"]["AutoModelForCausalLM"])
    if config.get("model_type") not in families.names():  # a dense model refuses the setting
        return trusted, {}
    if experts == "espalier":
        kernels.register()
    # On a CPU the plain loop over experts; batched_mm, which transformers may choose elsewhere, copies each
    # token's experts.
    default = "eager" if torch.device(device).type == "cpu" else None
    chosen = experts or default
    return trusted, {} if chosen is None else {"experts_implementation": chosen}


def _cache_code(directory: Path, reference: str) -> None:
    """Let transformers copy the directory's code to its cache, one process at a time: it copies in place."""
    from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_class_from_dynamic_module

    cache = Path(HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".espalier.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        get_class_from_dynamic_module(reference, str(directory))


def decoder(model: Any) -> Any:
    """Return the part of a causal model that holds `layers`; UserError when it keeps them elsewhere."""
    for candidate in (model.base_model, getattr(model, "model", None)):
        if isinstance(getattr(candidate, "layers", None), nn.ModuleList):
            return candidate
    raise UserError(f"{type(model).__name__}: its decoder layers are not a list `layers`, so they cannot be observed.")


def moe_blocks(model: Any, family: Family) -> dict[int, Any]:
    """Return the MoE block of each decoder layer that has one."""
    found = {}
    for layer, part in enumerate(decoder(model).layers):
        block = getattr(part, family.module, None)  # None: a layer that was dropped
        if hasattr(block, "experts"):
            found[layer] = block
    return found


def live(model: Any, plan: Plan, family: Family) -> Any:
    """Change a loaded model in memory to do what `plan` says, in the plainest way, and return it.

    A reference for what `apply` writes: survivors' rows are copied out; a merged group's weights stand in each
    member's place under the stock router, which then runs them as often as it chooses a member; skipping
    sets routing weights to 0, one token at a time.
    """
    blocks = moe_blocks(model, family)
    renormalise = family.renormalise(model.config.to_dict())
    for layer, operations in plan.layers.items():
        attention = getattr(decoder(model).layers[layer], "self_attn", None)
        change_block(blocks[layer], operations, family, renormalise, plan.tensors, attention)
    return model


def change_block(
    block: Any,
    operations: Sequence[Operation],
    family: Family,
    renormalise: bool,
    tensors: Mapping[str, PlanTensor] | None = None,
    attention: Any = None,
) -> None:
    """Change one loaded MoE block in memory, as `live` does; `tensors` are those that the operations name.

    `attention` is the module before the block; where tokens are protected its model is made to give attention weights.
    """
    found = {} if tensors is None else tensors
    router = getattr(block, family.router_module)
    for operation in operations:
        if isinstance(operation, Keep):
            _select([block.experts], operation.experts)
            _select([block, *router.modules()], operation.experts)
        elif isinstance(operation, Merge):
            _merge(block.experts, operation, found)
            if operation.router == "slice":
                rows = tuple(sorted(operation.kept_rows()))  # each member holds the merged expert by now
                _select([block.experts], rows)
                _select([block, *router.modules()], rows)
        elif isinstance(operation, Constant):
            _constant(block.experts, operation, found)
        elif isinstance(operation, Narrow):
            _narrow(block.experts, found[operation.neurons].read())
        elif isinstance(operation, Skip):
            skip = LiveSkip(operation, block, operations, renormalise, found)
            router.register_forward_hook(skip.router_hook)
            if operation.protect is not None:
                skip.watch_attention(attention)


def _select(modules: list[Any], experts: tuple[int, ...]) -> None:
    """Leave the rows `experts` of the modules' own tensors; of a bias [1, E] the columns."""
    before = next(module.num_experts for module in modules if hasattr(module, "num_experts"))
    for module in modules:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if before in tensor.shape[:1] + tensor.shape[-1:]:
                dim = -1 if tensor.shape[0] == 1 and tensor.shape[-1] == before else 0
                rows = tensor.detach().index_select(dim, torch.tensor(experts, device=tensor.device))
                parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(rows, requires_grad=False) if parameter else rows)
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if hasattr(module, name):
                setattr(module, name, len(experts))


@torch.no_grad()
def _merge(experts: Any, merge: Merge, tensors: Mapping[str, PlanTensor]) -> None:
    target = None if merge.neurons is None else tensors[merge.neurons].read()  # [E, F]
    refitted = 0
    for group, weights in zip(merge.groups, merge.weights, strict=True):
        if len(group) == 1:
            continue
        for name, tensor in experts.named_parameters(recurse=False):  # [E, ...]
            merged = sum(w * tensor[e].double() for e, w in zip(group, weights, strict=True))
            if target is not None and (views := _neuron_views(experts, name, group[0])):
                merged = tensor[group[0]].clone()
                sums = [torch.zeros_like(view, dtype=torch.float64) for view in views]
                share = torch.zeros(len(views[0]), dtype=torch.float64)
                for e, w in zip(group, weights, strict=True):
                    own = _neuron_views(experts, name, e)
                    for m, n in enumerate(target[e].tolist()):
                        share[n] += w
                        for total, view in zip(sums, own, strict=True):
                            total[n] += w * view[m].double()
                for n, s in enumerate(share.tolist()):
                    for total, view in zip(sums, _neuron_views(experts, name, None, merged), strict=True):
                        view[n] = (total[n] / s).to(view.dtype)
            if merge.down is not None and name == "down_proj":
                down = torch.from_numpy(tensors[merge.down].row(refitted))  # [F, D]
                merged = down if getattr(experts, "is_transposed", True) else down.T
            for expert in group:
                tensor[expert] = merged.to(tensor.dtype) if isinstance(merged, torch.Tensor) else merged
        refitted += 1


def _neuron_views(experts: Any, name: str, expert: int | None, given: Any = None) -> list[torch.Tensor]:
    """Return what one expert's parameter holds of each neuron, as views [F, ...]: gate, then up, where it has both."""
    tensor = getattr(experts, name)[expert] if given is None else given
    transposed = getattr(experts, "is_transposed", True)  # Llama 4's module says nothing of its layout
    if name == "down_proj":
        return [tensor if transposed else tensor.T]
    if name in ("gate_up_proj", "up_proj"):
        tensor = tensor.T if transposed else tensor  # [2F or F, D]
    elif name not in ("gate_up_proj_bias", "up_proj_bias"):
        return []
    if not name.startswith("gate_up"):
        return [tensor]
    return list(tensor.chunk(2)) if getattr(experts, "is_concatenated", True) else [tensor[::2], tensor[1::2]]


def _constant(experts: Any, operation: Constant, tensors: Mapping[str, PlanTensor]) -> None:
    """Let the experts named leave their work to a vector, one chosen pair at a time."""
    vectors = dict(zip(operation.experts, tensors[operation.vectors].read(), strict=True))
    stored = next(experts.parameters(recurse=False)).dtype
    forward = experts.forward

    def run(hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        left = weights.clone()
        added = torch.zeros(hidden.shape, dtype=torch.float64)
        for token, chosen in enumerate(indices.tolist()):
            for k, expert in enumerate(chosen):
                if expert in vectors:
                    vector = torch.from_numpy(vectors[expert]).to(stored)  # rounded as the checkpoint is
                    added[token] += weights[token, k].double() * vector.double()
                    left[token, k] = 0
        output: torch.Tensor = forward(hidden, indices, left)
        return output + added.to(output.dtype)

    experts.forward = run


@torch.no_grad()
def _narrow(experts: Any, kept: Any) -> None:
    """Let nothing come of the neurons that are not in `kept` [E, F']."""
    for expert, row in enumerate(kept):
        (down,) = _neuron_views(experts, "down_proj", expert)
        gone = torch.ones(len(down), dtype=torch.bool)
        gone[row[row >= 0].tolist()] = False
        down[gone] = 0


class TokenMask:
    """Knows which tokens of the running forward pass count.

    Those that the 2-D `attention_mask` given to the model excludes do not. `mask` [N, L] (non-zero = count) is for
    callers that pass none to the model; it must then be set before each forward.
    """

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self._current: torch.Tensor | None = None

    def see_mask(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook before the decoder's forward pass."""
        given = kwargs.get("attention_mask")
        mask = self.mask if given is None else given
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if mask is not None and given is not None:
            mask = mask[:, -given.shape[1] :]  # with a cache the mask covers the past too
        self._current = None if mask is None else mask.bool().reshape(-1)

    def unmasked(self, rows: torch.Tensor, entered: torch.Tensor | None = None) -> torch.Tensor:
        """Return those of `rows` [T, ...] whose tokens count.

        `entered`, where tokens skip the layer: the token of each row among all, -1 for a row that is none's.
        """
        if entered is not None:
            counts = entered >= 0
            if self._current is not None:
                counts &= self._current.to(entered.device)[entered.clamp(min=0)]
            return rows[counts]
        if self._current is None:
            return rows
        if len(self._current) != len(rows):
            raise ValueError(f"the mask has {len(self._current)} tokens, the layer runs {len(rows)}")
        return rows[self._current.to(rows.device)]


def entered_tokens(part: Any) -> torch.Tensor | None:
    """Return which token each row is that the FFN of a decoder layer runs, -1 for none; None: all run, in order."""
    for module in (part, *part.children()):
        place = getattr(module, "_depth", None)
        if place is not None and (place.whole or not place.attends):
            rows: torch.Tensor | None = place.rows
            return rows
    return None


class ActiveCount(TokenMask):
    """Distinct experts run, by layer, over the tokens counted so far."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, int] = {}
        self.runs: dict[int, int] = {}

    def means(self) -> dict[int, float]:
        """Mean number of distinct experts that a token ran, by layer."""
        return {layer: self.runs[layer] / tokens for layer, tokens in self.tokens.items() if tokens}

    def _see_experts(self, experts: Any, inputs: Routed, *, layer: int, part: Any) -> None:
        ordered = inputs[1].sort(dim=-1).values  # [T, K]
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        # An index of num_experts means "no expert".
        self._add(layer, new & (ordered < experts.num_experts), entered_tokens(part))

    def _see_scores(self, router: Any, inputs: Any, output: Any, *, layer: int) -> None:
        self._add(layer, output[0] > 0)

    def _add(self, layer: int, runs: torch.Tensor, entered: torch.Tensor | None = None) -> None:
        """Count `runs` [T, any] of the tokens that the mask keeps."""
        runs = self.unmasked(runs, entered)
        self.tokens[layer] = self.tokens.get(layer, 0) + len(runs)
        self.runs[layer] = self.runs.get(layer, 0) + int(runs.sum())


@contextlib.contextmanager
def count_active(model: Any, family: Family) -> Iterator[ActiveCount]:
    """Count the experts that each token runs in the forwards inside, of stock and of Espalier's own models.

    Masked tokens do not count: those that the 2-D `attention_mask` given to the model excludes, else those
    that `ActiveCount.mask` does.
    """
    counter = ActiveCount()
    handles = [decoder(model).register_forward_pre_hook(counter.see_mask, with_kwargs=True)]
    for layer, block in moe_blocks(model, family).items():
        # After the shipped code's own hook, which was registered in __init__: sees what really runs.
        if family.scales_input:  # every expert runs; those without a score on nothing
            router = getattr(block, family.router_module)
            handles.append(router.register_forward_hook(partial(counter._see_scores, layer=layer)))
        else:
            see = partial(counter._see_experts, layer=layer, part=decoder(model).layers[layer])
            handles.append(block.experts.register_forward_pre_hook(see))
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()
