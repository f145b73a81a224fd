"""The threshold of gates at which a model runs a wanted share of its work."""

from collections.abc import Callable

from scipy import optimize

TOLERANCE = 0.002  # of the share that runs
ROUNDS, MORE = 5, 10  # passes through the model that follow proposals, and steps of Brent's method after them


def find_threshold(
    observe: Callable[[float], float], propose: Callable[[float], float], start: float, target: float
) -> tuple[float, float]:
    """Return the best threshold found in [0, 1], and the share that runs with it.

    observe(tau) is the share that runs at a threshold, a pass through the model; propose(target) then is the threshold
    at which the gates of that pass would run the target. A gate sees what earlier layers let through, so that proposals
    need not come to rest; where they do not, Brent's method goes on between the thresholds that were seen. What is
    returned has been observed.
    """
    seen: dict[float, float] = {}

    def excess(tau: float) -> float:
        if tau not in seen:
            seen[tau] = observe(tau)
        over = seen[tau] - target
        return 0.0 if abs(over) <= TOLERANCE else over

    tau = start
    for _ in range(ROUNDS):
        if tau in seen or excess(tau) == 0:
            break
        tau = min(max(propose(target), 0.0), 1.0)
    if all(excess(tau) for tau in list(seen)):
        low = max((tau for tau, share in seen.items() if share > target), default=0.0)
        high = min((tau for tau, share in seen.items() if share < target), default=1.0)
        if low > high:  # the share rose with the threshold somewhere
            low, high = 0.0, 1.0
        if excess(low) > 0 > excess(high):
            optimize.brentq(excess, low, high, maxiter=MORE, disp=False)
    tau = min(seen, key=lambda tau: abs(seen[tau] - target))
    return tau, seen[tau]
