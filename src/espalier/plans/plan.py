"""The plan: which operation is done to each layer, as a small JSON document; imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from espalier.artefacts.store import read_json, write_json
from espalier.checkpoints.shape import DenseShape, ModelShape
from espalier.errors import UserError, nearest
from espalier.plans.depth import Depth, DepthRule
from espalier.plans.narrow_attention import NarrowAttention
from espalier.plans.operations import OPERATIONS, Constant, DenseOperation, Keep, Merge, Narrow, Operation, Skip
from espalier.plans.plan_tensors import PlanTensor, load_tensors, save_tensors
from espalier.plans.split import Split, Threshold

FORMAT = "espalier.plan/1"


@dataclass(frozen=True)
class Plan:
    """What a method decided: operations by decoder layer, and the evidence for the decision."""

    method: dict[str, Any]  # name and settings
    layers: Mapping[int, tuple[Operation, ...]]
    evidence: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # id, revision, family: filled by the stage
    counts: dict[str, float] = field(default_factory=dict)  # stored, unique, active: filled by the stage
    tensors: Mapping[str, PlanTensor] = field(default_factory=dict)  # those that operations name

    def check(self, shape: ModelShape | DenseShape) -> "Plan":
        """Return self; UserError when an operation does not fit the model, or a tensor that it names the operation."""
        for layer, operations in self.layers.items():
            depth_only = all(isinstance(operation, Depth | DepthRule) for operation in operations)
            if layer not in shape.layers and not depth_only:
                what = "FFN" if isinstance(shape, DenseShape) else "MoE block"
                raise UserError(f"plan: layer {layer} has no {what}; layers with one: {list(shape.layers)}.")
            current = shape
            for operation in operations:
                _check_kind(layer, operation, current)
                operation.check(layer, current)  # type: ignore[arg-type]
                for name, (dtype, expected) in operation.tensors(current).items():  # type: ignore[arg-type]
                    found = self.tensors.get(name)
                    if found is None or (found.dtype, found.shape) != (dtype, expected):
                        what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                        raise UserError(
                            f"plan, layer {layer}: tensor {name!r} of {operation.op} {what}, needs {dtype} "
                            f"{list(expected)}. Make the plan again."
                        )
                current = _after(operation, current)
            if len(operations) > 1 and any(isinstance(o, Depth) and o.rule == "drop" for o in operations):
                raise UserError(f"plan, layer {layer}: a part of it is dropped; nothing else can be done to it.")
        return self

    def experts_after(self, layer: int, shape: ModelShape) -> int:
        """Number of distinct experts that `layer` holds after the plan; constants are none."""
        experts = shape.experts
        for operation in self.layers.get(layer, ()):
            if isinstance(operation, Keep):
                experts = len(operation.experts)
            elif isinstance(operation, Merge):
                experts = len(operation.groups)
            elif isinstance(operation, Constant):
                experts -= len(operation.experts)
        return experts

    def parameter_counts(self, shape: ModelShape | DenseShape) -> dict[str, float]:
        """Return `stored` and `unique` parameters after the plan, and the most that one token uses (`active`).

        `score` measures the true `active`, which skipping and de-duplication lower.
        """
        if isinstance(shape, DenseShape):
            return self._dense_counts(shape)
        stored = unique = float(shape.total_parameters)
        active = shape.active_parameters()
        for layer, operations in self.layers.items():
            experts, files = shape.experts, shape.experts  # distinct ones, and those that lie in files
            for operation in operations:
                gone = rows = 0
                if isinstance(operation, Keep):
                    gone = rows = experts - len(operation.experts)
                    files -= gone
                elif isinstance(operation, Merge):
                    gone = experts - len(operation.groups)
                    if operation.router != "tie":
                        files -= gone
                        active -= max(0, shape.top_k - len(operation.groups)) * shape.expert_parameters
                    if operation.router == "slice":
                        rows = gone
                elif isinstance(operation, Constant):
                    gone = len(operation.experts)
                    files -= gone
                    vectors = gone * shape.hidden
                    stored, unique, active = stored + vectors, unique + vectors, active + min(gone, 1) * shape.hidden
                elif isinstance(operation, Depth):
                    more = operation.parameters(layer, shape)
                    stored, unique = stored + more, unique + more
                    active += more if more > 0 else -shape.active_part(layer, operation.granularity)
                elif isinstance(operation, Narrow):
                    narrowed = (shape.width - operation.width) * shape.neuron_parameters
                    stored -= files * narrowed
                    unique -= (experts * shape.width - operation.kept) * shape.neuron_parameters
                    active -= min(shape.top_k, experts) * narrowed
                experts -= gone
                unique -= gone * shape.expert_parameters + rows * shape.router_row_parameters
                active -= rows * shape.router_row_parameters
                stored -= rows * shape.router_row_parameters
            stored -= (shape.experts - files) * shape.expert_parameters
        return {"stored": stored, "unique": unique, "active": active}

    def _dense_counts(self, shape: DenseShape) -> dict[str, float]:
        stored = active = float(shape.total_parameters)
        for layer, operations in self.layers.items():
            for operation in operations:
                if isinstance(operation, Split):
                    router = operation.router_parameters(shape.hidden)
                    stored += router - (shape.width - operation.width) * shape.neuron_parameters
                    active += router - (shape.width - operation.widest) * shape.neuron_parameters
                elif isinstance(operation, NarrowAttention):
                    stored, active = (count + operation.parameters(shape) for count in (stored, active))
                elif isinstance(operation, Depth):
                    stored, active = (count + operation.parameters(layer, shape) for count in (stored, active))
        return {"stored": stored, "unique": stored, "active": active}

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
        clash = sorted(set(self.tensors) & set(later.tensors))
        if clash:
            raise UserError(f"plan: both steps name a tensor {clash[0]!r}. Make one plan for the base model instead.")
        return Plan(method, layers, evidence, self.model, later.counts, dict(self.tensors) | dict(later.tensors))

    def identified(self, model: dict[str, Any], shape: ModelShape | DenseShape) -> "Plan":
        """Return the plan with the `model` it is for (id, revision, family) and its parameter counts."""
        return replace(self, model=model, counts=self.parameter_counts(shape))

    def document(self, tensors: str | None = None) -> dict[str, Any]:
        """Return the JSON document; `tensors` is the file that holds the plan's tensors, relative to the document."""
        layers = {
            str(layer): [{"op": operation.op} | _given(operation) for operation in operations]
            for layer, operations in sorted(self.layers.items())
        }
        return {
            "format": FORMAT,
            "model": self.model,
            "method": self.method,
            "layers": layers,
            "evidence": {str(layer): values for layer, values in sorted(self.evidence.items())},
            "counts": self.counts,
        } | ({} if tensors is None else {"tensors": tensors})

    def save(self, path: Path, tensors: str | None = None) -> None:
        """Write the document, and before it its tensors to `tensors`, relative to its folder (default: beside it)."""
        name = None
        if self.tensors:
            name = tensors or path.with_suffix(".safetensors").name
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path.parent / name, self.tensors)
        write_json(path, self.document(name))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan; UserError on an unknown format, operation or key, and for tensors that are missing."""
        document = read_json(path, FORMAT)
        plan = cls.from_document(document, str(path))
        name = document.get("tensors")
        return plan if name is None else replace(plan, tensors=load_tensors(path.parent / name))

    @classmethod
    def from_document(cls, document: dict[str, Any], where: str = "plan") -> "Plan":
        """Return the plan of a document, without its tensors."""
        layers = {int(layer): tuple(_operation(o, f"{where}, layer {layer}") for o in operations)
                  for layer, operations in document["layers"].items()}  # fmt: skip
        evidence = {int(layer): values for layer, values in document.get("evidence", {}).items()}
        return cls(document["method"], layers, evidence, document.get("model", {}), document.get("counts", {}))


def _compose(layer: int, done: list[Operation], operation: Operation) -> list[Operation]:
    if isinstance(operation, Skip | Threshold | DepthRule) or not done:
        return [*done, operation]
    if isinstance(operation, Depth) and not any(isinstance(o, Depth) for o in done) and operation.rule != "drop":
        return [*done, operation]
    if isinstance(operation, Keep) and isinstance(done[-1], Keep):
        return [*done[:-1], Keep(tuple(done[-1].experts[e] for e in operation.experts))]
    raise UserError(
        f"plan, layer {layer}: {operation.op} cannot follow {done[-1].op}; only skip can, or keep after keep."
    )


def _check_kind(layer: int, operation: Operation, shape: ModelShape | DenseShape) -> None:
    """Raise UserError for an operation on experts where there are none."""
    if isinstance(shape, DenseShape) and not isinstance(operation, DenseOperation | Depth | DepthRule):
        raise UserError(
            f"plan, layer {layer}: {operation.op} is for Mixture-of-Experts models; family {shape.family} is dense."
        )


def _after(operation: Operation, shape: ModelShape | DenseShape) -> ModelShape | DenseShape:
    """Return what the next operation finds."""
    if isinstance(shape, DenseShape):
        return shape
    if isinstance(operation, Keep):
        return replace(shape, experts=len(operation.experts))
    if isinstance(operation, Merge) and operation.router != "tie":
        return replace(shape, experts=len(operation.groups))
    return shape


def _given(operation: Operation) -> dict[str, Any]:
    """Return the operation's fields but those that are not used."""
    return {key: value for key, value in asdict(operation).items() if value is not None}


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
