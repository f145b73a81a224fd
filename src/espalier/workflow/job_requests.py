"""What the jobs of a run ask a cluster for: memory, time, disk and a GPU, from their node files; imports no torch."""

import math
from collections.abc import Collection
from typing import Any

from espalier.artefacts.store import MODELS, Store
from espalier.artefacts.temporary import made_by
from espalier.costs.estimate import Cost
from espalier.machine.hardware import Hardware
from espalier.workflow.reckon import Reckoner

# A job that its cluster kills for memory loses hours, one that asks for too much waits for minutes. Predictions missed
# measured peaks by up to 15 % (docs/scale.md); small jobs by up to 0.1 GB of heap that freed pieces keep apart. Mapped
# files count in what Slurm sees of a job, so that they are added.
MEMORY_MARGIN, MEMORY_MORE_MB, LEAST_MB = 1.25, 300, 2000
TIME_MARGIN, LEAST_MINUTES = 3.0, 30
# A job of a pack is short, and a pack asks for the sum of its jobs' minutes.
SMALL_SECONDS, LEAST_PACKED_MINUTES = 120.0, 5
# Stages whose jobs a sweep has thousands of, and packs. No two jobs of a pack may depend on each other, not even by way
# of others: plans and checkpoints are packed where they are made of the source model, scores always.
PACKED = ("plan", "apply", "score")
DISK_MARGIN = 1.1
# Stages that run a model, on a GPU where there is one.
COMPUTING = ("collect", "fit", "teacher", "tune", "score", "speed")
# Where a model's sizes are not known before it is fetched.
UNKNOWN = {"mem_mb": 16000, "runtime": 240, "disk_mb": 50000}


class Requests:
    """The resources of each job of a run, by its node's id; a node is reckoned once.

    `temporary`: ids of the run's temporary checkpoints. `packs`: names of the packs that there are. `memory`: times
    what the rule below says.
    """

    def __init__(
        self,
        store: Store,
        hardware: Hardware,
        runtime: dict[str, Any],
        temporary: Collection[str] = (),
        packs: Collection[str] = (),
        memory: float = 1.0,
    ) -> None:
        self.store, self.hardware, self.packs, self.memory = store, hardware, packs, memory
        self.reckoner = Reckoner(store, hardware, runtime, temporary)
        self._costs: dict[str, Cost | None] = {}

    def pack(self, id: str) -> str | None:
        """Return the pack that a job goes into, such as `small_score`; None: it is a job of the cluster by itself.

        Small is what is predicted to take less than two minutes on one core, or on the GPU.
        """
        if not self.packs:
            return None
        job = self.store.read_node(id)
        name = f"small_{job['stage']}"
        if job["stage"] not in PACKED or name not in self.packs:
            return None
        if job["stage"] != "score" and self.store.parent(job, *MODELS)["stage"] != "fetch":
            return None
        cost = self._reckoned(id)
        return name if cost is not None and cost.seconds(self.hardware, 1) < SMALL_SECONDS else None

    def of(self, id: str, threads: int = 1, attempt: int = 1) -> dict[str, int]:
        """Return `mem_mb`, `runtime` (minutes), `disk_mb`, `gpu` and `checkpoints` (how many, temporary ones) of a job.

        Memory is what was predicted, 25 %, 300 MB and mapped files more, at least 2 GB; time three times what was
        predicted, at least 30 minutes, in a pack 5. The second attempt gets twice as much of both, the third three
        times.
        """
        cost, temporary = self._reckoned(id), self.reckoner.temporary
        checkpoints = int(bool(temporary) and made_by(self.store.read_node(id), self.store, temporary) is not None)
        if cost is None:
            gpu = int(self.hardware.gpu(self.reckoner.running.device))
            asked = {key: value * attempt for key, value in UNKNOWN.items()}
            asked["mem_mb"] = math.ceil(self.memory * asked["mem_mb"])
            return asked | {
                "gpu": gpu if self.store.read_node(id)["stage"] in COMPUTING else 0,
                "checkpoints": checkpoints,
            }
        least = LEAST_PACKED_MINUTES if self.pack(id) else LEAST_MINUTES
        minutes = TIME_MARGIN * cost.seconds(self.hardware, threads) / 60
        memory = (MEMORY_MARGIN * cost.memory + cost.mapped) / 1e6 + MEMORY_MORE_MB
        return {
            "mem_mb": attempt * math.ceil(self.memory * max(math.ceil(memory), LEAST_MB)),
            "runtime": attempt * max(math.ceil(minutes), least),
            "disk_mb": math.ceil(DISK_MARGIN * cost.disk / 1e6) + 1,
            "gpu": int(cost.gpu),
            "checkpoints": checkpoints,
        }

    def _reckoned(self, id: str) -> Cost | None:
        if id not in self._costs:
            self._costs[id] = self._cost(self.store.read_node(id))
        return self._costs[id]

    def _cost(self, job: dict[str, Any]) -> Cost | None:
        """None where the model's sizes or the calibration's tokens are not known."""
        if not self.reckoner.known(job):
            return None
        cost = self.reckoner.cost(job)
        return None if job["stage"] in (*COMPUTING, "apply") and not cost.memory else cost
