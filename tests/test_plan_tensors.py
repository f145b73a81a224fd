"""The tensors of a plan: kept in memory, made late, written to a file and read back."""

import json
from dataclasses import replace

import numpy as np
import pytest

from espalier.errors import UserError
from espalier.plans.plan import Plan
from espalier.plans.plan_tensors import PlanTensor, fingerprint, load_tensors, save_tensors
from example_plans import example_plan
from stats_factory import make_shape


def tensors():
    rng = np.random.default_rng(0)
    return {"0.down": PlanTensor.of(rng.normal(size=(2, 3, 4))), "0.map": PlanTensor.of(np.arange(6).reshape(2, 3))}


def test_a_file_gives_back_all_values_and_single_rows(tmp_path):
    given = tensors()
    save_tensors(tmp_path / "tensors.safetensors", given)
    found = load_tensors(tmp_path / "tensors.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].read().dtype == (np.float32 if tensor.dtype == "F32" else np.int32)
        np.testing.assert_array_equal(found[name].read(), tensor.read())
        for index in range(2):
            np.testing.assert_array_equal(found[name].row(index), tensor.read()[index])
    assert fingerprint(found) == fingerprint(given)
    assert fingerprint(given | {"0.map": PlanTensor.of(np.zeros((2, 3), int))}) != fingerprint(given)


def test_what_is_made_late_is_made_one_at_a_time(tmp_path):
    made = []

    def make(name):
        return PlanTensor.later("F32", (2,), lambda: made.append(name) or np.array([1.0, len(made)]))

    late = {name: make(name) for name in "ab"}
    assert made == []
    save_tensors(tmp_path / "t.safetensors", late)
    assert made == ["a", "b"]
    assert [load_tensors(tmp_path / "t.safetensors")[name].read()[1] for name in "ab"] == [1, 2]
    with pytest.raises(ValueError, match=r"made \(3,\), announced \(2,\)"):
        PlanTensor.later("F32", (2,), lambda: np.zeros(3)).read()


def test_a_plan_and_its_tensors_lie_side_by_side_or_apart(tmp_path):
    plan = example_plan("mixtral", "constant")
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.safetensors").exists()
    plan.save(tmp_path / "out.json", "plan/tensors.safetensors")
    for name in ("plan.json", "out.json"):
        found = Plan.load(tmp_path / name)
        assert found.layers == plan.layers
        assert fingerprint(found.tensors) == fingerprint(plan.tensors)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(UserError, match=r"plan.safetensors: cannot read the plan's tensors .* Make the plan again"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_without_tensors_names_none(tmp_path):
    example_plan("mixtral", "keep").save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert "tensors" not in json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("kind", ["neurons", "refit", "constant", "narrow"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(kind):
    shape = replace(make_shape(8, layers=(0, 1, 2), hidden=32), width=24)
    plan = example_plan("mixtral", kind)
    plan.check(shape)
    name = next(iter(plan.tensors))
    with pytest.raises(UserError, match=rf"layer {name[0]}: tensor '{name}' of \w+ is missing, needs [FI]32 \["):
        replace(plan, tensors={key: value for key, value in plan.tensors.items() if key != name}).check(shape)
    with pytest.raises(UserError, match=rf"layer {name[0]}: tensor '{name}' of \w+ is F32 \[1\], needs"):
        replace(plan, tensors=plan.tensors | {name: PlanTensor.of(np.zeros(1))}).check(shape)
