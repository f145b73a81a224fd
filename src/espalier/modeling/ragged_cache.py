"""A layer of a transformers cache in which every sequence has a number of tokens of its own; made by Espalier.

Shipped beside `modeling_espalier_depth.py` in a checkpoint's directory; needs torch and transformers only. A decoder
layer that tokens may skip has keys and values of those that entered it, and of no others.

Shapes: B sequences, R of them with tokens that enter, L tokens of a call, M the most of them that enter in one
sequence, C cached tokens of the sequence that has most, H key heads, h dimensions of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

NEVER = 2**31 - 1


class Pack:
    """The tokens of a call that enter a layer, gathered to the left: `kept`, bool [B, L].

    `rows` [R] are the sequences that have any, `index` [R, M] the places of their tokens, ascending, then of others
    that fill up; `counts` says how many of a row are no filling. `everything`: all tokens of all sequences enter.
    """

    def __init__(self, kept: Tensor) -> None:
        self.batch, self.length = kept.shape
        each: list[int] = kept.sum(dim=1).tolist()
        self.counts = [count for count in each if count]
        self.width = max(each, default=0)
        self.everything = bool(each) and min(each) == self.length
        self.whole = len(self.counts) == self.batch  # every sequence has some
        self.device = kept.device
        self.row_numbers = [row for row, count in enumerate(each) if count]
        if not self.counts:
            return
        if self.batch == 1:
            self.index = kept[0].nonzero().T
        else:
            order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            self.index = order[self.row_numbers, : self.width]
        self.rows = torch.tensor(self.row_numbers, device=kept.device)
        self.flat = (self.rows[:, None] * self.length + self.index).flatten()  # [R M]
        full = min(self.counts) == self.width
        counts = torch.tensor(self.counts, device=kept.device)
        self.valid = None if full else (torch.arange(self.width, device=kept.device) < counts[:, None]).flatten()

    def gather(self, states: Tensor) -> Tensor:
        """Return [R, M, ...] of `states` [B or 1, L, ...]."""
        if self.everything:
            return states
        if len(states) == 1 and self.batch > 1:
            return states[0][self.index]
        found = states.reshape(self.batch * self.length, *states.shape[2:]).index_select(0, self.flat)
        return found.view(len(self.counts), self.width, *states.shape[2:])

    def scatter(self, onto: Tensor, states: Tensor) -> Tensor:
        """Return `onto` [B, L, D] with `states` [R, M, D] in the places that they were gathered from."""
        if self.everything:
            return states
        rows, places = states.reshape(-1, states.shape[-1]).to(onto.dtype), self.flat
        if self.valid is not None:
            rows, places = rows[self.valid], places[self.valid]
        return onto.reshape(-1, onto.shape[-1]).index_copy(0, places, rows).view_as(onto)


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys [B, H, C, h] and values [B, H, C, h'] of the tokens that entered, of each sequence from the left.

    `lengths` says how many a sequence has, `times`, int32 [B, C], when each came, counted over all tokens of the
    cache, padding included. `seen` is how many tokens the other layers have, which is what masks and positions are
    made by. With a `window` tokens that no later one attends to are dropped.

    The layer is told by `expect` which tokens come and by `advance` that a call is over; `update` is the attention's.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.seen = 0
        self.lengths: list[int] = []
        self.times: Tensor | None = None
        self._coming: Pack | None = None

    @property
    def batch_size(self) -> int:
        """B, or -1 where nothing has come yet."""
        return len(self.lengths) or -1

    def expect(self, pack: Pack) -> None:
        """Take note of the tokens whose keys and values come next."""
        if not self.lengths:
            self.lengths = [0] * pack.batch
        if len(self.lengths) != pack.batch:
            raise ValueError(f"The cache has {len(self.lengths)} sequences, the call {pack.batch}.")
        self._coming = pack

    def advance(self, length: int) -> None:
        """Count the tokens of a call, whether they entered or not."""
        self.seen += length
        self._coming = None

    def before(self, pack: Pack) -> list[int]:
        """Return how many tokens the sequences of `pack` have, [R]."""
        return [self.lengths[row] for row in pack.row_numbers] if self.lengths else [0] * len(pack.counts)

    def times_after(self, pack: Pack) -> Tensor:
        """Return when the keys came that `update` will return, int32 [R, C']; `NEVER` for what is none."""
        before, count = self.before(pack), pack.counts
        width = max(b + c for b, c in zip(before, count, strict=True))
        found = torch.full((len(count), width), NEVER, dtype=torch.int32, device=pack.device)
        if self.times is not None:
            old = self.times[pack.rows][:, :width]
            found[:, : old.shape[1]] = old
        rows, slots, picked = self._places(pack)
        found[rows, slots] = (self.seen + pack.index).to(torch.int32)[picked]
        return found

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the dtype and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [R, H, M, h] of the expected tokens; return those of their sequences [R, H, C', h]."""
        pack = self._coming
        if pack is None:
            raise RuntimeError("Keys came that were not announced: the layer is not the one that this cache is for.")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.before(pack)
        after = list(self.lengths)
        for row, old, new in zip(pack.row_numbers, before, pack.counts, strict=True):
            after[row] = old + new
        even = pack.whole and len(set(before)) == 1 and len(set(pack.counts)) == 1
        times = (self.seen + pack.index).to(torch.int32)
        if even:
            self.keys = _joined(self.keys, key_states)
            self.values = _joined(self.values, value_states)
            self.times = times if self.times is None else torch.cat([self.times, times], dim=1)
        else:
            places = self._places(pack)
            self.keys = self._placed(self.keys, key_states.transpose(1, 2), places, max(after), 0)
            self.values = self._placed(self.values, value_states.transpose(1, 2), places, max(after), 0)
            old_times = None if self.times is None else self.times[:, None, :, None]
            self.times = self._placed(old_times, times[..., None, None], places, max(after), NEVER)[:, 0, :, 0]
        self.lengths = after
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        if not pack.whole:
            width = max(after[row] for row in pack.row_numbers)
            keys, values = keys[pack.rows][:, :, :width], values[pack.rows][:, :, :width]
        if self.window is not None:
            self._forget(self.seen + pack.length)
        return keys, values

    def _places(self, pack: Pack) -> tuple[Tensor, Tensor, Any]:
        """Return, of the tokens that come, row among the R and slot, and what picks them of [R, M]."""
        start = torch.tensor(self.before(pack), device=pack.device)[:, None]
        slots = start + torch.arange(pack.width, device=pack.device)
        valid = torch.ones_like(slots, dtype=torch.bool) if pack.valid is None else pack.valid.view_as(slots)
        return valid.nonzero()[:, 0], slots[valid], valid

    def _placed(
        self, old: Tensor | None, new: Tensor, places: tuple[Tensor, Tensor, Any], width: int, filling: int
    ) -> Tensor:
        """Return [B, H, width, h]: `old` [B, H, C, h] with the tokens of `new` [R, M, H, h] in their slots."""
        assert self._coming is not None
        rows, slots, valid = places
        whole = new.new_full((len(self.lengths), new.shape[2], width, new.shape[3]), filling)
        if old is not None:
            whole[:, :, : old.shape[2]] = old
        whole[self._coming.rows[rows], :, slots] = new[valid]
        return whole

    def _forget(self, now: int) -> None:
        """Drop the slots that lie outside of every sequence's window for the tokens from time `now` on."""
        assert self.window is not None
        assert self.times is not None
        gone = int((self.times <= now - self.window).sum(dim=1).min())
        if gone:
            self._cut(slice(gone, None))
            self.lengths = [length - gone for length in self.lengths]

    def _cut(self, slots: slice) -> None:
        assert self.keys is not None
        assert self.values is not None
        assert self.times is not None
        self.keys, self.values = self.keys[:, :, slots], self.values[:, :, slots]
        self.times = self.times[:, slots]

    def get_seq_length(self) -> int:
        """Return how many tokens have been seen, most of which may not be here."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the masks of layers that have all tokens."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.window)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, a negative number of them, as assisted decoding does."""
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes a negative number of tokens, not {tokens_to_remove}.")
        if tokens_to_remove < 0 and self.window is not None and self.seen >= self.window:
            raise RuntimeError("Tokens cannot be removed from a layer whose sliding window is full.")
        self.seen += tokens_to_remove
        if self.times is not None:
            late = self.times >= self.seen
            self.times = self.times.masked_fill(late, NEVER)
            self.lengths = (~late).sum(dim=1).tolist()
            self._cut(slice(0, max(self.lengths)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` only."""
        if not self.lengths:  # no token has entered yet, whatever sequence it is of
            return
        chosen = torch.arange(len(self.lengths))[indices.cpu()]
        self.lengths = [self.lengths[row] for row in chosen.tolist()]
        if self.times is not None:
            assert self.keys is not None
            assert self.values is not None
            at = chosen.to(self.keys.device)
            self.keys, self.values, self.times = self.keys[at], self.values[at], self.times[at]
            self._cut(slice(0, max(self.lengths)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))


def ragged_layer(cache: Any, number: int, window: int | None) -> RaggedLayer:
    """Return the ragged layer `number` of a transformers cache, put there in place of an empty dynamic one.

    ValueError for a cache whose layers do not grow (static, quantised, offloaded), or that another model has filled.
    """
    if getattr(cache, "offloading", False) or not hasattr(cache, "layers"):
        raise ValueError("Layers that tokens may skip need a DynamicCache that is not offloaded.")
    while len(cache.layers) <= number:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[number]
    if isinstance(layer, RaggedLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
        raise ValueError(
            f"Layers that tokens may skip need a new DynamicCache; layer {number} of this one is a "
            f"{type(layer).__name__} of {layer.get_seq_length()} tokens."
        )
    ragged = RaggedLayer(window)
    cache.layers[number] = ragged
    return ragged


def visible(before: Sequence[int], pack: Pack, times: Tensor | None, queries: Tensor | None, window: int | None) -> Any:
    """Return which keys a query sees, bool [R, 1, M, C'], or None where that is the plain causal rule.

    A query sees the keys of its sequence that lie before it, `before` cached ones among them, and itself; with a
    `window` only those that came less than so many tokens before it (`times` int32 [R, C'], `queries` [R, M]).
    """
    narrow = times is not None and queries is not None and window is not None
    plain = len(set(before)) == 1 and (before[0] == 0 or pack.width == 1)
    if plain and not narrow:
        return None
    start = torch.tensor(before, device=pack.device)[:, None, None]
    width = max(b + c for b, c in zip(before, pack.counts, strict=True))
    slots = torch.arange(width, device=pack.device)
    seen = slots <= start + torch.arange(pack.width, device=pack.device)[:, None]
    if times is not None and queries is not None and window is not None:
        own = slots == start + torch.arange(pack.width, device=pack.device)[:, None]
        seen = seen & ((queries[:, :, None] - times[:, None, :].long() < window) | own)
    return seen[:, None]


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=2)
