"""Seconds that the clustering of HC-SMoE takes, beside SciPy's.

    python benchmarks/clustering.py [--experts 384] [--hidden 7168] [--linkage average single complete ward]

One MoE block of the shape of Kimi K2's by default: random mean outputs [E, D], in pairs that are alike. `distances` are
the pairwise ones that both need; `linkage` is `espalier.methods.agglomerate`, `scipy` scipy.cluster.hierarchy on the
same distances, `ratio` the first over the second. The merges must be the same. One JSON line a linkage.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import pdist, squareform

from espalier.methods.agglomerate import LINKAGES, cut, linkage_matrix


def timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return the result and the least seconds of a few runs."""
    best, found = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        best = min(best, time.perf_counter() - start)
    return found, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--linkage", nargs="+", choices=list(LINKAGES), default=list(LINKAGES))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    pairs = np.repeat(rng.normal(size=((options.experts + 1) // 2, options.hidden)), 2, axis=0)[: options.experts]
    points = pairs + 0.5 * rng.normal(size=pairs.shape)
    condensed, seconds = timed(lambda: pdist(points), options.repeats)
    square = squareform(condensed)
    for name in options.linkage:
        ours, own = timed(lambda name=name: linkage_matrix(square, name), options.repeats)  # type: ignore[misc]
        theirs, scipy = timed(lambda name=name: scipy_linkage(condensed, name), options.repeats)  # type: ignore[misc]
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        _, cutting = timed(lambda ours=ours: cut(ours, options.experts // 2), options.repeats)  # type: ignore[misc]
        row = {"linkage": name, "experts": options.experts, "hidden": options.hidden, "distances": seconds}
        row |= {"linkage_seconds": own, "cut": cutting, "scipy": scipy, "ratio": own / scipy, "total": seconds + own}
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
