"""Train the embedded OLMoE model: `python -m espalier.embedded.train --corpora DIR --out DIR --steps N`.

AdamW with a flat then linearly falling rate, the per-layer balance loss of `espalier.embedded.balance`, fp32
unless --bf16 (faster only where the processor has bf16 instructions). The loop is `espalier.training.train`'s, its
state OUT/state/training.safetensors; running the same command again resumes from it, and gives the batches that an
uninterrupted run would have given.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from espalier.artefacts.store import atomic_directory
from espalier.embedded.balance import layer_balance, router_outputs
from espalier.embedded.tokenizer import train_tokenizer
from espalier.embedded.windows import perplexity, token_stream, windows
from espalier.errors import InterruptedWork, UserError
from espalier.inputs.assets import text_directory
from espalier.inputs.documents import DOMAINS, read_jsonl
from espalier.training.train import Step, Training, TrainingState, interruption
from espalier.training.train import train as run_training

MIX = (0.35, 0.25, 0.20, 0.20)  # share of the sequences drawn from each of DOMAINS
BALANCE = 0.01  # weight of the summed per-layer balance loss
FLAT = 0.6  # share of the steps after which the rate falls linearly to zero
WARM_UP = 100  # steps
CONTEXT = 512  # positions of the model


@dataclass(frozen=True)
class Run:
    """What determines a training run; written into its state, and a resumed run must agree with it."""

    steps: int
    batch: int  # sequences a step
    length: int  # tokens a sequence
    rate: float
    seed: int
    bf16: bool  # autocast
    corpora: str


def model_config(tokenizer: PreTrainedTokenizerBase) -> OlmoeConfig:
    """The embedded architecture: 5.7M parameters, 4 layers of 16 experts, 2 of them chosen for a token."""
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def read_texts(corpora: Path | None) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(training, validation) texts by domain from `corpora`, or the committed excerpts if it is None."""
    root, training = (text_directory(), "calibration") if corpora is None else (corpora, "train")
    texts: list[dict[str, list[str]]] = []
    for split in (training, "validation"):
        texts.append({})
        for domain in DOMAINS:
            path = root / domain / f"{split}.jsonl"
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; --corpora wants the directory made by "
                    "`python -m espalier.embedded.corpora`, or use --smoke for the committed excerpts"
                )
            texts[-1][domain] = [row["text"] for row in read_jsonl(path)]
    return texts[0], texts[1]


def draw_batch(streams: list[Tensor], run: Run, step: int) -> Tensor:
    """The int64 [batch, length] tokens of a step: for each row a domain by MIX, then a place in its stream."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    domains = torch.multinomial(torch.tensor(MIX), run.batch, replacement=True, generator=generator)
    rows = []
    for domain in domains.tolist():
        start = int(torch.randint(len(streams[domain]) - run.length, (1,), generator=generator))
        rows.append(streams[domain][start : start + run.length])
    return torch.stack(rows)


def settings(run: Run) -> Training:
    """AdamW with weight decay on matrices: linear warm-up, flat, then linear to zero."""
    return Training(
        rate=run.rate,
        steps=run.steps,
        warm_up=min(WARM_UP, run.steps // 10),
        schedule="linear",
        flat=FLAT,
        weight_decay=0.1,
        bf16=run.bf16,
        seed=run.seed,
    )


def continues(before: dict[str, Any], done: int, run: Run, path: Path) -> bool:
    """Whether a saved state goes on to `run`: always, or UserError when it belongs to another run.

    Only `steps` may differ, while the rate is still flat under both numbers of steps.
    """
    still_flat = done <= FLAT * min(before["steps"], run.steps)
    if {**before, "steps": run.steps} != asdict(run) or (before["steps"] != run.steps and not still_flat):
        raise UserError(
            f"{path}: {done} steps were trained with {before}, asked for {asdict(run)}; "
            "use the same options or another --out"
        )
    return True


def export(directory: Path, model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the bf16 checkpoint and the tokenizer as `from_pretrained` reads them; `model` stays as it is."""
    copy = OlmoeForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    with atomic_directory(directory) as partial:
        copy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "model.safetensors").chmod(0o644)


def train(
    run: Run, corpora: Path | None, out: Path, save_minutes: float, report_every: int, compiled: bool
) -> dict[str, float]:
    """Train or resume; writes OUT/tokenizer, OUT/state, OUT/model; returns validation perplexity by domain."""
    training, validation = read_texts(corpora)
    if (out / "tokenizer").is_dir():
        tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    else:
        tokenizer = train_tokenizer((text for domain in DOMAINS for text in training[domain]), CONTEXT)
        tokenizer.save_pretrained(out / "tokenizer")
    streams = [token_stream(training[domain], tokenizer, run.seed) for domain in DOMAINS]
    held_out = {
        domain: windows(token_stream(validation[domain], tokenizer, run.seed), run.length, 6144 // run.length)
        for domain in DOMAINS
    }
    print("training tokens", dict(zip(DOMAINS, map(len, streams), strict=True)), flush=True)
    torch.manual_seed(run.seed)
    model = OlmoeForCausalLM(model_config(tokenizer))
    model.train()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {torch.get_num_threads()} threads", flush=True)
    stepped = torch.compile(model) if compiled else model
    started, recent = time.monotonic(), list[Step]()

    def losses(model: OlmoeForCausalLM, input_ids: Tensor) -> dict[str, Tensor]:
        routed.clear()
        logits = stepped(input_ids=input_ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
        balance = torch.stack([layer_balance(*output) for output in routed])
        return {"loss": loss, "balance": BALANCE * balance.sum()}

    def report(done: int) -> dict[str, float]:
        found = {domain: perplexity(model, ids) for domain, ids in held_out.items()}
        line = [f"step {done}"]
        if recent:  # none when a finished run is asked for again
            speed = len(recent) * run.batch * run.length / (time.monotonic() - started)
            loss, balance = (sum(step.terms[name] for step in recent) / len(recent) for name in ("loss", "balance"))
            line.append(f"loss {loss:.3f} balance {balance / BALANCE / len(routed):.3f}")
            line.append(f"tokens/s {speed:.0f}")
        line += ["perplexity", *(f"{domain} {value:.2f}" for domain, value in found.items())]
        print(" ".join(line), flush=True)
        return found

    def after(step: Step) -> None:
        recent.append(step)
        if step.done % report_every == 0 and step.done < run.steps:
            report(step.done)
            recent.clear()

    def saved(done: int) -> None:
        if done < run.steps:  # the last state's model is written below
            export(out / "model", model, tokenizer)

    path = out / "state" / "training.safetensors"
    state = TrainingState(
        path, asdict(run), 60 * save_minutes, lambda before, done: continues(before, done, run, path), saved
    )
    with router_outputs(model) as routed, interruption() as stop:
        run_training(
            model, losses, lambda step: draw_batch(streams, run, step), settings(run), state=state, stop=stop,
            after=after,
        )  # fmt: skip
        found = report(run.steps)
    export(out / "model", model, tokenizer)
    return found


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(prog="python -m espalier.embedded.train", description=__doc__)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--corpora", type=Path, help="directory made by `python -m espalier.embedded.corpora`")
    texts.add_argument("--smoke", action="store_true", help="train on the committed calibration excerpts instead")
    parser.add_argument("--out", type=Path, required=True, help="directory of tokenizer, state and model")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: a minute of start, 1.2x")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="wall minutes between two states")
    parser.add_argument("--report-every", type=int, default=250, help="steps between two log lines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = "committed calibration excerpts" if arguments.smoke else "full corpora"
    print(f"training on the {source}", flush=True)
    run = Run(
        arguments.steps, arguments.batch, arguments.length, arguments.rate, arguments.seed, arguments.bf16, source
    )
    try:
        train(
            run,
            arguments.corpora,
            arguments.out,
            arguments.save_minutes,
            arguments.report_every,
            arguments.compile,
        )
    except UserError as error:
        parser.exit(2, f"{error}\n")
    except InterruptedWork as stopped:
        parser.exit(128 + stopped.number, f"{stopped}\n")


if __name__ == "__main__":
    main()
