"""Inner products of experts' residuals, from which the loss of any subset of experts follows."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from espalier.checkpoints.shape import ModelShape
from espalier.collecting.sampling import gram_stride
from espalier.models.observe import BlockTrace
from espalier.probes.probe import Arrays, joined, to_numpy

RESIDUAL_BYTES = 2**22  # of one step's residuals: what a processor's cache holds


class ResidualGram:
    """Inner products that give the error of every expert subset without running it (NAEE, arXiv 2402.14800).

    With y_a the unweighted output of expert a and z the block's routed output (a shared expert cancels), a
    block with new weights w, of sum s, on the experts differs from the old one by
        ||z' - z||^2 = w^T H w + 2 (s - 1) w^T b + (s - 1)^2 |z|^2,   H_ab = <y_a - z, y_b - z>,  b_a = <y_a - z, z>.
    Where the router scales the input of its one expert, y_a = f_a(s_a x) with the scale s_a that it gives expert a
    when that has the largest logit, whichever others there are; w is then 1 for the best kept expert.
    T' is T when E <= 16, else at most 16,384 tokens, evenly strided, and no more than fit into 2^29 bytes: 15,762 of
    128 experts, 4,017 of 256. Products are taken in float64.

    gram float32 [T', E(E+1)/2]: upper triangle of H, row by row.   cross float32 [T', E]: b.
    norm float32 [T']: |z|^2.   logits float32 [T', E].   token int64 [T']: index among all tokens.
    While a model is compressed layer by layer (`espalier.collecting.sequential`) z is the uncompressed model's.
    """

    dense: ClassVar[bool] = False
    merged: ClassVar[bool] = False

    def __init__(self, shape: ModelShape, tokens: int) -> None:
        self.stride = gram_stride(shape.experts, tokens)
        self.upper = torch.triu_indices(shape.experts, shape.experts)
        self.parts: dict[str, list[Tensor]] = {name: [] for name in ("gram", "cross", "norm", "logits", "token")}

    def update(self, trace: BlockTrace) -> None:
        if self.stride > 1:
            trace = trace.rows((trace.token % self.stride == 0).nonzero()[:, 0])
        for part in trace.chunks():
            z, candidates = part.block_output(), part.candidates()  # [T, D], [E, T, D]
            experts, tokens, hidden = candidates.shape
            step = max(1, RESIDUAL_BYTES // (8 * experts * hidden))
            room = z.new_empty(min(step, tokens), experts, hidden)  # touched once: new pages cost more than the sums
            for start in range(0, tokens, step):
                some = slice(start, start + step)
                residual = room[: len(z[some])]
                torch.sub(candidates[:, some].transpose(0, 1), z[some].unsqueeze(1), out=residual)
                gram = residual @ residual.mT  # float64 [T, E, E]
                self.parts["gram"].append(gram[:, self.upper[0], self.upper[1]].float().cpu())
                self.parts["cross"].append((residual @ z[some].unsqueeze(-1))[..., 0].float().cpu())
            rest = {"norm": z.square().sum(-1).float(), "logits": part.logits, "token": part.token}
            for name, value in rest.items():
                self.parts[name].append(value.cpu())

    def result(self) -> Arrays:
        return {name: to_numpy(torch.cat(parts)) for name, parts in self.parts.items()}

    @staticmethod
    def merge(parts: Sequence[Arrays], tokens: Sequence[int]) -> Arrays:
        return joined(parts)
