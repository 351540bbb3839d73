"""Trains the embedded model from scratch: corpus, tokenizer, weights, training log.

    python -m minipaged.tiny.train --out /tmp/tiny/weights                # both stages, under 90 minutes on two cores
    python -m minipaged.tiny.train --quick --out /tmp/tiny/weights        # a smoke test of a few seconds

Without ``--out`` it replaces the committed weights and their log.  If it is interrupted, the same command goes on
from the last checkpoint.

The documents are generated while training runs, so no step sees the same story twice.  Everything is seeded; with
the same library versions the result is the same up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import WEIGHTS
from .corpus import ASSISTANT, END, EOT, SPECIAL_TOKENS, documents, held_out_documents

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)
CONTEXT = 1024
STEPS = (3000, 6000)  # of each stage
SHAPE = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)
QUICK_SHAPE = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def train_tokenizer(seed: int, vocab_size: int, sample: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every string can be encoded, and common words of the corpus are one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(islice(documents(seed), sample), trainer)
    # Training documents begin with EOT, so a plain prompt must begin with it too.
    bpe.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, bpe.token_to_id(EOT))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=EOT,
        model_max_length=CONTEXT,
        extra_special_tokens=SPECIAL_TOKENS[1:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def rows(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Iterator[list[int]]:
    """Pack documents into rows of ``length`` tokens, each beginning with a fresh document.

    What does not fit at the end of a row is dropped, so that no row begins in the middle of a document. New
    documents cost nothing here.
    """
    eot, row = tokenizer.bos_token_id, []
    while True:
        for ids in tokenizer(list(islice(texts, 256)), add_special_tokens=False)["input_ids"]:
            row += [eot, *ids]
            if len(row) >= length:
                yield row[:length]
                row = []


def batches(seed: int | str, tokenizer: PreTrainedTokenizerFast, size: int, length: int) -> Iterator[torch.Tensor]:
    """An endless stream of (size, length) token tensors."""
    stream = rows(documents(seed), tokenizer, length)
    while True:
        yield torch.tensor(list(islice(stream, size)))


def positions_in_documents(tokens: torch.Tensor, eot: int) -> torch.Tensor:
    """The position of every token in its own document."""
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    return index - torch.where(tokens == eot, index, 0).cummax(dim=1).values


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, isolate: bool = True) -> torch.Tensor:
    """Mean next-token loss of a batch, computed in bfloat16 where that is safe.

    With ``isolate``, the documents of a row do not see each other: positions begin again with each document,
    and ``transformers`` derives a block-diagonal mask from that.  Without it, a row is one long text.
    """
    positions = positions_in_documents(tokens, model.config.bos_token_id) if isolate else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def held_out_batches(tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, torch.Tensor]:
    """Per kind of document: rows of text that training never shows (see ``held_out_documents``)."""
    result = {}
    for kind in ("story", "chat", "numbers"):
        texts = iter(held_out_documents(kind, count * 48))
        result[kind] = torch.tensor(list(islice(rows(texts, tokenizer, 512), count)))
    return result


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss per token for each kind of held-out document."""
    model.eval()
    losses = {kind: round(loss_of(model, tokens).item(), 4) for kind, tokens in held_out.items()}
    model.train()
    return losses


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak; ``progress`` runs from 0 to 1."""
    if progress < warmup:
        return peak * (progress + 1e-4) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer, loadable by ``transformers``."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(torch.bfloat16)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (EOT, END)]
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(
        bos_token_id=ends[0], eos_token_id=ends, pad_token_id=ends[0], do_sample=True, temperature=0.8
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)


def new_model(tokenizer: PreTrainedTokenizerFast, quick: bool) -> LlamaForCausalLM:
    """The model with random weights."""
    end_ids = [tokenizer.convert_tokens_to_ids(token) for token in (EOT, END)]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rope_theta=10_000.0,
            bos_token_id=end_ids[0],
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
            rms_norm_eps=1e-5,
            **(QUICK_SHAPE if quick else SHAPE),
        )
    )


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon learns the matrices in far fewer steps than AdamW; embeddings and norms stay with AdamW."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(out: Path, log: Path, steps: tuple[int, int] = STEPS, seed: int = 0, quick: bool = False) -> list[dict]:
    """Run both stages and return the log entries that were also written to ``log``.

    In the first stage a row of documents is one long text: crude, but every position is trained, and the
    facts are learnt quickly.  In the second stage the documents of a row are isolated, except in every eighth
    batch.  Now the only names in sight are those of the story itself, and the model learns to keep to them.

    ``steps``: batches in each stage. ``seed``: of documents and weights. ``quick``: a very small model.

    A checkpoint is kept beside ``out``; if there is one, training goes on from it, or raises `SystemExit` if it is of
    other options.  Each part between two checkpoints has documents of its own, so a training that was interrupted sees
    the same ones as one that was not.
    """
    out.mkdir(parents=True, exist_ok=True)
    size, length = (4, 128) if quick else (4, 512)
    every, save_every = (10, 20) if quick else (50, 400)
    tokenizer = train_tokenizer(seed, 600 if quick else 2560, 300 if quick else 30_000)
    torch.manual_seed(seed)
    model = new_model(tokenizer, quick)
    optimizers = new_optimizers(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)

    entries: list[dict] = []
    done, seconds = 0, 0.0
    checkpoint = out.parent / f"{out.name}.checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        if saved["run"] != (steps, seed, quick):
            raise SystemExit(f"{checkpoint} is from a run with other options; delete it, or choose another --out")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        entries, done, seconds = saved["entries"], saved["done"], saved["seconds"]
        print(f"continuing after step {done}", flush=True)

    held_out = held_out_batches(tokenizer, 2 if quick else 6)
    start, recent = time.time() - seconds, []
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    while done < sum(steps):
        if done % save_every == 0:
            short = batches(f"{seed} {done}", tokenizer, size, length)
            long = batches(f"{seed} {done} long", tokenizer, size // 2, 2 * length)
        stage = 1 if done < steps[0] else 2
        step = done if stage == 1 else done - steps[0]
        isolate = stage == 2 and step % 8 != 7
        # The first stage ends half-way down its cosine; the second has one of its own.
        rate = learning_rate(step / steps[stage - 1] / (2 if stage == 1 else 1), 1.5e-3)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        loss = loss_of(model, next(short if isolate or stage == 1 else long), isolate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        done += 1
        if done % every and done < sum(steps):
            continue
        entry: dict = {
            "stage": stage,
            "step": done,
            "tokens": done * size * length,
            "seconds": round(time.time() - start, 1),
            "lr": round(rate, 6),
            "loss": round(sum(recent) / len(recent), 4),
        }
        entries.append(entry)
        recent = []
        if done % save_every == 0 or done == sum(steps):
            entry["held_out"] = held_out_loss(model, held_out)
            save(model, tokenizer, out)
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            position = {"run": (steps, seed, quick), "done": done, "seconds": time.time() - start, "entries": entries}
            torch.save(state | position, part := checkpoint.with_suffix(".part"))
            part.replace(checkpoint)  # in one go: whenever it is interrupted, there is a whole checkpoint
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
    checkpoint.unlink()
    return entries


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser("python -m minipaged.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="directory for weights and tokenizer")
    parser.add_argument("--log", type=Path, help="training log (default: next to the output directory)")
    parser.add_argument("--steps", type=int, nargs=2, help=f"steps of each stage (default: {STEPS[0]} {STEPS[1]})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a very small model for a few seconds")
    args = parser.parse_args()
    log = args.log or args.out.parent / "training_log.jsonl"
    steps = tuple(args.steps or ((30, 30) if args.quick else STEPS))
    train(args.out, log, steps, args.seed, args.quick)


if __name__ == "__main__":
    main()
