"""The search for a threshold, on gates whose values depend on the threshold itself."""

import numpy as np
import pytest

from espalier.training.threshold import MORE, ROUNDS, TOLERANCE, find_threshold


class World:
    """Six layers of gates: those of a layer are moved by `feedback` times what ran above 0.5 of the layer before."""

    def __init__(self, feedback, seed=0):
        self.drawn = np.random.default_rng(seed).uniform(0.2, 0.8, (6, 4000))
        self.feedback, self.gates, self.asked = feedback, self.drawn, []

    def at(self, tau):
        share, gates = 0.5, []
        for layer in self.drawn:
            gates.append(np.clip(layer + self.feedback * (share - 0.5), 0, 1))
            share = float((gates[-1] > tau).mean())
        self.gates = np.concatenate(gates)
        return float((self.gates > tau).mean())

    def observe(self, tau):
        self.asked.append(tau)
        return self.at(tau)

    def propose(self, target):
        return float(np.quantile(self.gates, 1 - target))


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("feedback", [0.0, 0.3, -0.3, -0.5])
@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
def test_the_share_is_met(feedback, target, start):
    world = World(feedback)
    tau, share = find_threshold(world.observe, world.propose, start, target)
    assert share == World(feedback).at(tau) == pytest.approx(target, abs=TOLERANCE)
    assert len(world.asked) <= ROUNDS + MORE


def test_proposals_that_go_round_in_a_circle_are_left():
    world, tau = World(0.0), 0.4

    def propose(target):  # three times as far as is right, and back again
        return world.asked[-1] + 3 * (world.propose(target) - world.asked[-1])

    for _ in range(ROUNDS):
        world.observe(tau)
        tau = propose(0.3)
    assert abs(world.at(tau) - 0.3) > 0.1
    assert find_threshold(world.observe, propose, 0.4, 0.3)[1] == pytest.approx(0.3, abs=TOLERANCE)


def test_what_cannot_be_met_ends_with_the_best_that_was_seen():
    asked = []

    def steps(tau):  # of two values alone, and neither is the target
        asked.append(tau)
        return 0.8 if tau < 0.37 else 0.45

    tau, share = find_threshold(steps, lambda target: 0.9, 0.1, 0.5)
    assert share == 0.45 == steps(tau)
    assert len(asked) <= ROUNDS + MORE + 3
    assert all(0 <= tau <= 1 for tau in asked)
    always = find_threshold(lambda tau: 0.6 if tau else 1.0, lambda target: 0.5, 0.5, 0.3)  # one always runs
    assert always[1] == 0.6


@pytest.mark.parametrize("start", [0.0, 0.3, 0.45, 0.52, 0.6, 1.0])
def test_a_share_that_rises_with_the_threshold_somewhere_does_not_end_the_search(start):
    taus = []

    def waves(tau):
        taus.append(tau)
        return 1 - tau + 0.3 * np.sin(40 * tau) * (tau * (1 - tau))

    tau, share = find_threshold(waves, lambda target: taus[-1], start, 0.5)
    assert share == waves(tau) == pytest.approx(0.5, abs=TOLERANCE)
