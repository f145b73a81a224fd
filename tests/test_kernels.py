"""Triton kernels under the interpreter, each group of cases in a process of its own (kernel_cases.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "kernel_cases.py"
GROUPS = (
    "plans", "scores", "blocks", "poison", "counted", "neurons", "gradients", "models", "sparse", "depth", "tuned",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels_equal_plain_loops(group):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(CASES), group],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, (run.stdout[-500:] + run.stderr)[-3000:]
    assert run.stdout.strip()
