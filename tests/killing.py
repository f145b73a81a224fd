"""Kill a process at random moments and start it again, as a scheduler would."""

import random
import shutil
import signal
import time

from children import context


def _told(started, target, arguments):
    started.send(None)
    target(*arguments)


def run(target, *arguments, kill_after=None):
    """Run `target(*arguments)` in a child process; return whether it was killed, and the seconds that it took.

    `kill_after` seconds from its first line on, the child is killed (SIGKILL). One that is not must exit with 0.
    """
    waiting, started = context().Pipe(duplex=False)
    child = context().Process(target=_told, args=(started, target, arguments))
    child.start()
    started.close()  # the child's is the only one left: if it dies first, this does not wait for ever
    try:
        waiting.recv()
    except EOFError:
        child.join()
        raise AssertionError(f"the child ended with {child.exitcode} before its first line") from None
    begun = time.monotonic()
    child.join(kill_after)
    if child.exitcode is None:
        child.kill()
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0, time.monotonic() - begun


def killed_each(target, arguments, out, kills, seed=0):
    """Kill `kills` runs of `target(*arguments, out/NUMBER)` and yield each of these paths.

    The moments are random, one in each of as many equal parts of the time that an unbroken run takes. A run that
    ends before its moment is made again: the time was taken on a busier machine.
    """
    draw = random.Random(seed)
    _, seconds = run(target, *arguments, out / "whole")
    for number in range(kills):
        fraction, path, killed = (number + draw.random()) / kills, out / str(number), False
        while not killed:
            killed, taken = run(target, *arguments, path, kill_after=fraction * seconds)
            if not killed:
                seconds = min(taken, 0.9 * seconds)
                shutil.rmtree(path)
        yield path


def killed_until_done(target, arguments, kills, seconds, seed=0):
    """Run `target(*arguments)`, killed `kills` times at random moments of the `seconds` it takes, then to its end.

    A run that ends before its moment counts as no kill. Fails when fewer than half of the kills hit.
    """
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        killed, taken = run(target, *arguments, kill_after=draw.uniform(0.0, seconds))
        hits += killed
        seconds = seconds if killed else min(seconds, taken)
    killed, _ = run(target, *arguments)
    assert not killed
    assert 2 * hits >= kills, f"{hits} of {kills} kills hit"


def contents(directory):
    """Return the bytes of every file below `directory`, hidden ones too, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
