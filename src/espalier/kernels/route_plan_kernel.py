"""The device code of the route plan: what one program of it does.

Shapes: BT tokens at once, K slots a token and K2 the next power of 2, E2 of router rows, BINS of experts and one more.
"""

from espalier.kernels.jit import jit, tl


@jit
def _weights_by_rule(weight, probability, valid, RULE: tl.constexpr, value, total, RESCALE: tl.constexpr):
    """Which slots run and with what weights; all [BT, K]."""
    if RULE == 0:
        kept = valid
    else:
        slot = tl.arange(0, weight.shape[1])
        ahead = (weight[:, None, :] > weight[:, :, None]) | (
            (weight[:, None, :] == weight[:, :, None]) & (slot[None, None, :] < slot[None, :, None])
        )
        ahead = ahead & valid[:, None, :]  # [BT, j, i]: i comes before j in the order of falling weight
        rank = tl.sum(ahead.to(tl.int32), axis=2)
        first = rank == 0
        if RULE == 1:
            best = tl.max(tl.where(valid, weight, 0.0), axis=1)
            kept = weight >= value * best[:, None]
        elif RULE == 2:
            whole = tl.sum(tl.where(valid, weight, 0.0), axis=1)
            tail = whole[:, None] - tl.sum(tl.where(ahead, weight[:, None, :], 0.0), axis=2)
            kept = tail > value * whole[:, None]
        elif RULE == 3:
            before = tl.sum(tl.where(ahead, probability[:, None, :], 0.0), axis=2)
            kept = (before < value) | (value >= 1.0)
        else:
            kept = rank < value
        kept = valid & (kept | first)
        if RESCALE:
            left = tl.sum(tl.where(kept, weight, 0.0), axis=1)
            skips = tl.sum((valid & ~kept).to(tl.int32), axis=1) > 0
            left = tl.where(left > 0, left, 1.0)
            weight = tl.where(skips[:, None], weight / left[:, None] * total, weight)
    return kept, weight


@jit
def _chosen(
    scores,
    correction,
    token,
    tokens,
    rows,
    scale,
    K: tl.constexpr,
    K2: tl.constexpr,
    E2: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """The top K of `rows` router rows for the tokens `token` [BT]: rows, weights and probabilities, [BT, K2]."""
    column = tl.arange(0, E2)
    mask = (token < tokens)[:, None] & (column < rows)[None, :]
    logit = tl.load(scores + token.to(tl.int64)[:, None] * rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if SIGMOID:
        probability = 1.0 / (1.0 + tl.exp(-logit))
    else:
        logit = tl.where((column < rows)[None, :], logit, float("-inf"))
        power = tl.exp(logit - tl.max(logit, axis=1)[:, None])
        probability = power / tl.sum(power, axis=1)[:, None]
    by = probability
    if CORRECTED:
        by += tl.load(correction + column, mask=column < rows, other=0.0).to(tl.float32)[None, :]
    by = tl.where((column < rows)[None, :], by, float("-inf"))
    slot = tl.arange(0, K2)
    chosen = tl.zeros((token.shape[0], K2), tl.int32) + rows
    found = tl.zeros((token.shape[0], K2), tl.float32)
    for j in tl.static_range(K):
        best = tl.argmax(by, axis=1)
        here = column[None, :] == best[:, None]
        value = tl.sum(tl.where(here, probability, 0.0), axis=1)
        chosen = tl.where((slot == j)[None, :], best[:, None].to(tl.int32), chosen)
        found = tl.where((slot == j)[None, :], value[:, None], found)
        by = tl.where(here, float("-inf"), by)
    weight = found
    if NORMED:
        weight = weight / tl.sum(weight, axis=1)[:, None]
    return chosen, weight * scale, found


@jit
def _slots(
    scores,
    correction,
    indices,
    weights,
    expert_map,
    token,
    tokens,
    rows,
    experts,
    scale,
    value,
    total,
    K: tl.constexpr,
    K2: tl.constexpr,
    E2: tl.constexpr,
    SCORED: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    NORMED: tl.constexpr,
    MAPPED: tl.constexpr,
    JOINED: tl.constexpr,
    RULE: tl.constexpr,
    RESCALE: tl.constexpr,
):
    """The stored expert (`experts`: none) and weight of each slot of the tokens `token` [BT], both [BT, K2]."""
    slot = tl.arange(0, K2)
    there = (token < tokens)[:, None] & (slot < K)[None, :]
    if SCORED:
        row, weight, probability = _chosen(
            scores, correction, token, tokens, rows, scale, K, K2, E2, SIGMOID, CORRECTED, NORMED
        )
    else:
        place = token.to(tl.int64)[:, None] * K + slot[None, :]
        row = tl.load(indices + place, mask=there, other=rows).to(tl.int32)
        weight = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
        probability = weight
    valid = there & (row >= 0) & (row < rows)
    kept, weight = _weights_by_rule(weight, probability, valid, RULE, value, total, RESCALE)
    expert = row
    if MAPPED:
        expert = tl.load(expert_map + row, mask=valid, other=experts).to(tl.int32)
        kept = kept & (expert < experts)
    if JOINED:
        same = (expert[:, :, None] == expert[:, None, :]) & kept[:, None, :]
        earlier = same & (slot[None, None, :] < slot[None, :, None])
        weight = tl.sum(tl.where(same, weight[:, None, :], 0.0), axis=2)
        kept = kept & (tl.sum(earlier.to(tl.int32), axis=2) == 0)
    return tl.where(kept, expert, experts), tl.where(kept, weight, 0.0)


@jit
def place(
    scores,
    correction,
    indices,
    weights,
    expert_map,
    row_token,
    row_weight,
    offsets,
    slot_row,
    tile_expert,
    tile_row,
    tokens,
    rows,
    experts,
    tiles,
    scale,
    value,
    total,
    own_tokens,  # of one program, a multiple of PLACED
    own_tiles,
    K: tl.constexpr,
    K2: tl.constexpr,
    E2: tl.constexpr,
    BINS: tl.constexpr,
    COUNTED: tl.constexpr,
    PLACED: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    SCORED: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    NORMED: tl.constexpr,
    MAPPED: tl.constexpr,
    JOINED: tl.constexpr,
    RULE: tl.constexpr,
    RESCALE: tl.constexpr,
):
    """One program's part of a plan: it counts all rows, then places those of its own tokens and maps its tiles."""
    pid = tl.program_id(0)
    begin = pid * own_tokens
    end = min(begin, tokens)  # a bound of masks only: the compiler must see how the loops' tokens are aligned
    before = tl.zeros((BINS,), tl.int32)
    for start in range(0, end, COUNTED):
        token = start + tl.arange(0, COUNTED)
        expert, _ = _slots(
            scores, correction, indices, weights, expert_map, token, end, rows, experts, scale, value, total,
            K, K2, E2, SCORED, SIGMOID, CORRECTED, NORMED, MAPPED, JOINED, RULE, RESCALE,
        )  # fmt: skip
        before += tl.histogram(tl.reshape(expert, (COUNTED * K2,)), BINS)
    counts = before
    for start in range(begin, tokens, COUNTED):
        token = start + tl.arange(0, COUNTED)
        expert, _ = _slots(
            scores, correction, indices, weights, expert_map, token, tokens, rows, experts, scale, value, total,
            K, K2, E2, SCORED, SIGMOID, CORRECTED, NORMED, MAPPED, JOINED, RULE, RESCALE,
        )  # fmt: skip
        counts += tl.histogram(tl.reshape(expert, (COUNTED * K2,)), BINS)
    bins = tl.arange(0, BINS)
    counts = tl.where(bins < experts, counts, 0)  # the last bin holds the slots of no expert
    ends = tl.cumsum(counts, axis=0)
    starts = ends - counts
    if pid == 0:
        tl.store(offsets + 1 + bins, ends, mask=bins < experts)
        tl.store(offsets + bins, tl.zeros((BINS,), tl.int32), mask=bins == 0)

    expert_tiles = (counts + BM - 1) // BM
    tile_ends = tl.cumsum(expert_tiles, axis=0)
    tile_starts = tile_ends - expert_tiles
    for start in range(0, own_tiles, TILES):
        tile = pid * own_tiles + start + tl.arange(0, TILES)
        expert = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)  # BINS: beyond the last
        here = bins[None, :] == expert[:, None]
        first = tl.sum(tl.where(here, starts[None, :] - tile_starts[None, :] * BM, 0), axis=1) + tile * BM
        used = expert < experts
        inside = (tile < tiles) & (tile < (pid + 1) * own_tiles)
        tl.store(tile_expert + tile, tl.where(used, expert, -1), mask=inside)
        tl.store(tile_row + tile, tl.where(used, first, -1), mask=inside)

    base = starts + before
    for start in range(begin, min(begin + own_tokens, tokens), PLACED):
        token = start + tl.arange(0, PLACED)
        expert, weight = _slots(
            scores, correction, indices, weights, expert_map, token, tokens, rows, experts, scale, value, total,
            K, K2, E2, SCORED, SIGMOID, CORRECTED, NORMED, MAPPED, JOINED, RULE, RESCALE,
        )  # fmt: skip
        expert = tl.reshape(expert, (PLACED * K2,))
        weight = tl.reshape(weight, (PLACED * K2,))
        one_hot = (expert[:, None] == bins[None, :]) & (bins < experts)[None, :]
        ones = one_hot.to(tl.int32)
        upto = tl.cumsum(ones, axis=0)
        place = tl.sum(tl.where(one_hot, upto - 1 + base[None, :], 0), axis=1)
        base += tl.sum(ones, axis=0)
        slot = tl.arange(0, PLACED * K2)
        of = start + slot // K2
        inside = (of < tokens) & (slot % K2 < K)
        runs = inside & (expert < experts)
        tl.store(row_token + place, of, mask=runs)
        tl.store(row_weight + place, weight, mask=runs)
        tl.store(slot_row + of.to(tl.int64) * K + slot % K2, tl.where(runs, place, -1), mask=inside)


@jit
def choose(
    scores,
    correction,
    indices,
    weights,
    tokens,
    rows,
    scale,
    K: tl.constexpr,
    K2: tl.constexpr,
    E2: tl.constexpr,
    BT: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """The top K of router rows for one program's tokens."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    row, weight, _ = _chosen(scores, correction, token, tokens, rows, scale, K, K2, E2, SIGMOID, CORRECTED, NORMED)
    slot = tl.arange(0, K2)
    mask = (token < tokens)[:, None] & (slot < K)[None, :]
    place = token.to(tl.int64)[:, None] * K + slot[None, :]
    tl.store(indices + place, row, mask=mask)
    tl.store(weights + place, weight, mask=mask)
