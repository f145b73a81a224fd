"""Route plan: from what a router chose to the ragged rows that experts compute, in one launch.

Rows are sorted by expert, and stably by token and slot within one. A chosen pair that a rule skips, or that names no
expert, has no row; two picks of one token that an expert map sends to the same expert have one row, with the sum of
their weights. Programs do not wait for each other: each counts the rows of all tokens (from which follow the experts'
first rows and those of the tokens before its own), then places its own. Nothing is atomic but counts in a program's own
shared memory, nothing is read back by the host, and all sizes but T are fixed, so that a CUDA graph can hold it. The
repeated counting costs P reads of T x K indices for P <= 64 programs: 128 MB from the second-level cache at 262,144
slots, where the experts' products take milliseconds.

Shapes: T tokens, K slots a token, E stored experts, R <= T K rows, BM rows a tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.errors import UserError
from espalier.kernels import route_plan_kernel
from espalier.kernels.jit import power_of_2, runs_on

ONE_LAUNCH_SLOTS = 4096  # of scores: above, the choice has a launch of its own
PROGRAMS = 64  # at most
RULES = {None: 0, "ratio": 1, "tail": 2, "top_p": 3, "fixed_k": 4}


@dataclass(frozen=True)
class SkipRule:
    """Which of a token's picks run, by weights that fall: w_1 >= w_2 >= ... (the first always does).

    `ratio`: w_j >= value w_1 (NAEE, arXiv 2402.14800, section 3.3). `tail`: w_j + ... + w_K > value (w_1 + ... + w_K)
    (appendix A.2). `top_p`: the probabilities before it add up to less than value (arXiv 2403.07652); only for plans
    from scores. `fixed_k`: j <= value. With a `total` the weights of a token that skips are scaled to that sum.
    """

    rule: str | None = None
    value: float = 0.0
    total: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"skip rule {self.rule!r}: unknown. Use one of {[rule for rule in RULES if rule]}.")


NO_SKIP = SkipRule()


@dataclass(frozen=True)
class RoutePlan:
    """The ragged rows of one MoE block and the tiles that compute them; what lies beyond R and the tiles used is unset.

    row_token int32 [T K], row_weight float32 [T K]: the token and weight of each row.
    offsets int32 [E + 1]: where each expert's rows begin; the last is R.
    slot_row int32 [T, K]: the row of each slot, -1 for none.
    tile_expert int32 [tiles], tile_row int32 [tiles]: the expert and first row of each tile, -1 for tiles not used.
    """

    row_token: Tensor
    row_weight: Tensor
    offsets: Tensor
    slot_row: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    block_m: int

    @property
    def experts(self) -> int:
        """Return E."""
        return len(self.offsets) - 1

    @property
    def tiles(self) -> int:
        """Return the number of tiles that there may be."""
        return len(self.tile_expert)


def tiles_at_most(slots: int, experts: int, block_m: int) -> int:
    """Return how many tiles of `block_m` rows the rows of `slots` slots can need, at least 1."""
    return max(1, min(slots, slots // block_m + experts))


def plan(
    indices: Tensor,
    weights: Tensor,
    experts: int,
    block_m: int,
    *,
    rows: int | None = None,
    expert_map: Tensor | None = None,
    skip: SkipRule = NO_SKIP,
    distinct: bool = False,
) -> RoutePlan:
    """Return the rows for picks `indices` int [T, K] with `weights` [T, K]; an index outside 0 .. rows - 1 is none.

    `rows` of the router, `experts` of them by default; `expert_map` int [rows] sends each to a stored expert, beyond
    which there is none. `distinct` says that no two picks of a token are of one expert, so that none are joined.
    UserError for the rule `top_p`, which needs probabilities among all experts.
    """
    if skip.rule == "top_p":
        raise UserError("skip rule 'top_p' looks at all experts' probabilities. Make the plan from the scores.")
    rows = experts if rows is None else rows
    if not runs_on(indices.device):
        return reference(indices, weights, experts, block_m, rows=rows, expert_map=expert_map, skip=skip)
    found = {"JOINED": not distinct}
    return _launch(
        None, None, indices.contiguous(), weights.contiguous(), experts, block_m, rows, expert_map, skip, found
    )


def plan_from_scores(
    scores: Tensor,
    k: int,
    experts: int,
    block_m: int,
    *,
    function: str = "softmax",
    correction: Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    expert_map: Tensor | None = None,
    skip: SkipRule = NO_SKIP,
) -> RoutePlan:
    """Return the rows of the `k` best experts of each token, for a router's logits `scores` [T, rows].

    The weights are `scale` times the probabilities by `function`, softmax or sigmoid, divided by their sum if
    `renormalise`. The choice is by the probabilities plus `correction` [rows] (DeepSeek-V3); of equal ones the first.
    """
    settings = {"SIGMOID": function == "sigmoid", "CORRECTED": correction is not None, "NORMED": renormalise}
    tokens, rows = scores.shape
    if not runs_on(scores.device):
        indices, weights, probability = choose(scores, k, function, correction, renormalise, scale)
        return reference(
            indices, weights, experts, block_m, rows=rows, expert_map=expert_map, skip=skip, probability=probability
        )
    scores = scores.contiguous()
    if tokens * k <= ONE_LAUNCH_SLOTS or skip.rule == "top_p":
        slots = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
        settings["SCORED"] = True
        return _launch(
            scores, correction, slots, None, experts, block_m, rows, expert_map, skip, settings | {"scale": scale}
        )
    indices = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=scores.device)
    sizes = {"K": k, "K2": power_of_2(k), "E2": power_of_2(rows), "BT": max(1, 2048 // power_of_2(rows))}
    grid = (-(-tokens // sizes["BT"]),)
    with torch.cuda.device_of(scores):
        route_plan_kernel.choose[grid](
            scores, _or(correction, scores), indices, weights, tokens, rows, scale, **sizes, **settings, num_warps=4
        )
    return _launch(None, None, indices, weights, experts, block_m, rows, expert_map, skip, {})


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor for a pointer that the kernel does not follow where `tensor` is None."""
    return other if tensor is None else tensor


def place_settings(slots_a_token: int, rows: int, experts: int, *, paired: bool = True) -> dict[str, int]:
    """Return the sizes that `place` is compiled for: tokens counted and placed at once, tiles mapped at once.

    `paired`: the picks of a token are compared with each other.
    """
    k2, bins = power_of_2(slots_a_token), power_of_2(experts + 1)
    each = k2 * k2 if paired else k2
    # With one expert and one slot, a token for each of the 256 threads: the compiler spills otherwise.
    placed = max(1, min(256 if bins * k2 == 2 else 64, 2048 // (k2 * max(bins, each))))
    return {
        "K": slots_a_token,
        "K2": k2,
        "E2": power_of_2(rows),
        "BINS": bins,
        "COUNTED": min(512, max(1, 4096 // each)),
        "PLACED": placed,
        "TILES": max(1, min(64, 2048 // bins)),
    }


def counted_from_scores(sizes: dict[str, int]) -> int:
    """Return how many tokens are counted at once where their experts are chosen in passing."""
    return min(sizes["COUNTED"], max(1, 4096 // sizes["E2"]))


def _launch(
    scores: Tensor | None,
    correction: Tensor | None,
    indices: Tensor,
    weights: Tensor | None,
    experts: int,
    block_m: int,
    rows: int,
    expert_map: Tensor | None,
    skip: SkipRule,
    chosen: Mapping[str, float],
) -> RoutePlan:
    tokens, k = indices.shape
    device = indices.device
    joined = bool(chosen.get("JOINED", True)) and k > 1
    sizes = place_settings(k, rows, experts, paired=joined or skip.rule is not None)
    if scores is not None:
        sizes["COUNTED"] = counted_from_scores(sizes)
    sizes["COUNTED"] = min(sizes["COUNTED"], power_of_2(max(1, tokens)))
    blocks = max(1, -(-tokens // sizes["PLACED"]))
    programs = min(PROGRAMS, blocks)
    tiles = tiles_at_most(tokens * k, experts, block_m)
    found = _empty(tokens, k, experts, tiles, block_m, device)
    with torch.cuda.device_of(indices):
        route_plan_kernel.place[(programs,)](
            _or(scores, indices),
            _or(correction, indices),
            indices,
            _or(weights, indices),
            _or(expert_map, indices),
            found.row_token,
            found.row_weight,
            found.offsets,
            found.slot_row,
            found.tile_expert,
            found.tile_row,
            tokens,
            rows,
            experts,
            tiles,
            float(chosen.get("scale", 1.0)),
            float(skip.value),
            float(skip.total or 0.0),
            -(-blocks // programs) * sizes["PLACED"],
            -(-tiles // programs),
            **sizes,
            BM=block_m,
            SCORED=scores is not None,
            SIGMOID=bool(chosen.get("SIGMOID", False)),
            CORRECTED=bool(chosen.get("CORRECTED", False)),
            NORMED=bool(chosen.get("NORMED", False)),
            MAPPED=expert_map is not None,
            JOINED=joined,
            RULE=RULES[skip.rule],
            RESCALE=skip.total is not None,
            num_warps=8,
            num_stages=1,
        )
    return found


def _empty(tokens: int, k: int, experts: int, tiles: int, block_m: int, device: torch.device) -> RoutePlan:
    """Return a plan whose tensors are unset pieces of one allocation."""
    slots = tokens * k
    sizes = [slots, slots, slots, experts + 1, tiles, tiles]
    pieces = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    row_token, row_weight, slot_row, offsets, tile_expert, tile_row = pieces
    weights = row_weight.view(torch.float32)
    return RoutePlan(row_token, weights, offsets, slot_row.view(tokens, k), tile_expert, tile_row, block_m)


def choose(
    scores: Tensor, k: int, function: str, correction: Tensor | None, renormalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the picks int64 [T, k], their weights and their probabilities float32 [T, k], in plain torch."""
    probability = scores.float().sigmoid() if function == "sigmoid" else scores.float().softmax(dim=-1)
    by = probability if correction is None else probability + correction.float()
    indices = by.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    found = probability.gather(1, indices)
    weights = found / found.sum(dim=-1, keepdim=True) if renormalise else found
    return indices, weights * scale, found


def reference(
    indices: Tensor,
    weights: Tensor,
    experts: int,
    block_m: int,
    *,
    rows: int | None = None,
    expert_map: Tensor | None = None,
    skip: SkipRule = NO_SKIP,
    probability: Tensor | None = None,
) -> RoutePlan:
    """Return what `plan` does, in plain torch; `probability` [T, K] among all experts is for the rule `top_p`."""
    tokens, k = indices.shape
    rows = experts if rows is None else rows
    weight, valid = weights.float(), (indices >= 0) & (indices < rows)
    kept = valid
    if skip.rule is not None:
        falling, order = weight.masked_fill(~valid, -1.0).sort(dim=-1, descending=True, stable=True)
        back = order.argsort(dim=-1)
        falling = falling.clamp(min=0.0)
        if skip.rule == "ratio":
            runs = falling >= skip.value * falling[:, :1]
        elif skip.rule == "tail":
            runs = falling.sum(-1, keepdim=True) - falling.cumsum(-1) + falling > skip.value * falling.sum(-1, True)
        elif skip.rule == "top_p":
            likely = (weight if probability is None else probability).masked_fill(~valid, 0.0).gather(1, order)
            runs = (likely.cumsum(-1) - likely < skip.value) | (skip.value >= 1.0)
        else:
            runs = torch.arange(k, device=weight.device).expand_as(weight) < skip.value
        runs = runs.clone()
        runs[:, :1] = True
        kept = valid & runs.gather(1, back)
        if skip.total is not None:
            left = (weight * kept).sum(-1, keepdim=True)
            weight = torch.where((valid & ~kept).any(-1, True), weight / left * skip.total, weight)
    expert = indices.long()
    if expert_map is not None:
        expert = expert_map.long()[expert.clamp(0, rows - 1)]
        kept = kept & (expert < experts)
    same = (expert[:, :, None] == expert[:, None, :]) & kept[:, None, :]  # [T, K, K]
    weight = (same * weight.masked_fill(~kept, 0.0)[:, None, :]).sum(-1)
    kept = kept & ~same.tril(diagonal=-1).any(-1)
    expert = expert.masked_fill(~kept, experts)

    order = expert.flatten().argsort(stable=True)
    counts = expert.flatten().bincount(minlength=experts + 1)[:experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    slot_row = order.argsort().view(tokens, k).masked_fill(~kept, -1)
    tiles = tiles_at_most(tokens * k, experts, block_m)
    expert_tiles = (counts + block_m - 1) // block_m
    tile_expert = torch.arange(experts, device=counts.device).repeat_interleave(expert_tiles)
    first = (expert_tiles.cumsum(0) - expert_tiles)[tile_expert]
    tile_row = offsets[tile_expert] + (torch.arange(len(tile_expert), device=counts.device) - first) * block_m
    unused = counts.new_full((tiles - len(tile_expert),), -1)
    return RoutePlan(
        row_token=(order // k).int(),
        row_weight=weight.flatten()[order],
        offsets=offsets.int(),
        slot_row=slot_row.int(),
        tile_expert=torch.cat([tile_expert, unused]).int(),
        tile_row=torch.cat([tile_row, unused]).int(),
        block_m=block_m,
    )
