"""Shared fixtures: tiny models and the checkpoints that plans make of them, each made once a session."""

import os
import tempfile

# Read by transformers when it is imported: an own cache of trusted code, and no look at the network.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="espalier-test-modules-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that no process is left with it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def proof_here(monkeypatch):
    """Proofs in this process, for tests of what is proven: a fresh one takes five seconds to import its libraries."""
    import contextlib
    import io
    import subprocess

    from espalier.surgery import apply, prove

    def run(argv, **_):
        assert argv[1:3] == ["-m", "espalier.surgery.prove"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = prove.main(argv[3:])
        return subprocess.CompletedProcess(argv, code, out.getvalue(), "")

    monkeypatch.setattr(apply, "subprocess", type("here", (), {"run": staticmethod(run)}))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return make(family_name, dtype="float32", **changes) -> directory of a tiny source model."""
    made = {}

    def make(family_name, dtype="float32", **changes):
        import torch

        from tiny import save_tiny

        key = (family_name, dtype, *sorted((name, repr(value)) for name, value in changes.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp(family_name) / "source"
            made[key] = save_tiny(family_name, directory, getattr(torch, dtype), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def applied(tiny_model, tmp_path_factory):
    """Return make(family_name, kind, dtype="float32", **changes) -> (source, out, plan); kinds: example_plans."""
    made = {}

    def make(family_name, kind, dtype="float32", **changes):
        from espalier.surgery.apply import apply
        from example_plans import example_plan

        key = (family_name, kind, dtype, *sorted((name, repr(value)) for name, value in changes.items()))
        if key not in made:
            source = tiny_model(family_name, dtype, **changes)
            plan = example_plan(family_name, kind)
            out = tmp_path_factory.mktemp(f"{family_name}-{kind}") / "out"
            apply(source, plan, out, prove=False)
            made[key] = source, out, plan
        return made[key]

    return make
