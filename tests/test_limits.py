"""Memory limits, on control groups written into a folder."""

import psutil
import pytest

from espalier.machine import limits
from espalier.machine.limits import free_memory

MB = 2**20


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**15}))


def tree(root, line, levels, version):
    """Write a process's control groups: `levels` are (path, limit, used, cached)."""
    limit_name, used_name, cached_name = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"9:cpu:/other\n{line}\n")
    for path, limit, used, cached in levels:
        folder = root / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit_name).write_text(f"{limit}\n")
        (folder / used_name).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {used}\n{cached_name} {cached}\n")


def test_the_least_of_all_levels_of_version_2(tmp_path):
    levels = [("", "max", 0, 0), ("slurm", 900 * MB, 300 * MB, 0), ("slurm/job/step", 800 * MB, 100 * MB, 0)]
    tree(tmp_path, "0::/slurm/job/step", levels, 2)  # `job` has no files: 600 are left above, 700 in the step
    assert free_memory(tmp_path, {}) == 600 * MB


def test_the_least_of_all_levels_of_version_1(tmp_path):
    levels = [("memory", 2**63 - 4096, 0, 0), ("memory/uid", 700 * MB, 100 * MB, 0)]
    levels.append(("memory/uid/job", 500 * MB, 300 * MB, 0))
    tree(tmp_path, "4:hugetlb,memory:/uid/job", levels, 1)
    assert free_memory(tmp_path, {}) == 200 * MB


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_are_free(version, tmp_path):
    folder, line = {1: ("memory/job", "4:memory:/job"), 2: ("job", "0::/job")}[version]
    tree(tmp_path, line, [(folder, 500 * MB, 450 * MB, 400 * MB)], version)
    assert free_memory(tmp_path, {}) == 450 * MB


def test_a_container_sees_its_own_group_at_the_mount(tmp_path):
    tree(tmp_path, "4:memory:/docker/0123", [("memory", 400 * MB, 100 * MB, 0)], 1)
    assert free_memory(tmp_path, {}) == 300 * MB


def test_groups_of_both_versions_at_once(tmp_path):
    tree(tmp_path, "4:memory:/job\n0::/job", [("memory/job", 400 * MB, 100 * MB, 0)], 1)
    unified = tmp_path / "sys/fs/cgroup/unified/job"
    unified.mkdir(parents=True)
    assert free_memory(tmp_path, {}) == 300 * MB


def test_a_group_that_is_full_leaves_nothing(tmp_path):
    tree(tmp_path, "0::/job", [("job", 100 * MB, 200 * MB, 0)], 2)
    assert free_memory(tmp_path, {}) == 0


def test_without_groups_the_machine_decides(tmp_path):
    assert free_memory(tmp_path, {}) == 10**15


@pytest.mark.parametrize(
    ("environ", "megabytes"),
    [
        ({"SLURM_MEM_PER_NODE": "4000"}, 4000),
        ({"SLURM_MEM_PER_CPU": "1500", "SLURM_CPUS_ON_NODE": "4"}, 6000),
    ],
)
def test_a_slurm_job_has_what_it_asked_for(environ, megabytes, tmp_path):
    own = psutil.Process().memory_info().rss
    assert free_memory(tmp_path, environ) == pytest.approx(megabytes * MB - own, abs=50 * MB)


def test_the_narrower_of_slurm_and_group_counts(tmp_path):
    tree(tmp_path, "0::/job", [("job", 300 * MB, 100 * MB, 0)], 2)
    assert free_memory(tmp_path, {"SLURM_MEM_PER_NODE": "90000"}) == 200 * MB


@pytest.mark.parametrize("environ", [{}, {"SLURM_MEM_PER_NODE": "0"}, {"SLURM_MEM_PER_CPU": "1500"}])
def test_no_slurm_limit(environ):
    assert limits.slurm_bytes(environ) is None


def test_jobs_and_estimates_ask_here(monkeypatch):
    from espalier.machine.hardware import Hardware
    from espalier.models.running import free_bytes

    monkeypatch.setattr(limits, "free_memory", lambda: 12345678.0)
    assert free_bytes("cpu") == Hardware.load("here").memory == 12345678.0
