"""The worked example of docs/add_a_method.md, written into a copy of the project as a reader would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of the project with the files that the page shows."""
    for name in ("src", "conf", "workflow", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "environment.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    blocks = re.findall(r"^```\w+\n(# (\S+)\n.*?)^```", (ROOT / "docs/add_a_method.md").read_text(), re.M | re.S)
    assert [path for _, path in blocks] == ["src/espalier/methods/gate_sum.py", "conf/method/gate_sum.yaml"]
    for text, path in blocks:
        (tmp_path / path).write_text(text)
    return tmp_path


def run(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy / "src")}
    return subprocess.run([sys.executable, "-m", *command], cwd=copy, env=environment, capture_output=True, text=True)


def test_the_worked_example_runs_and_is_picked_up_by_the_tests(copy):
    tests = run(copy, "pytest", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", "gate_sum")
    assert tests.returncode == 0, tests.stdout
    assert int(re.search(r"(\d+) passed", tests.stdout).group(1)) > 5
    dry = run(copy, "espalier", "run", "demo", "-n", "sweep=[{method: gate_sum}]")
    assert dry.returncode == 0, dry.stderr
    assert re.search(r"^Job \d+: plan [0-9a-f]{12}: gate_sum 25 %", dry.stdout + dry.stderr, re.M)
