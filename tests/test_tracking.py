"""Tracking: off imports nothing, offline writes files and speaks to nobody."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.errors import UserError
from espalier.tracking import track

OFFLINE = """
import socket, sys
asked = []
real = socket.getaddrinfo
socket.getaddrinfo = lambda *arguments, **named: asked.append(arguments[0]) or real(*arguments, **named)
from espalier.tracking import track
with track({"mode": "offline", "project": "p", "directory": sys.argv[1]}, "0123456789ab", "naee 25 %") as tracker:
    tracker.log({"perplexity_wiki": 21.5})
    tracker.table("scores", ["task", "value"], [["wiki", 21.5]])
hosts = [host for host in asked if host not in (None, "localhost", "127.0.0.1", "::1")]
assert not hosts, hosts
"""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return kept | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_off_yields_a_silent_tracker_and_never_imports_wandb() -> None:
    code = (
        "import sys\nfrom espalier.tracking import track\n"
        "with track({'mode': 'off'}, 'a', 'b') as t:\n    t.log({'x': 1.0}); t.table('t', ['a'], [[1]])\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_unknown_mode_names_the_known_ones() -> None:
    with (
        pytest.raises(UserError, match=r"did you mean offline\?.*known: off, offline, online"),
        track({"mode": "ofline"}, "a", "b"),
    ):
        pass


def run_offline(directory: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", OFFLINE, str(directory)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


def test_offline_writes_the_run_without_looking_up_a_host(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = run_offline(tmp_path)
    assert done.returncode == 0, done.stderr
    runs = list(tmp_path.glob("wandb/offline-run-*-0123456789ab/run-0123456789ab.wandb"))
    assert len(runs) == 1
    assert b"perplexity_wiki" in runs[0].read_bytes()
    assert list(runs[0].parent.glob("files/media/table/scores*.json"))


def test_offline_finishes_without_any_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    # A network name space of its own with the loopback up and nothing else, which wandb's local service needs.
    inside = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("needs unshare and ip")
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow network name spaces")
    done = run_offline(tmp_path, *inside)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*-0123456789ab/run-0123456789ab.wandb"))
