"""Rules of the code base that a reader relies on, checked over all files."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from espalier import conf
from espalier.methods import build

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src/espalier").rglob("*.py"))
METHODS = [name for name in conf.names("method") if name != "none"]


def imports(path):
    """Top-level names that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_file_instantiates(name):
    config = conf.load("method", name)
    assert config["name"] == name
    method = build(config)
    assert isinstance(method.probes, tuple)


def test_every_group_file_has_its_name_and_every_model_its_keys():
    for group in ("method", "calibration", "evaluation"):
        for name in conf.names(group):
            assert conf.load(group, name)["name"] == name, f"{group}/{name}"
    for name in conf.names("model"):
        assert {"id", "revision", "dtype"} <= set(conf.load("model", name)), name


def test_hydra_composes_in_one_file_and_wandb_logs_from_one():
    assert [p.name for p in SOURCES if "hydra" in imports(p)] == ["sweep.py"]
    assert [p.name for p in SOURCES if "wandb" in imports(p)] == ["tracking.py"]
    assert not [p.name for p in SOURCES if "hydra.main" in p.read_text()]


def test_no_pickle():
    for path in SOURCES:
        found = set(imports(path)) & {"pickle", "joblib", "shelve", "dill", "cloudpickle"}
        assert not found, path
        assert not re.search(r"torch\.(save|load)\(|np\.load\((?!.*allow_pickle=False)", path.read_text()), path


# From what all use to what uses all: a package's files import from those before it and from its own row.
LAYERS = (
    "errors", "conf", "progress", "tracking", "artefacts", "machine", "modeling", "inputs",
    ("checkpoints", "families", "dense_families"), "kernels", "plans", "models", "surgery", ("collecting", "probes"),
    "costs", "training", "methods", "fits", "scoring", "timing", "workflow", "tables", "figures", "report",
    ("stages", "oneshot", "embedded"), "doctor", "commands", ("cli", "__main__", "__init__"),
)  # fmt: skip


def test_packages_import_from_the_layers_below_them():
    place = {name: i for i, row in enumerate(LAYERS) for name in ([row] if isinstance(row, str) else row)}
    own = ROOT / "src/espalier"
    assert {p.stem for p in own.glob("*.py")} | {p.parent.name for p in own.glob("*/__init__.py")} == set(place)
    upward = []
    for path in SOURCES:
        here = path.relative_to(own).parts[0].removesuffix(".py")
        for target in loaded(ast.parse(path.read_text())):
            if place[target] > place[here]:
                upward.append(f"{path.relative_to(own)} imports {target}")
    assert not upward


def loaded(tree):
    """Parts of Espalier that a module imports when it is imported itself: not those that its functions import."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("espalier."))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "espalier":
            yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("espalier."):
            yield node.module.split(".")[1]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [] if is_for_types(node) else ast.iter_child_nodes(node)


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_shipped_code_needs_nothing_of_ours():
    for path in sorted((ROOT / "src/espalier/modeling").glob("*.py")):
        assert set(imports(path)) <= sys.stdlib_module_names | {"torch", "transformers"}, path


def test_files_are_one_thing():
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "core", "base", "common", "misc")]
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_public_functions_say_what_they_do():
    silent = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path.name}:{node.name}")
    assert not silent


def test_nothing_left_undone():
    for path in [*SOURCES, *(ROOT / "workflow").rglob("*.smk"), ROOT / "Snakefile"]:
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text()), path


def test_conda_environment_and_lock_agree():
    lock = (ROOT / "requirements.lock").read_text().split()
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"] == lock
    assert all("==" in pin for pin in lock)


def test_every_dependency_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    locked = {pin.split("==")[0].lower().replace("_", "-") for pin in (ROOT / "requirements.lock").read_text().split()}
    names = {re.split(r"[<>=\[ ]", d)[0].lower().replace("_", "-") for d in wanted}
    assert names <= locked


def test_readme_names_what_exists():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / path).exists(), path
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`(?:[A-Z_]+=\S+ )?make (\w+)`", readme):
        assert re.search(rf"^{target}:", targets, re.M), target
    assert set(METHODS) <= set(re.findall(r"`(\w+)`", readme))


def test_tracked_files_hold_nothing_generated():
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    bad = re.compile(r"(^|/)(results|\.venv|__pycache__|\.snakemake|wandb)/|\.(pyc|pt|bin|pkl)$")
    assert not [name for name in run.stdout.splitlines() if bad.search(name)]
