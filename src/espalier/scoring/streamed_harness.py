"""The lm-eval model that scores choices with a model larger than memory: all requests pass its layers together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from espalier.errors import UserError
from espalier.models.stream import Batch, StreamedModel
from espalier.scoring.harness import Answer, ChoiceLM, Progress, Request, Tokens, answer


class StreamedLM(ChoiceLM):
    """Log-likelihoods of a streamed model; equal requests run once.

    `batch_size` counts sequences. Tasks that generate text are refused: each new token would read all weights.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        activation_memory: float = float("inf"),
        scratch: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(model.model, tokenizer, batch_size, progress)
        self.streamed = model
        self.room = (activation_memory, scratch)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        raise UserError("evaluation: rolling log-likelihoods are not streamed; use the perplexity_DOMAIN tasks.")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        raise UserError(
            "evaluation: a task generates text, for which the whole model must be in memory. "
            "Leave the task out, or set runtime.stream=never on a larger machine."
        )

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        unique = {(tuple(context), tuple(rest)): None for _, context, rest in requests}
        ordered = sorted(unique, key=lambda pair: -len(pair[0]) - len(pair[1]))
        size = int(self.batch_size)
        parts = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        batches = [self._batch(part) for part in parts]
        states = self.streamed.activations(batches, *self.room)
        layers = len(self.streamed.layers)
        for turn in self.streamed.turns(batches, states):
            for number in range(len(batches)):
                turn.run(number)
                self._tell(turn.layer * len(batches) + number + 1, (layers + 1) * len(batches))
        answers: dict[tuple[Tokens, Tokens], Answer] = {}
        with self.streamed.head(states) as head:
            for number, part in enumerate(parts):
                logits = head.logits(batches[number], number)
                for row, (context, rest) in enumerate(part):
                    last = min(len(context) + len(rest), self.max_length + 1) - 1
                    answers[context, rest] = answer(logits[row, last - len(rest) : last], rest)
                self._tell(layers * len(batches) + number + 1, (layers + 1) * len(batches))
        return self._checked([answers[tuple(context), tuple(rest)] for _, context, rest in requests])

    def _batch(self, part: Sequence[tuple[Tokens, Tokens]]) -> Batch:
        """Return the inputs of some requests, cut on the left to the model's length and padded on the right."""
        rows = [(context + rest)[-(self.max_length + 1) :][:-1] for context, rest in part]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # [B, L]
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return Batch.of(ids, mask)
