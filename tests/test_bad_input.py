"""Damaged models, full and read-only disks, two runs at once: each command ends in one line that says it all."""

import contextlib
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from children import command
from espalier import conf
from espalier.artefacts.partial import resumable_directory, resumable_work
from espalier.artefacts.store import Node, Store, digest, write_json
from espalier.checkpoints.checkpoint import INDEX
from espalier.inputs.tokens import save_tokens
from example_plans import example_plan
from killing import contents
from tiny import save_tiny

NAME = "model.layers.1.block_sparse_moe.experts.5.w2.weight"  # of an expert that the plan keeps
STAGES = ["collect streamed", "collect in memory", "apply", "compress", "compress streamed", "score", "score streamed"]


def change_config(**changes):
    def damage(model, shard):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return damage


def change_index(name, file):
    def damage(model, shard):
        index = json.loads((model / INDEX).read_text())
        index["weight_map"][name] = file or shard.name
        (model / INDEX).write_text(json.dumps(index))

    return damage


def put(value):
    def damage(model, shard):
        tensors = load_file(shard)
        tensors[NAME][3, 4] = value
        save_file(tensors, shard, {"format": "pt"})

    return damage


DAMAGES = {
    "a truncated shard": (
        lambda model, shard: shard.write_bytes(shard.read_bytes()[:-100]),
        r"{shard}: truncated shard, \d+ bytes instead of \d+\. Download it again\.$",
    ),
    "a missing shard": (
        lambda model, shard: shard.unlink(),
        r"model: 1 of 13 shards are missing: {shard}\. {index} names them; download the model again\.$",
    ),
    "a NaN": (put(float("nan")), r"{shard}: tensor {name} holds 1 NaN .* of 768\. Download the model again\.$"),
    "an infinity": (
        put(float("-inf")),
        r"{shard}: tensor {name} holds 1 NaN or infinite numbers of 768\. Download the model again\.$",
    ),
    "an index that names a missing tensor": (
        change_index("model.layers.1.extra.weight", None),
        r"{index}: {shard} does not hold tensor model\.layers\.1\.extra\.weight\. Download it again\.$",
    ),
    "an index that names a missing file": (
        change_index("model.layers.1.extra.weight", "model-00099.safetensors"),
        r"model: 1 of 14 shards are missing: model-00099\.safetensors\. {index} names them; download the model",
    ),
    "another hidden size": (
        change_config(hidden_size=64),
        r"config\.json: says hidden_size=64, but tensor model\.embed_tokens\.weight in \S+ is \[96, 32\]\. Download",
    ),
    "another expert width": (
        change_config(intermediate_size=48),
        r"config\.json: says intermediate_size=48, but tensor \S+\.0\.w1\.weight in \S+ is \[24, 32\]\. Download",
    ),
    "more experts": (
        change_config(num_local_experts=16),
        r"config\.json: says 16 experts, but layer 0 holds 8 in its shards\. Download the model again\.$",
    ),
    "fewer experts": (
        change_config(num_local_experts=4),
        r"config\.json: says 4 experts, but layer 0 holds 8 in its shards\. Download the model again\.$",
    ),
    "more layers": (
        change_config(num_hidden_layers=4),
        r"config\.json: says num_hidden_layers=4, but the shards hold 3 decoder layers\. Download the model again\.$",
    ),
    "fewer layers": (
        change_config(num_hidden_layers=2),
        r"config\.json: says num_hidden_layers=2, but the shards hold 3 decoder layers\. Download the model again\.$",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("mixtral", tmp_path_factory.mktemp("whole") / "model", max_shard_size="20KB")


class Given:
    """A results folder in which everything is ready for `stage`, an artefact made before, and the command."""

    def __init__(self, stage, model, folder):
        self.folder, self.store = folder, Store(folder / "results")
        ids = np.random.default_rng(0).integers(3, 95, (4, 16))
        fetch = Node("fetch", {"id": str(model), "revision": "sha256:0"})
        tokens = Node("tokens", {"name": "tokens"}, (fetch.id,))
        plan = Node("plan", {"name": "example"}, (fetch.id,))
        tasks = [{"task": "perplexity_code", "length": 32}]
        nodes = {
            "collect": Node("collect", {"probes": ["usage"], "dtype": "auto"}, (fetch.id, tokens.id)),
            "apply": Node("apply", {}, (fetch.id, plan.id)),
            "score": Node("score", {"tasks": tasks, "dtype": "auto"}, (fetch.id,)),
        }
        for node in (fetch, tokens, plan, *nodes.values()):
            self.store.write_node(node)
            self.store.path(node.id).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.store.path(fetch.id), {"format": "espalier.model/1", "path": str(model)})
        save_tokens(self.store.path(tokens.id), ids, None, {})
        write_json(self.store.path(plan.id), example_plan("mixtral", "keep").document())
        stream = "always" if stage.endswith("streamed") else "never"
        runtime = conf.load("runtime", "default") | {"stream": stream, "collect_batch_size": 2}
        run = {"format": "espalier.runtime/1", "runtime": runtime, "tracking": conf.load("tracking", "off")}
        write_json(self.store.run_path(digest(run)), run)
        self.environment = {"ESPALIER_RUNTIME": digest(run)}
        self.name = stage.split()[0]
        if self.name == "compress":
            self.artefact = folder / "out"
            self.arguments = ["compress", model, "-m", "frequency", "ratio=0.5", "-o", self.artefact, "--no-prove"]
            self.arguments += ["-c", self.store.path(tokens.id), "--stream", stream, "--results", folder / "none"]
        else:
            self.artefact = self.store.path(nodes[self.name].id)
            self.arguments = [self.name, nodes[self.name].id, "--results", folder / "results"]
            made = self.artefact / "model.safetensors" if self.name == "apply" else self.artefact
            made.parent.mkdir(exist_ok=True)
            made.write_bytes(b"made before")

    def run(self, scratch):
        return command(self.arguments, scratch, **self.environment)

    def refused(self, scratch):
        """Return the one line with which the command is refused, after which every file is as it was before."""
        before = contents(self.folder)
        code, out, err = self.run(scratch)
        assert code == 2, out + err
        lines = [line for line in err.splitlines() if "espalier: error: " in line]
        assert len(lines) == 1
        # What comes before it is how far `compress` got.
        assert [line for line in err.splitlines() if not line.startswith("frequency: ")] == lines
        assert out == ""
        after = contents(self.folder)
        assert after == before, after.keys() ^ before.keys()
        return lines[0].removeprefix("espalier: error: ")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_model(what, stage, model, tmp_path):
    damage, expected = DAMAGES[what]
    broken = shutil.copytree(model, tmp_path / "model")
    shard = broken / json.loads((model / INDEX).read_text())["weight_map"][NAME]
    damage(broken, shard)
    (tmp_path / "folder").mkdir()
    line = Given(stage, broken, tmp_path / "folder").refused(tmp_path)
    names = {"shard": shard.name, "index": INDEX, "name": NAME}
    assert re.search(expected.format(**{key: re.escape(value) for key, value in names.items()}), line), line


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(stage, model, disk, tmp_path):
    given = Given(stage, model, disk)
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    line = given.refused(tmp_path)
    assert re.search(r"^\S+: (no space left on the disk|needs 0\.\d+ GB, but \S+ has 0\.\d+ GB free)", line), line
    assert re.search(r"[Ff]ree some space or write elsewhere", line), line
    assert str(disk) in line
    if stage != "apply":  # whose proof takes seconds
        (disk / "filler").unlink()
        code, out, err = given.run(tmp_path)
        assert code == 0, out + err
        assert given.artefact.exists()
        assert not list(disk.rglob("*.partial")) + list(disk.rglob("*.tmp")) + list(disk.rglob(".*.work"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_output(stage, model, disk, tmp_path):
    given = Given(stage, model, disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = given.refused(tmp_path)
    assert re.search(r"^\S+: cannot be written, \S+: Read-only file system\. Choose another output directory\.$", line)
    assert str(disk) in line


@pytest.mark.parametrize("stage", STAGES)
def test_two_runs_on_the_same_output(stage, model, tmp_path):
    (tmp_path / "folder").mkdir()
    given = Given(stage, model, tmp_path / "folder")
    held = (resumable_directory if stage == "apply" else resumable_work)(given.artefact, 1, True)
    with held as files:  # as the first run does
        (files / "model-1.safetensors").write_bytes(b"half")
        line = given.refused(tmp_path)
    assert re.search(r"^\S+: another run is writing it \(\S+ is locked\)\. Wait for it or choose another output", line)
    assert given.artefact.name in line
