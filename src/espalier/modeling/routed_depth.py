"""Decoder layers that tokens may skip; made by Espalier.

Shipped beside `modeling_espalier_depth.py` in a checkpoint's directory; needs torch and transformers only. A routed
layer, attention or feed-forward network (FFN) stays the stock module: its class becomes one that lets some tokens in.
It computes in two ways, equal but for rounding:

* `compact` gathers the tokens that enter, runs the stock module on them and scatters what comes out.
* `masked` runs it on all tokens, hides the keys of those that do not enter, and multiplies by zero: gates of tokens
  that do not enter have a gradient too (straight-through).

Keys and values exist for tokens that enter only (`ragged_cache.py`); positions stay those of the whole sequence.

Shapes: B sequences, L tokens of a call, D hidden, R sequences with tokens that enter, M the most of them in one.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .ragged_cache import Pack, RaggedLayer, ragged_layer, visible

IMPLEMENTATIONS = ("sdpa", "eager")
STATES, MASK, CACHE = "hidden_states", "attention_mask", "past_key_values"
ROUTER = "depth_router"


class DepthRouter(nn.Module):
    """Decides which tokens enter a layer; computes in float32, always. `settings` are those of `Depth.settings`.

    After a call `gates` [B, L] is sigmoid(w x + b) (None where nothing is learnt) and `kept` bool [B, L] what entered;
    `predicted` [B, L] are the predictor's logits. They are there for losses and counts.
    """

    straight_through: bool = False
    predict: bool = False  # a top-k router: train its predictor

    def __init__(self, hidden: int, settings: dict[str, Any], number: int) -> None:
        super().__init__()
        self.rule, self.weights = settings["rule"], settings["weights"]
        self.threshold, self.capacity, self.seed = settings["threshold"], settings["capacity"], settings["seed"]
        self.number = number
        sizes = {
            "weight": (hidden,),
            "bias": (1,),
            "first": (settings["hidden"], hidden),
            "second": (settings["hidden"],),
            "offset": (1,),
        }
        for role in settings["tensors"]:
            self.register_parameter(role, nn.Parameter(torch.zeros(sizes[role], dtype=torch.float32)))
        self.gates: Tensor | None = None
        self.kept: Tensor | None = None
        self.predicted: Tensor | None = None

    def forward(self, states: Tensor, call: "Call") -> tuple[Tensor, Tensor | None]:
        """Return which of the tokens `states` [B, L, D] enter, bool [B, L], and what multiplies what they get."""
        states = states.float()
        self.gates = self.predicted = None
        # A model that was cast as a whole (model.half()) has them in that dtype.
        own = {role: parameter.float() for role, parameter in self._parameters.items() if parameter is not None}
        with torch.autocast(states.device.type, enabled=False):
            if "weight" in own:
                self.gates = (functional.linear(states, own["weight"][None])[..., 0] + own["bias"]).sigmoid()
            kept = self._kept(states, call, own)
        if call.real is not None:
            kept = kept & call.real.to(kept.device)  # the layer may lie on another device than the first one
        self.kept = kept
        factor = self.gates if self.weights == "gate" else None
        if self.straight_through and self.gates is not None:
            passed = kept.float() + (self.gates - self.gates.detach())  # kept, with the gradient of the gate
            factor = passed if factor is None else passed * factor
        return kept, factor

    def _kept(self, states: Tensor, call: "Call", own: dict[str, Tensor]) -> Tensor:
        if self.rule == "random":
            chance: Tensor = drawn(call.positions.to(states.device), self.number, self.seed) < self.capacity
            return chance
        if self.rule == "drop":
            return torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        gates = self.gates
        assert gates is not None
        if self.rule == "threshold":
            high: Tensor = gates >= self.threshold
            return high
        best = None
        if self.rule == "top_k" and not call.continued:
            best = largest(gates.detach(), call.real, self.capacity)
        if best is None or self.predict:
            middle = functional.silu(functional.linear(states.detach(), own["first"]))  # its loss changes nothing else
            self.predicted = functional.linear(middle, own["second"][None])[..., 0] + own["offset"]
        if best is not None:
            return best
        assert self.predicted is not None
        return self.predicted > 0


def largest(gates: Tensor, real: Tensor | None, capacity: float) -> Tensor:
    """Return which tokens of each sequence have its largest gates [B, L]: the share `capacity` of the real ones."""
    real = torch.ones_like(gates, dtype=torch.bool) if real is None else real.to(gates.device)
    most = (real.sum(dim=1, keepdim=True) * capacity).round().clamp(min=1)
    ranked = gates.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(gates.shape[1], device=gates.device).expand_as(ranked)
    return torch.zeros_like(real).scatter(1, ranked, place < most)


def drawn(positions: Tensor, layer: int, seed: int) -> Tensor:
    """Return numbers in [0, 1) that look random, the same for a position whenever it is asked for; int64 [B, L]."""
    start = ((layer + 1) * 0x2545F4914F6CDD1D + (seed + 1) * 0x5851F42D4C957F2D) % 2**62
    mixed = positions * 0x1E3779B97F4A7C15 + start
    for shift, factor in ((31, 0x7FB5D329728EA185), (27, 0x1B873593CC9E2D51), (33, 1)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (mixed & 0xFFFFFF).float() / 0x1000000


class Call:
    """What a call of the whole model tells its routed layers: set in front of it.

    `real` bool [B, L] says which tokens are no padding (None: all), `positions` int64 [B, L] counts them within their
    sequence. `continued`: the call was given a cache, so that later tokens are not there to be ranked with.
    """

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.positions = torch.zeros(0)
        self.continued = False

    def watch(self, decoder: nn.Module) -> None:
        """Let the decoder say what it is called with."""
        signature = inspect.signature(type(decoder).forward)

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = signature.bind_partial(module, *args, **kwargs).arguments
            self._read(given | given.get("kwargs", {}))

        decoder.register_forward_pre_hook(note, with_kwargs=True)

    def _read(self, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        states: Tensor = given["inputs_embeds"] if ids is None else ids
        batch, length = states.shape[:2]
        cache, mask = given.get(CACHE), given.get(MASK)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.continued = cache is not None
        if mask is None:
            self.real = None
            self.positions = torch.arange(past, past + length, device=states.device).expand(batch, length)
            return
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < past + length:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"Layers that tokens may skip need an attention mask of {batch} x {past + length} tokens, not {shape}."
            )
        mask = mask[:, : past + length].bool().to(states.device)
        self.positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        self.real = mask[:, past:]


class Routed:
    """Mixed into the class of a stock module, in front of it: some tokens enter, the others go past."""

    backend: str = "auto"  # or `compact`, `masked`
    depth_router: DepthRouter
    _depth: "Place"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock module's forward for the tokens that the router lets in."""
        place = self._depth
        named = STATES in kwargs
        states = kwargs.pop(STATES) if named else args[0]
        kept, factor = self.depth_router(states, place.call)
        masked = self.backend == "masked" or (self.backend == "auto" and self.depth_router.straight_through)
        packs = place.attends and not place.keeps_all
        place.factor, place.kept, place._rows = factor, (None if masked or packs else kept), None
        cache = kwargs.get(CACHE) if packs else None
        layer = None if cache is None else ragged_layer(cache, place.number, place.window)

        forward = super().forward  # type: ignore[misc]

        def stock(inner: Tensor, **changed: Any) -> Tensor:
            given = kwargs | changed | ({STATES: inner} if named else {})
            return _states(forward(*(args if named else (inner, *args[1:])), **given))

        if place.keeps_all:
            place.factor = self._hiding(kept, factor)
            return self._past(stock(states), states, kept)
        if masked:
            if cache is not None:
                raise ValueError("The masked way of a routed layer takes no cache: use_cache=False, or compact.")
            found = self._masked(stock, states, kept, factor)
        elif packs:
            found = self._compact(stock, states, kept, kwargs, layer)
        elif self.depth_router.rule == "drop":
            found = torch.zeros_like(states)
        else:
            found = place.ffn(self, stock, states)
        if layer is not None:
            layer.advance(states.shape[1])
        return (found, None) if place.pair else found

    def _compact(
        self, stock: Any, states: Tensor, kept: Tensor, kwargs: dict[str, Any], layer: RaggedLayer | None
    ) -> Tensor:
        place, pack = self._depth, Pack(kept)
        onto = states if place.whole else torch.zeros_like(states)
        if not pack.counts:
            return onto
        length = states.shape[1]
        changed = {key: _gathered(value, pack, length) for key, value in kwargs.items() if key != CACHE}
        changed[MASK] = self._mask(pack, layer, states.dtype)
        if layer is not None:
            layer.expect(pack)
        place._rows = pack.flat if pack.valid is None else pack.flat.masked_fill(~pack.valid, -1)
        if place.whole and place.factor is not None:
            place.factor = pack.gather(place.factor)
        return pack.scatter(onto, stock(pack.gather(states), **changed))

    def _masked(self, stock: Any, states: Tensor, kept: Tensor, factor: Tensor | None) -> Tensor:
        place = self._depth
        place.factor = self._hiding(kept, factor)
        changed = {}
        if place.attends:
            at = torch.arange(states.shape[1], device=states.device)
            seen = (at <= at[:, None]) & (kept[:, None] | (at == at[:, None]))
            if place.window is not None:
                seen = seen & (at[:, None] - at < place.window)
            changed = {MASK: place.stock_mask(seen[:, None], states.dtype)}
        found: Tensor = stock(states, **changed)
        return self._past(found, states, kept) if place.whole else found

    def _hiding(self, kept: Tensor, factor: Tensor | None) -> Tensor:
        """Return `factor` [B, L] with 0 for tokens that do not enter; straight-through ones have that already."""
        if factor is not None and self.depth_router.straight_through:
            return factor
        return kept.float() * (1.0 if factor is None else factor)

    def _past(self, found: Tensor, states: Tensor, kept: Tensor) -> Tensor:
        """Return a layer's output [B, L, D] of all tokens, with the state of those that do not enter as it was.

        It is so by the factor alone but where a family scales its residual path (MiniMax).
        """
        missed = states
        if self.depth_router.straight_through:  # the value is the state's, the gradient that of entering
            given = found - states
            missed = states + (given - given.detach())
        return torch.where(kept[..., None], found, missed)

    def _mask(self, pack: Pack, layer: RaggedLayer | None, dtype: torch.dtype) -> Tensor | None:
        """Return the stock attention's mask for the tokens of `pack`."""
        place = self._depth
        before = [0] * len(pack.counts) if layer is None else layer.before(pack)
        times = queries = None
        if place.window is not None and (0 if layer is None else layer.seen) + pack.length > place.window:
            queries = pack.index + (0 if layer is None else layer.seen)
            times = queries if layer is None else layer.times_after(pack)
        seen = visible(before, pack, times, queries, place.window)
        if seen is None and place.implementation == "eager" and pack.width > 1:
            seen = torch.ones(1, 1, pack.width, pack.width, dtype=torch.bool, device=pack.device).tril()
        return None if seen is None else place.stock_mask(seen, dtype)


class FollowingFFN:
    """Mixed into the class of an FFN whose layer decides which tokens enter, and whose attention all tokens run."""

    _depth: "Place"

    def forward(self, states: Tensor) -> Any:
        """Run the stock FFN for the tokens that entered the layer."""
        found = self._depth.ffn(self, super().forward, states)  # type: ignore[misc]
        return (found, None) if self._depth.ffn_pair else found


class Place:
    """Where a routed module is in its model.

    `whole`: it is a decoder layer; `attends`: it has attention; `keeps_all`: which all tokens run; `pair`: the module,
    or the layer's FFN, returns its output and something else. `factor` multiplies what the watched modules give next:
    [R, M] of a layer, [B, L] of another module. `kept` are the tokens that an FFN runs which finds them itself, bool
    [B, L]; None: all that it is given.
    """

    # What computes an FFN, [N, D] and bool [N] to [N, D], without `rows`, or None where it cannot: of espalier.kernels
    kernel: Any = None

    def __init__(self, call: Call, config: Any, number: int, layer: dict[str, Any], ffn_pair: bool) -> None:
        granularity = layer["granularity"]
        self.call, self.number, self.config = call, number, config
        self.whole = granularity == "block"
        self.attends = granularity != "ffn"
        self.keeps_all = layer["cache"] == "all"
        self.ffn_pair = ffn_pair
        self.pair = granularity == "attention" or (granularity == "ffn" and ffn_pair)
        self.kept: Tensor | None = None
        self._rows: Tensor | None = None
        self.window = window_of(config, number) if self.attends else None
        self.factor: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The token of each row that the FFN runs, -1 for filling; None: all, in order."""
        if self._rows is None and self.kept is not None:
            self._rows = self.kept.flatten().nonzero()[:, 0]  # on a GPU the host waits: only where it is asked for
        return self._rows

    def ffn(self, module: Any, stock: Any, states: Tensor) -> Tensor:
        """Return what an FFN gives the tokens of `states` [B, L, D] that enter, and 0 for the others."""
        if self.kept is None:
            return _states(stock(states))
        flat = states.reshape(-1, states.shape[-1])
        found: Tensor | None = None if self.kernel is None else self.kernel(module, flat, self.kept.flatten())
        if found is None:
            found, rows = torch.zeros_like(flat), self.rows
            if rows is not None and len(rows):
                found = found.index_copy(0, rows, _states(stock(flat.index_select(0, rows)[None]))[0].to(found.dtype))
        return found.view_as(states)

    @property
    def implementation(self) -> str:
        """The attention implementation; ValueError for one whose masks are not known here."""
        name = str(self.config._attn_implementation)
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"Layers that tokens may skip run with attn_implementation={' or '.join(IMPLEMENTATIONS)}, not {name}."
            )
        return name

    def stock_mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mask as the implementation takes it, of which keys are `seen` [.., 1, M, C]."""
        if self.implementation == "sdpa":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def weigh(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Be the forward hook of a module whose output is weighed."""
        if self.factor is None:
            return output
        first = _states(output)
        factor = self.factor.flatten() if first.dim() == 2 else self.factor
        weighed = first * factor[..., None].to(first.dtype)
        return (weighed, *output[1:]) if isinstance(output, tuple) else weighed


def window_of(config: Any, number: int) -> int | None:
    """Return how many tokens back a layer's attention sees, None for all; ValueError for attention of another kind."""
    types = getattr(config, "layer_types", None)
    kind = None if types is None else types[number]
    if kind not in (None, "full_attention", "sliding_attention"):
        raise ValueError(f"Layer {number} has {kind}, which cannot be left out token by token.")
    window = getattr(config, "sliding_window", None)
    return None if kind == "full_attention" or window is None else int(window)


def route_depth(model: Any, settings: dict[str, Any]) -> None:
    """Let the layers of a live causal language model be skipped as `settings`, those of config.json, say."""
    call = Call()
    call.watch(model.model)
    names, outputs = settings["modules"], settings["outputs"]
    for index, layer in settings["layers"].items():
        number, granularity = int(index), layer["granularity"]
        whole = model.model.layers[number]
        if granularity != "ffn" and not hasattr(whole, names["attention"]):
            raise ValueError(f"Layer {number} has no attention, so that it cannot be left out token by token.")
        module = whole if granularity == "block" else getattr(whole, names[granularity])
        place = Place(call, model.config, number, layer, settings["ffn_pair"])
        for role in ("attention", "ffn") if layer["rule"] != "drop" else ():
            if granularity in ("block", role):
                getattr(whole, outputs[role]).register_forward_hook(place.weigh)
        if layer["rule"] == "drop":
            for kind in (module._modules, module._parameters, module._buffers):
                for name in list(kind):
                    delattr(module, name)
        module.depth_router = DepthRouter(model.config.hidden_size, layer, number)
        _become(module, Routed, place)
        if place.keeps_all:
            _become(getattr(whole, names["ffn"]), FollowingFFN, place)


def _states(output: Any) -> Tensor:
    """Return the hidden states in a module's output, which some pair with something else."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _become(module: Any, kind: type, place: Place) -> None:
    """Mix `kind` into the class of a module, which keeps its name: others look for it."""
    module._depth = place
    stock = type(module)
    module.__class__ = type(stock.__name__, (kind, stock), {})


def _gathered(value: Any, pack: Pack, length: int) -> Any:
    """Return an argument of a layer with the rows of the tokens that enter, where it has a row a token."""
    if isinstance(value, tuple):
        return tuple(_gathered(item, pack, length) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length and len(value) in (1, pack.batch):
        return pack.gather(value)
    return value
