"""The plan: which operation is done to each layer, as a small JSON document; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from espalier.errors import UserError, nearest
from espalier.shape import ModelShape
from espalier.store import read_json, write_json

FORMAT = "espalier.plan/1"
ROUTERS = ("remap", "slice", "tie")


@dataclass(frozen=True)
class Keep:
    """Survivors of a MoE block; the others and their router rows are removed."""

    op: ClassVar[str] = "keep"
    experts: tuple[int, ...]  # source ids, ascending

    def check(self, layer: int, shape: ModelShape) -> None:
        ids = list(self.experts)
        if ids != sorted(set(ids)) or not all(0 <= e < shape.experts for e in ids):
            raise UserError(f"plan, layer {layer}: keep.experts must ascend within 0..{shape.experts - 1}: {ids}.")
        if len(ids) < shape.top_k:
            raise UserError(
                f"plan, layer {layer}: keep leaves {len(ids)} of {shape.experts} experts, but the router picks "
                f"top_k={shape.top_k}. Keep at least {shape.top_k}."
            )
        _check_groups(layer, self.experts, shape, "keep")


@dataclass(frozen=True)
class Merge:
    """Groups of experts, each replaced by the weighted sum of its members' tensors.

    `groups` are ordered by their smallest member and ascend inside; `weights[g][i]` belongs to `groups[g][i]`
    and each group's weights sum to 1. `router`: `remap` keeps all router rows and maps expert ids to groups,
    `slice` keeps the row of the group's smallest member, `tie` keeps the file layout and repeats the
    merged tensors in every member.
    """

    op: ClassVar[str] = "merge"
    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    router: str = "remap"

    def check(self, layer: int, shape: ModelShape) -> None:
        members = sorted(e for group in self.groups for e in group)
        if members != list(range(shape.experts)):
            raise UserError(f"plan, layer {layer}: merge.groups do not hold each of {shape.experts} experts once.")
        if list(self.groups) != sorted(tuple(sorted(group)) for group in self.groups):
            raise UserError(f"plan, layer {layer}: merge.groups must ascend inside and by their smallest member.")
        if self.router not in ROUTERS:
            raise UserError(f"plan, layer {layer}: merge.router={self.router!r}; {nearest(self.router, [*ROUTERS])}.")
        for group, weights in zip(self.groups, self.weights, strict=True):
            if len(group) != len(weights) or abs(sum(weights) - 1) > 1e-6:
                raise UserError(f"plan, layer {layer}: merge.weights of group {list(group)} do not sum to 1.")
        if self.router == "slice" and len(self.groups) < shape.top_k:
            raise UserError(
                f"plan, layer {layer}: merge with router=slice leaves {len(self.groups)} router rows, but the "
                f"router picks top_k={shape.top_k}. Use router=remap or a smaller ratio."
            )
        if self.router == "slice":
            _check_groups(layer, [group[0] for group in self.groups], shape, "merge with router=slice")

    def expert_map(self) -> list[int]:
        """Return the group of each source expert, [E] ints."""
        where = {expert: g for g, group in enumerate(self.groups) for expert in group}
        return [where[e] for e in range(len(where))]


def _check_groups(layer: int, rows: Sequence[int], shape: ModelShape, what: str) -> None:
    """Raise UserError when the router, left with `rows` of its experts, cannot choose by groups any more."""
    size = shape.experts // shape.groups
    left = [sum(row // size == group for row in rows) for group in range(shape.groups)]
    if len(set(left)) > 1:
        raise UserError(
            f"plan, layer {layer}: {what} leaves {left} experts in the {shape.groups} router groups. "
            f"Leave the same number in each{', or use router=remap' if 'slice' in what else ''}."
        )
    problem = _group_problem(left[0], shape)
    if problem:
        raise UserError(f"plan, layer {layer}: {what} leaves {problem}.")


def _group_problem(left: int, shape: ModelShape) -> str:
    """Say what the router misses with `left` experts in each of its groups, if anything."""
    where = f"{left} in each router group, but the router"
    if left < shape.group_least:
        return f"{where} scores a group by its best {shape.group_least}"
    if left * shape.groups_chosen < shape.top_k:
        return f"{where} picks top_k={shape.top_k} from {shape.groups_chosen} of {shape.groups} groups"
    return ""


@dataclass(frozen=True)
class Skip:
    """Dynamic number of experts a token (NAEE, arXiv 2402.14800, section 3.3 and appendix A.2).

    `rule="ratio"` (K = 2): drop the second expert when w2 < beta * w1. `rule="tail"` (any K): keep the
    smallest i with w_{i+1} + ... + w_K <= beta * (w_1 + ... + w_K), weights in descending order.
    What remains is scaled to the sum of all K weights where the model renormalises.
    """

    op: ClassVar[str] = "skip"
    beta: float
    rule: str = "ratio"

    def check(self, layer: int, shape: ModelShape) -> None:
        if self.rule not in ("ratio", "tail"):
            raise UserError(f"plan, layer {layer}: skip.rule={self.rule!r}; known: ratio, tail.")
        if self.rule == "ratio" and shape.top_k != 2:
            raise UserError(f"plan, layer {layer}: skip.rule=ratio needs top_k=2, the model has {shape.top_k}.")
        if shape.top_k < 2:
            raise UserError(
                f"plan, layer {layer}: skip has nothing to leave out, the router picks top_k={shape.top_k}."
            )
        if not 0 <= self.beta <= 1:
            raise UserError(f"plan, layer {layer}: skip.beta={self.beta} lies outside 0..1.")


Operation = Keep | Merge | Skip
OPERATIONS: dict[str, type[Operation]] = {cls.op: cls for cls in (Keep, Merge, Skip)}


@dataclass(frozen=True)
class Plan:
    """What a method decided: operations by decoder layer, and the evidence for the decision."""

    method: dict[str, Any]  # name and settings
    layers: Mapping[int, tuple[Operation, ...]]
    evidence: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # id, revision, family: filled by the stage
    counts: dict[str, float] = field(default_factory=dict)  # stored, unique, active: filled by the stage

    def check(self, shape: ModelShape) -> "Plan":
        """Return self; UserError when an operation does not fit the model."""
        for layer, operations in self.layers.items():
            if layer not in shape.layers:
                raise UserError(f"plan: layer {layer} has no MoE block; layers with one: {list(shape.layers)}.")
            current = shape
            for operation in operations:
                operation.check(layer, current)
                if isinstance(operation, Keep):
                    current = _with_experts(current, len(operation.experts))
        return self

    def experts_after(self, layer: int, shape: ModelShape) -> int:
        """Number of distinct experts that `layer` holds after the plan."""
        experts = shape.experts
        for operation in self.layers.get(layer, ()):
            if isinstance(operation, Keep):
                experts = len(operation.experts)
            elif isinstance(operation, Merge):
                experts = len(operation.groups)
        return experts

    def parameter_counts(self, shape: ModelShape) -> dict[str, float]:
        """Return `stored` and `unique` parameters after the plan, and the most that one token uses (`active`).

        `score` measures the true `active`, which skipping and de-duplication lower.
        """
        stored = unique = float(shape.total_parameters)
        active = shape.active_parameters()
        for layer, operations in self.layers.items():
            for operation in operations:
                if isinstance(operation, Keep):
                    gone = shape.experts - len(operation.experts)
                    rows = gone * shape.router_row_parameters
                    unique -= gone * shape.expert_parameters + rows
                    stored -= gone * shape.expert_parameters + rows
                    active -= rows
                elif isinstance(operation, Merge):
                    gone = self.experts_before(layer, operation, shape) - len(operation.groups)
                    unique -= gone * shape.expert_parameters
                    if operation.router != "tie":
                        stored -= gone * shape.expert_parameters
                    if operation.router == "slice":
                        rows = gone * shape.router_row_parameters
                        stored, unique, active = stored - rows, unique - rows, active - rows
                    active -= max(0, shape.top_k - len(operation.groups)) * shape.expert_parameters
        return {"stored": stored, "unique": unique, "active": active}

    def experts_before(self, layer: int, operation: Operation, shape: ModelShape) -> int:
        """Number of experts that `operation` sees in `layer`."""
        experts = shape.experts
        for earlier in self.layers[layer]:
            if earlier is operation:
                break
            if isinstance(earlier, Keep):
                experts = len(earlier.experts)
        return experts

    def then(self, later: "Plan") -> "Plan":
        """Return the plan that does `self`, then `later`, which was made for the model that `self` leaves.

        Expert ids of the result are the source's. UserError when `later` follows a merge with anything but skip.
        """
        layers: dict[int, tuple[Operation, ...]] = dict(self.layers)
        for layer, operations in later.layers.items():
            done = list(layers.get(layer, ()))
            for operation in operations:
                done = _compose(layer, done, operation)
            layers[layer] = tuple(done)
        evidence: dict[int, dict[str, Any]] = {layer: dict(values) for layer, values in self.evidence.items()}
        for layer, values in later.evidence.items():
            evidence.setdefault(layer, {}).update(values)
        method = dict(self.method) | {"then": later.method}
        return Plan(method, layers, evidence, self.model, later.counts)

    def identified(self, model: dict[str, Any], shape: ModelShape) -> "Plan":
        """Return the plan with the `model` it is for (id, revision, family) and its parameter counts."""
        return replace(self, model=model, counts=self.parameter_counts(shape))

    def document(self) -> dict[str, Any]:
        layers = {
            str(layer): [{"op": operation.op} | asdict(operation) for operation in operations]
            for layer, operations in sorted(self.layers.items())
        }
        return {
            "format": FORMAT,
            "model": self.model,
            "method": self.method,
            "layers": layers,
            "evidence": {str(layer): values for layer, values in sorted(self.evidence.items())},
            "counts": self.counts,
        }

    def save(self, path: Path) -> None:
        write_json(path, self.document())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan; UserError on an unknown format, operation or key."""
        return cls.from_document(read_json(path, FORMAT), str(path))

    @classmethod
    def from_document(cls, document: dict[str, Any], where: str = "plan") -> "Plan":
        layers = {int(layer): tuple(_operation(o, f"{where}, layer {layer}") for o in operations)
                  for layer, operations in document["layers"].items()}  # fmt: skip
        evidence = {int(layer): values for layer, values in document.get("evidence", {}).items()}
        return cls(document["method"], layers, evidence, document.get("model", {}), document.get("counts", {}))


def _compose(layer: int, done: list[Operation], operation: Operation) -> list[Operation]:
    if isinstance(operation, Skip) or not done:
        return [*done, operation]
    if isinstance(operation, Keep) and isinstance(done[-1], Keep):
        return [*done[:-1], Keep(tuple(done[-1].experts[e] for e in operation.experts))]
    raise UserError(
        f"plan, layer {layer}: {operation.op} cannot follow {done[-1].op}; only skip can, or keep after keep."
    )


def _with_experts(shape: ModelShape, experts: int) -> ModelShape:
    return ModelShape.from_document(shape.document() | {"experts": experts})


def _operation(document: dict[str, Any], where: str) -> Operation:
    values = dict(document)
    name = values.pop("op", None)
    if name not in OPERATIONS:
        raise UserError(f"{where}: unknown operation {name!r}; {nearest(str(name), [*OPERATIONS])}.")
    try:
        return OPERATIONS[name](**{key: _tuples(value) for key, value in values.items()})
    except TypeError as error:
        raise UserError(f"{where}: {name}: {error}.") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def survivors(ratio: float, shape: ModelShape, where: str) -> int:
    """Number of experts left when the fraction `ratio` of E is removed: E - round(ratio * E).

    `where` names the key's owner in the error, such as `conf/method/reap.yaml`. UserError when ratio is not
    in (0, 1), removes nothing, leaves fewer experts than the router picks, or does not fit its groups.
    """
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(f"{where}: ratio={ratio} is not a fraction in (0, 1) of experts to remove.")
    left = shape.experts - round(ratio * shape.experts)
    if left < shape.top_k:
        most = (shape.experts - shape.top_k) / shape.experts
        raise UserError(
            f"{where}: ratio={ratio} leaves {left} of {shape.experts} experts, but the router picks "
            f"top_k={shape.top_k}. Use ratio <= {int(most * 1000) / 1000:g}."
        )
    if left == shape.experts:
        raise UserError(
            f"{where}: ratio={ratio} removes none of {shape.experts} experts. Use ratio >= {1 / shape.experts:g}."
        )
    each, rest = divmod(left, shape.groups)
    problem = f"not a multiple of the {shape.groups} router groups" if rest else _group_problem(each, shape)
    if problem:
        sizes = range(shape.groups, shape.experts, shape.groups)
        fits = [n for n in sizes if n >= shape.top_k and not _group_problem(n // shape.groups, shape)]
        ratios = ", ".join(f"{1 - n / shape.experts:g}" for n in sorted(fits, key=lambda n: abs(n - left))[:3])
        remedy = f"Use ratio={ratios}." if ratios else "No ratio suits this router."
        raise UserError(f"{where}: ratio={ratio} leaves {left} experts, {problem}. {remedy}")
    return left
