"""Clocks for short calls, and what the machine itself can do: products and reads a second.

On one thread of a processor the clock counts that thread's own time, which other programs hardly change. On a GPU calls
are captured in a CUDA graph where they can be, so that launches do not count, and timed by events.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from espalier.kernels import device
from espalier.timing.kernel_settings import FLUSHED

LEAST_SECONDS = 4e-3  # of one timing on a processor: shorter calls are repeated

Call = Callable[[], Any]


class Clock:
    """Times calls on a device; with `threads` = 1 a processor's own thread time."""

    def __init__(self, place: str, threads: int) -> None:
        self.place = place
        self.now = time.thread_time if threads == 1 else time.perf_counter
        self.threads = threads
        self._flushed: Tensor | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Compute with this clock's threads, without gradients."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def timer(self, call: Call, *, cold: bool) -> Callable[[], float]:
        """Return what gives the seconds of one call, the mean of several where it is short.

        `cold`: other memory is read, or written on a GPU, before every call.
        """
        if cold and self._flushed is None:
            self._flushed = torch.zeros(FLUSHED // 4, device=self.place)
        flushed = self._flushed if cold else None
        return self._processor(call, flushed) if self.place == "cpu" else _events(call, flushed)

    def _processor(self, call: Call, flushed: Tensor | None) -> Callable[[], float]:
        call()
        start = self.now()
        call()
        repeats = max(1, min(50, round(LEAST_SECONDS / max(self.now() - start, 1e-6))))

        def timed() -> float:
            call()  # what is to be warm
            total = 0.0
            for _ in range(repeats):
                if flushed is not None:
                    flushed.sum()
                start = self.now()
                call()
                total += self.now() - start
            return total / repeats

        return timed

    def machine(self, dtype: torch.dtype, products: Callable[[Tensor], list[Call]] | None = None) -> dict[str, Any]:
        """Return FLOPs and bytes a second: measured on a processor, of the data sheet on a GPU.

        `products` may give other ways than torch's to multiply a square matrix by the one it is given.
        """
        if self.place != "cpu":
            target = device.target_of(torch.device(self.place))
            name = torch.cuda.get_device_name(self.place)
            return {"name": f"{name}, data sheet", "flops": target.flops, "bandwidth": target.bandwidth}
        n = 1024
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        calls: list[Call] = [lambda: torch.mm(a, b), *(products(b) if products else [])]
        big = torch.zeros(FLUSHED // 4)
        return {
            "name": f"processor, {self.threads} thread{'s' * (self.threads > 1)}, measured",
            "flops": 2.0 * n**3 / min(self._fastest(call) for call in calls),
            "bandwidth": big.numel() * 4 / self._fastest(big.sum),
        }

    def _fastest(self, call: Call) -> float:
        call()
        found = []
        for _ in range(7):
            start = self.now()
            call()
            found.append(self.now() - start)
        return min(found)


def _events(call: Call, flushed: Tensor | None) -> Callable[[], float]:
    for _ in range(3):  # compiles, and chooses
        call()
    torch.cuda.synchronize()
    replay: Call = call
    graph = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):  # what asks the device a question cannot be captured
        with torch.cuda.graph(graph):
            call()
        replay = graph.replay

    def timed() -> float:
        if flushed is None:
            replay()
        else:
            flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    return timed
