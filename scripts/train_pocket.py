"""Trains the pocket model: a small Llama that tells stories and answers questions about Inflight.

    python scripts/train_pocket.py train models/pocket          about 25 minutes on 2 cores
    python scripts/train_pocket.py evaluate models/pocket       figures of the model card

Deterministic: text, initial weights and order come from one seed. Rounding differs between machines, so that another
machine gives another model of the same quality.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pocket_text as text
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
VOCABULARY = 2048
LENGTH = 256
"""Tokens of a training row."""
ROWS = 16
STEPS = 2600
WARM = 60
CONTEXT = 1024
"""Positions that the config allows; rotary positions work well beyond the length of the training rows."""

CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.05,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the training text, numbers digit by digit."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(text.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = text.samples(SEED)
    bpe.train_from_iterator((turn.text for _ in range(6000) for turn in next(source).turns), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{text.BEGIN} $A", special_tokens=[(text.BEGIN, bpe.token_to_id(text.BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=text.BEGIN,
        eos_token=text.END,
        pad_token=text.PAD,
        extra_special_tokens=list(text.ROLES.values()),
        chat_template=text.TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, validation: bool = False) -> Iterator[torch.Tensor]:
    """Rows [ROWS, LENGTH + 1] of documents one after the other."""
    source = text.samples(seed, validation=validation)
    waiting: list[int] = []
    need = ROWS * (LENGTH + 1)
    while True:
        while len(waiting) < need:
            waiting += tokenizer.encode(next(source).render(), add_special_tokens=False)
        yield torch.tensor(waiting[:need]).view(ROWS, LENGTH + 1)
        waiting = waiting[need:]


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 8) -> float:
    source = batches(tokenizer, SEED + 1, validation=True)
    with torch.inference_mode():
        return sum(loss_of(model, next(source)).item() for _ in range(count)) / count


def train(folder: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(CONFIG)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    # Matrices between layers learn by Muon (Jordan et al., 2024), the table of tokens and the norms by AdamW.
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    source = batches(tokenizer, SEED)
    began, shown = time.perf_counter(), 0.0
    for step in range(steps):
        rate = min((step + 1) / WARM, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, full in zip(groups, rates):
            group["lr"] = full * rate
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        shown = loss.item() if not step else 0.97 * shown + 0.03 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            rate = (step + 1) * ROWS * LENGTH / seconds
            print(f"step {step} loss {shown:.3f} {seconds:.0f} s, {rate:.0f} tokens/s", flush=True)
    print(f"held-out loss {held_out_loss(model, tokenizer):.3f}", flush=True)
    save(folder, model, tokenizer)


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    card = folder / "README.md"
    kept = card.read_text() if card.is_file() else None
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kept is not None:
        card.write_text(kept)


def evaluate(folder: Path, count: int) -> None:
    """Prints held-out loss, the share of exactly right answers, and of generations that end by themselves."""
    from inflight import LLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    figures: dict[str, float] = {"held_out_loss": round(held_out_loss(model, tokenizer), 3)}
    rng = random.Random(SEED + 2)
    asked = [text.from_any(rng) for _ in range(count)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one.question}], tokenize=False, add_generation_prompt=True
        )
        for one in asked
    ]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    with LLM(folder, kv_cache_memory=256 << 20) as llm:
        found = llm.generate(ids, max_new_tokens=320)
    ended = sum(one.finish_reason.value == "eos_token" for one in found)
    figures["ended_by_itself"] = round(ended / count, 4)
    exact = [(one, got) for one, got in zip(asked, found) if one.right]
    right = sum(got.text.strip() in one.right for one, got in exact)
    figures["exact_answers"] = round(right / len(exact), 4)
    figures["questions"] = len(exact)
    print(json.dumps(figures, indent=1))
    for one, got in exact:
        if got.text.strip() not in one.right:
            print(f"- {one.question!r}: {got.text.strip()!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "evaluate"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--questions", type=int, default=400)
    options = parser.parse_args()
    if options.what == "train":
        train(options.folder, options.steps)
    else:
        evaluate(options.folder, options.questions)


if __name__ == "__main__":
    main()
