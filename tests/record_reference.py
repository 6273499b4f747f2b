"""Writes down how transformers goes on after some prompts, in float32 on the dequantised weights of real GGUF files.

    python -m tests.record_reference smollm2 gemma3

needs accelerate beside transformers. The tests read tests/data/references/NAME.json: for each prompt its tokens, the 32
that the model thinks likeliest one after the other, and the logarithm of each one's probability.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from inflight.text import load_tokenizer
from tests import real

REFERENCES = Path(__file__).parent / "data" / "references"
LENGTH = 32
PROMPTS = [
    "The three largest cities of France are",
    "Water boils at 100 degrees Celsius because",
    'def fibonacci(n):\n    """Returns the n-th number."""\n',
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
    "Question: What is 17 + 25?\nAnswer:",
    "La capitale de l'Italie est Rome, et celle de l'Espagne est",
    "Ingredients: flour, sugar, butter, eggs, salt.\n\nMethod:\n1.",
    "From: Anna\nTo: the whole team\nSubject: Friday's meeting\n\nDear all,\n\n",
]


def record(path: Path) -> list[dict[str, Any]]:
    import torch
    import transformers

    tokenizer = load_tokenizer(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # also after a token that ends a text
    recorded: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        with torch.inference_mode():
            grown = model.generate(
                torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            logits = model(grown).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
        chosen = grown[0, len(ids) :]
        assert logits.argmax(-1).equal(chosen)
        logprobs = [round(value, 5) for value in logits.gather(1, chosen[:, None])[:, 0].tolist()]
        recorded.append({"prompt": ids, "chosen": chosen.tolist(), "logprobs": logprobs})
        print(repr(prompt), "->", repr(tokenizer.decode(chosen.tolist())), flush=True)
    return recorded


def main() -> None:
    REFERENCES.mkdir(exist_ok=True)
    for name in sys.argv[1:]:
        rows = ",\n".join(json.dumps(one, separators=(",", ":")) for one in record(real.fetch(name)))
        (REFERENCES / f"{name}.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()
