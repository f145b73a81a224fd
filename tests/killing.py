"""Kill a process at random moments and start it again until it ends, as a scheduler would."""

import multiprocessing
import random
import time

PRELOAD = ["espalier.collect", "espalier.apply"]


def killed_until_done(target, arguments, kills, seed=0):
    """Run `target(*arguments)` in a child process, killed `kills` times (SIGKILL), then once to its end.

    The moments lie between the child's start and the time that a whole run took last; a child that ends before
    its moment counts as no kill and is not started again. Fails when fewer than half of the kills hit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    moments = random.Random(seed)
    hits, longest = 0, 0.3
    for _ in range(kills):
        child = context.Process(target=target, args=arguments)
        started = time.monotonic()
        child.start()
        child.join(moments.uniform(0.0, longest))
        if child.exitcode is None:
            child.kill()
            child.join()
            hits += 1
        else:
            assert child.exitcode == 0
            longest = min(longest, time.monotonic() - started)
    child = context.Process(target=target, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert 2 * hits >= kills, f"{hits} of {kills} kills hit"
