"""What the jobs of a run ask a cluster for: memory, time, disk and a GPU, from their node files; imports no torch."""

import math
from typing import Any

from espalier.estimate import Cost
from espalier.hardware import Hardware
from espalier.reckon import Reckoner
from espalier.store import Store

# A job that its cluster kills for memory loses hours, one that asks for too much waits for minutes. Predictions missed
# measured peaks by up to 15 % (docs/scale.md); small jobs by up to 0.1 GB of heap that freed pieces keep apart. Mapped
# files count in what Slurm sees of a job, so that they are added.
MEMORY_MARGIN, MEMORY_MORE_MB, LEAST_MB = 1.25, 300, 2000
TIME_MARGIN, LEAST_MINUTES = 3.0, 30
DISK_MARGIN = 1.1
# Stages that run a model, on a GPU where there is one.
COMPUTING = ("collect", "fit", "teacher", "tune", "score", "speed")
# Where a model's sizes are not known before it is fetched.
UNKNOWN = {"mem_mb": 16000, "runtime": 240, "disk_mb": 50000}


class Requests:
    """The resources of each job of a run, by its node's id; a node is reckoned once."""

    def __init__(self, store: Store, hardware: Hardware, runtime: dict[str, Any]) -> None:
        self.store, self.hardware = store, hardware
        self.reckoner = Reckoner(store, hardware, runtime)
        self._costs: dict[str, Cost | None] = {}

    def of(self, id: str, threads: int = 1, attempt: int = 1) -> dict[str, int]:
        """Return `mem_mb`, `runtime` (minutes), `disk_mb` and `gpu` (how many) of a job; a retry gets more.

        Memory is what was predicted, 25 %, 300 MB and mapped files more, at least 2 GB; time three times what was
        predicted, at least 30 minutes.
        """
        if id not in self._costs:
            self._costs[id] = self._cost(self.store.read_node(id))
        cost = self._costs[id]
        if cost is None:
            gpu = int(self.hardware.gpu(self.reckoner.running.device))
            asked = {key: value * attempt for key, value in UNKNOWN.items()}
            return asked | {"gpu": gpu if self.store.read_node(id)["stage"] in COMPUTING else 0}
        minutes = TIME_MARGIN * cost.seconds(self.hardware, threads) / 60
        memory = (MEMORY_MARGIN * cost.memory + cost.mapped) / 1e6 + MEMORY_MORE_MB
        return {
            "mem_mb": attempt * max(math.ceil(memory), LEAST_MB),
            "runtime": attempt * max(math.ceil(minutes), LEAST_MINUTES),
            "disk_mb": math.ceil(DISK_MARGIN * cost.disk / 1e6) + 1,
            "gpu": int(cost.gpu),
        }

    def _cost(self, job: dict[str, Any]) -> Cost | None:
        """None where the model's sizes or the calibration's tokens are not known."""
        if not self.reckoner.known(job):
            return None
        cost = self.reckoner.cost(job)
        return None if job["stage"] in (*COMPUTING, "apply") and not cost.memory else cost
