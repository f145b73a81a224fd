"""The training loop: a step by hand, schedules, and interruptions that change no byte."""

import math
import os
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

from espalier.errors import InterruptedWork, UserError
from espalier.training.train import Training, TrainingState, interruption, shuffled, train


class Line(nn.Module):
    """y = w x + b; `frozen` is not to be trained."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.5, -0.25]], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([0.1], dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return x @ self.w.T + self.b * self.frozen


def numbers(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(4, 2, generator=generator), torch.randn(4, 1, generator=generator)


def squares(model, batch):
    x, y = batch
    dtype = model.w.dtype
    return {"error": (model(x.to(dtype)) - y.to(dtype)).float().square().mean(), "small": 0.01 * model.b.square().sum()}


def run(training, path=None, model=None, loss=squares, batch=numbers, **options):
    model = model or Line()
    state = None if path is None else TrainingState(path, {"run": 1}, save_seconds=0.0)
    return model, train(model, loss, batch, training, state=state, **options)


def adamw_by_hand(training, accumulation):
    """The same training in plain numbers: gradients of the two terms, clipping, AdamW without amsgrad."""
    w, b = [0.5, -0.25], 0.1
    moments = [[0.0, 0.0] for _ in range(3)]
    for step in range(training.steps):
        gradient = [0.0, 0.0, 0.0]
        for micro in range(accumulation):
            x, y = (t.tolist() for t in numbers(step * accumulation + micro))
            for row, (target,) in zip(x, y, strict=True):
                wrong = w[0] * row[0] + w[1] * row[1] + b - target
                for i, factor in enumerate((*row, 1.0)):
                    gradient[i] += 2 * wrong * factor / len(x) / accumulation
            gradient[2] += 0.02 * b / accumulation
        norm = math.sqrt(sum(g * g for g in gradient))
        gradient = [g * min(1.0, training.clip / (norm + 1e-6)) for g in gradient]
        rate = training.rate_at(step)
        w = [value * (1 - rate * training.weight_decay) for value in w]
        values = [*w, b]
        for i, g in enumerate(gradient):
            first = moments[i][0] = 0.9 * moments[i][0] + 0.1 * g
            second = moments[i][1] = 0.95 * moments[i][1] + 0.05 * g * g
            first, second = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            values[i] -= rate * first / (math.sqrt(second) + 1e-8)
        w, b = values[:2], values[2]
    return [*w, b]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_equals_plain_numbers(accumulation):
    training = Training(0.05, 7, warm_up=2, weight_decay=0.1, clip=0.5, accumulation=accumulation)
    model, trained = run(training)
    found = [*model.w[0].tolist(), model.b.item()]
    assert found == pytest.approx(adamw_by_hand(training, accumulation), rel=1e-4)
    assert list(trained.parameters) == ["w", "b"]
    assert model.frozen.item() == 1.0
    assert [step.done for step in trained.curve] == list(range(1, 8))
    assert all(step.loss == step.terms["error"] + step.terms["small"] for step in trained.curve)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 1, 1, 1, 1, *((1 + math.cos(math.pi * n / 5)) / 2 for n in range(1, 5))]),
    ],
)
def test_the_rate_warms_up_stays_and_falls(schedule, expected):
    training = Training(0.01, 10, warm_up=1, schedule=schedule, flat=0.5)
    assert [training.rate_at(step) / 0.01 for step in range(10)] == pytest.approx(expected)


def noisy(model, batch):
    """A loss that draws numbers, as dropout does."""
    return {"error": squares(model, batch)["error"] * (1 + torch.rand(()))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moment", range(1, 6))
def test_killed_anywhere_and_continued_gives_the_same_bytes(moment, dtype, tmp_path):
    training = Training(0.05, 6, warm_up=1, seed=3)
    whole, wanted = run(training, tmp_path / "whole", Line(dtype), noisy)

    def failing(n):
        if n == moment:
            raise KeyError
        return numbers(n)

    with pytest.raises(KeyError):
        run(training, tmp_path / "parts", Line(dtype), noisy, failing)
    torch.rand(5)  # another process draws other numbers
    parts, found = run(training, tmp_path / "parts", Line(dtype), noisy)
    for name, tensor in wanted.parameters.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, found.parameters[name])
    assert torch.equal(whole.w, parts.w)
    assert [step.terms for step in wanted.curve] == [step.terms for step in found.curve]
    with safe_open(tmp_path / "whole", "pt") as one, safe_open(tmp_path / "parts", "pt") as other:
        assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118


def test_small_steps_add_up_in_half_precision():
    training = Training(1e-4, 50, schedule="constant", clip=None)
    model, trained = run(training, model=Line(torch.bfloat16))
    assert abs(trained.parameters["w"][0, 0].item() - 0.5) > 1e-3  # a step of 1e-4 alone rounds to nothing
    assert torch.equal(model.w, trained.parameters["w"].bfloat16())


def test_what_listeners_draw_changes_nothing(tmp_path):
    training = Training(0.05, 4)
    _, plain = run(training, loss=noisy)
    _, heard = run(training, tmp_path / "state", loss=noisy, after=lambda step: torch.rand(step.done))
    assert torch.equal(plain.parameters["w"], heard.parameters["w"])
    before = torch.get_rng_state()
    run(training, loss=noisy)
    assert torch.equal(before, torch.get_rng_state())


def test_steps_are_told_when_they_are_safe_and_each_once(tmp_path, monkeypatch):
    training, told, broken = Training(0.05, 7), [], []
    saves = iter([False, False, True, False, False, True, False, False])  # behind steps 1 to 4, 4 to 7
    monkeypatch.setattr("espalier.training.train.TrainingState.due", lambda self: next(saves))

    def batch(n):
        if n == 4 and not broken:
            broken.append(n)
            raise KeyboardInterrupt  # step 4 is done and not saved
        return numbers(n)

    with pytest.raises(KeyboardInterrupt):
        run(training, tmp_path / "state", batch=batch, log=told.append)
    assert [step.done for step in told] == [1, 2, 3]
    _, trained = run(training, tmp_path / "state", batch=batch, log=told.append)
    assert [step.done for step in told] == [1, 2, 3, 4, 5, 6, 7]
    assert [step.terms for step in told] == [step.terms for step in trained.curve]
    run(training, tmp_path / "state", log=told.append)  # all is done
    assert len(told) == 7
    run(training, log=told.append)  # nothing is saved
    assert len(told) == 14


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_with_the_state_saved(number, tmp_path):
    training = Training(0.05, 6)
    before = signal.getsignal(number)

    def batch(n):
        if n == 2:
            os.kill(os.getpid(), number)
        return numbers(n)

    with interruption() as stop, pytest.raises(InterruptedWork, match="after step 3 of 6") as stopped:
        run(training, tmp_path / "state", batch=batch, stop=stop)
    assert stopped.value.number == number
    assert signal.Signals(number).name in str(stopped.value)
    assert signal.getsignal(number) == before
    with safe_open(tmp_path / "state", "pt") as file:
        assert file.metadata()["done"] == "3"
    _, found = run(training, tmp_path / "state")
    assert torch.equal(found.parameters["w"], run(training)[1].parameters["w"])


def test_signals_are_left_alone_outside_of_the_main_thread():
    handler = signal.getsignal(signal.SIGTERM)
    seen = []

    def inside():
        with interruption() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.number))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(handler, None)]


def test_a_state_of_another_training_or_a_broken_one_is_not_used(tmp_path):
    training = Training(0.05, 3)
    run(training, tmp_path / "state")
    other = TrainingState(tmp_path / "state", {"run": 2})
    heard = []
    train(Line(), squares, numbers, training, state=other, after=heard.append)
    assert len(heard) == 3
    data = (tmp_path / "state").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"nonsense" * 10):
        (tmp_path / "state").write_bytes(broken)
        heard.clear()
        train(
            Line(), squares, numbers, training, state=TrainingState(tmp_path / "state", {"run": 2}), after=heard.append
        )
        assert len(heard) == 3


def test_rows_come_in_a_new_order_each_epoch_and_each_once():
    rows = shuffled(7, 3, seed=5)
    drawn = [row for number in range(14) for row in rows(number)]
    epochs = [drawn[n : n + 7] for n in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert [shuffled(7, 3, seed=5)(number) for number in (9, 2)] == [rows(9), rows(2)]
    assert shuffled(7, 3, seed=6)(0) != rows(0)


def test_what_is_refused():
    with pytest.raises(UserError, match="schedule='cosin'; did you mean cosine"):
        Training(0.1, 1, schedule="cosin")
    with pytest.raises(UserError, match="accumulation=0"):
        Training(0.1, 1, accumulation=0)
    with pytest.raises(UserError, match="rate=0"):
        Training(0, 1)
    with pytest.raises(UserError, match="no parameter"):
        run(Training(0.1, 1), model=Line().requires_grad_(False))
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        run(Training(0.1, 2), loss=lambda model, batch: {"error": model.w.sum() * math.nan})
