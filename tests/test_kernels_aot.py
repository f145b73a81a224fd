"""Kernels compiled for GPUs that are not there: what ships must not spill, must fit, and must use tensor cores."""

import json
import os
import subprocess
import sys

import pytest

from espalier.kernels.aot import FACTS, FORMAT
from espalier.kernels.targets import TARGETS

CHILD = """
import json, sys
from dataclasses import asdict
from espalier.kernels.aot import compiled
from espalier.kernels.shipped import cases
from espalier.kernels.targets import TARGETS
target = TARGETS[sys.argv[1]]
print(json.dumps([asdict(compiled(case, target)) for case in cases(target)]))
"""
PRODUCTS = ("ragged_gate_up", "ragged_matmul", "ragged_outer")
SIZES = {"sm_80": (163 * 1024, 65536), "sm_90": (227 * 1024, 65536), "gfx942": (64 * 1024, 131072)}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_shipped_configurations_compile_as_the_facts_say(target, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, target],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},  # or an older compilation would be read
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    shared_limit, registers_limit = SIZES[target]
    for fact in found:
        where = (fact["kernel"], fact["variant"], fact["constants"], fact["options"])
        assert fact["spilled"] == 0, where
        assert fact["global_atomics"] == 0, where
        assert fact["shared"] <= shared_limit, where
        lanes = 64 if target == "gfx942" else 32
        assert fact["registers"] * lanes * fact["options"]["num_warps"] <= registers_limit, where
        if fact["kernel"] in PRODUCTS:
            tall = fact["constants"]["BM"] >= 64
            wanted = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async" if tall else "mma.sync", "gfx942": "v_mfma"}
            assert fact["tensor_core"] == wanted[target], where
            # Eight warps keep a multiprocessor busy alone; four need company.
            assert fact["blocks"] >= (2 if fact["options"]["num_warps"] < 8 else 1), where
    document = json.loads(FACTS.read_text())
    assert document["format"] == FORMAT
    kept = [fact for fact in document["facts"] if fact["target"] == target]
    assert found == kept, "the kernels or Triton changed: python -m espalier.kernels.aot --write"
