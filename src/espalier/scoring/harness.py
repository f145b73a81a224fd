"""The lm-eval model that scores choices: Hugging Face's, less the work that choices of one item share.

A request is (context, continuation). Four choices after one context need the context once, and the same choice
text scored without a context is often asked for by several items. Log-likelihoods equal those of lm-eval's own
HFLM but for rounding (tests/test_score.py).
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from espalier.errors import UserError
from espalier.models.depth_count import depth_routers

Tokens = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, continuation ids
Answer = tuple[float, bool]  # log-likelihood in nats, whether greedy decoding gives the continuation
Progress = Callable[[int, int], None]

KEYED = ("full_attention", "sliding_attention", "chunked_attention")  # kinds of layers that keep keys and values
SHORTEST_SHARED = 8  # tokens; below, a second forward pass costs more than the repeated context


class ChoiceLM(HFLM):  # type: ignore[misc]
    """HFLM around a model that is there already, for one process, silent but for `progress`.

    `ranks`: the model ranks the tokens of a sequence (MoD). It gets each sequence whole, alone and without padding,
    which would be ranked too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        self.ranks = any(router.rule == "top_k" for router in depth_routers(model).values())
        size = 1 if self.ranks else batch_size
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns that a loaded model is passed, which is what we want
        try:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=size, softmax_dtype="float32")
        finally:
            logger.setLevel(level)
        self.progress = progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _checked(self, answers: Sequence[Answer]) -> list[Answer]:
        """Return the answers; UserError where one is NaN, of which lm-eval would take the first for the best."""
        bad = sum(math.isnan(value) for value, _ in answers)
        if bad:
            raise no_numbers(f"{bad} of {len(answers)} log-likelihoods are", self.model.dtype)
        return list(answers)

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


class SharedContextLM(ChoiceLM):
    """Runs equal requests once and each context once for its continuations.

    `batch_size` counts sequences: choices, not items.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        by_context: dict[Tokens, dict[Tokens, Request]] = defaultdict(dict)
        for request in requests:
            by_context[tuple(request[1])].setdefault(tuple(request[2]), request)
        shared = {context: list(rest) for context, rest in by_context.items() if self._worth_sharing(context, rest)}
        single = [r for context, rest in by_context.items() if context not in shared for r in rest.values()]
        answers: dict[tuple[Tokens, Tokens], Answer] = {}
        total = sum(len(rest) for rest in by_context.values())
        for batch in self._batches(shared):
            answers |= self._score_shared(batch)
            self._tell(len(answers), total)
        # In slices of similar length, so that progress is heard; lm-eval sorts and batches inside each.
        single.sort(key=lambda request: -len(request[1]) - len(request[2]))
        step = 8 * int(self.batch_size)
        for first in range(0, len(single), step):
            part = single[first : first + step]
            found = super()._loglikelihood_tokens(part, disable_tqdm=True, override_bs=override_bs)
            answers |= {(tuple(r[1]), tuple(r[2])): a for r, a in zip(part, found, strict=True)}
            self._tell(len(answers), total)
        return self._checked([answers[tuple(context), tuple(continuation)] for _, context, continuation in requests])

    def _worth_sharing(self, context: Tokens, continuations: dict[Tokens, Request]) -> bool:
        longest = max(map(len, continuations))
        return (
            not self.ranks
            and _keeps_keys_only(self.model)
            and len(continuations) > 1
            and len(context) >= SHORTEST_SHARED
            and longest > 1  # lm-eval itself shares the logits of one-token continuations
            and len(context) + longest - 1 <= self.max_length
        )

    def _batches(self, shared: dict[Tokens, list[Tokens]]) -> Iterator[list[tuple[Tokens, list[Tokens]]]]:
        """Yield items of equal context length and equal number of choices, so that no context is padded."""
        groups: dict[tuple[int, int], list[tuple[Tokens, list[Tokens]]]] = defaultdict(list)
        for context, continuations in shared.items():
            groups[len(context), len(continuations)].append((context, continuations))
        for (_, choices), items in sorted(groups.items(), reverse=True):
            step = max(1, int(self.batch_size) // choices)
            for first in range(0, len(items), step):
                yield items[first : first + step]

    @torch.inference_mode()
    def _score_shared(self, items: list[tuple[Tokens, list[Tokens]]]) -> dict[tuple[Tokens, Tokens], Answer]:
        """Run the contexts with a key-value cache, then all continuations on the cache repeated for each."""
        choices = len(items[0][1])
        contexts = torch.tensor([context for context, _ in items], device=self.device)  # [B, L]
        first = self.model(input_ids=contexts, use_cache=True, logits_to_keep=1)
        rows = [continuation for _, continuations in items for continuation in continuations]  # B x C of them
        longest = max(map(len, rows)) - 1
        cache = first.past_key_values
        cache.batch_repeat_interleave(choices)
        inputs = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), contexts.shape[1] + longest, dtype=torch.long)
        for row, tokens in enumerate(rows):
            inputs[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            mask[row, : contexts.shape[1] + len(tokens) - 1] = 1
        then = self.model(
            input_ids=inputs.to(self.device),
            attention_mask=mask.to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        answers: dict[tuple[Tokens, Tokens], Answer] = {}
        for row, tokens in enumerate(rows):
            context = items[row // choices][0]
            logits = torch.cat([first.logits[row // choices, -1:], then.logits[row, : len(tokens) - 1]])  # [n, V]
            answers[context, tokens] = answer(logits, tokens)
        return answers


def _keeps_keys_only(model: PreTrainedModel) -> bool:
    """Whether keys and values are all that every layer keeps of the tokens before.

    A state (Mamba, linear attention) cannot be repeated for several continuations in transformers' caches, nor do all
    such layers go on from one with more than a token.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return all(kind in KEYED for kind in kinds)


def no_numbers(what: str, dtype: torch.dtype) -> UserError:
    """Return the error for a model that computes NaN or infinity from weights that are neither."""
    name = str(dtype).removeprefix("torch.")
    return UserError(f"evaluation: {what} no finite numbers: the model overflows in {name}. Set model.dtype=float32.")


def answer(logits: torch.Tensor, tokens: Tokens) -> Answer:
    """Return the log-likelihood in nats of `tokens` [n] under logits [n, V], and whether each is the likeliest."""
    targets = torch.tensor(tokens, device=logits.device)
    nll = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return -float(nll), bool((logits.argmax(-1) == targets).all())
