"""Warn of an experiment that computes in a dtype which this machine's processor has no products for."""

from espalier.machine import processor
from espalier.machine.hardware import HERE, Hardware
from espalier.workflow.graph import Experiment


def slow_dtype(experiment: Experiment, hardware: Hardware) -> str | None:
    """Return what to say of an experiment in bfloat16 on this machine's processor, or None where that is not slow."""
    if hardware.name != HERE or hardware.gpu(experiment.run["runtime"]["device"]) or not processor.lacks_bfloat16():
        return None
    if not any(node.config.get("dtype") == "bfloat16" for node in experiment.nodes):
        return None
    return (
        "This processor has no products in bfloat16, in which the experiment computes: they take six to nine times "
        "as long as in float32. Add model.dtype=float32."
    )
