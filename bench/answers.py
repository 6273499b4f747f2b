"""What reading an answer costs: tokens through the reader of a form, and what 32 streams make of it.

    python -m bench.answers [--tokens 20000]

Each answer is one long text in short tokens, read as it arrives: `text` where calls may follow whose marks are texts or
tokens, `thought` in a thought, `call` in the arguments of a call. `plain` is the reader of a model without a form. The
share is of one core, at 32 streams of 30 tokens a second.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

from inflight.contract import AnswerForm, Finish, FinishReason, Token, TokenInfo
from inflight.text import find_form, open_reader

STREAMS, RATE, ROUNDS = 32, 30, 5
WORDS = ["the", "answer", "is", "long", "and", "has", "<", "marks,", "[lists]", "and", "{braces}", "in", "it", ""]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
CASES = (
    ("plain", None, None, "", ""),
    ("text, hermes", "hermes", "qwen3", "", ""),
    ("text, mistral", "mistral", None, "", ""),
    ("thought, qwen3", "hermes", "qwen3", "<think>", ""),
    ("text, gpt-oss", "openai", "openai", "<|channel|>final<|message|>", ""),
    ("call, hermes", "hermes", None, '<tool_call>{"name": "f", "arguments": {"a": "', '"}}</tool_call>'),
    (
        "call, qwen3_coder",
        "qwen3_coder",
        None,
        "<tool_call><function=f><parameter=a>",
        "</parameter></function></tool_call>",
    ),
)


def tokens_of(form: AnswerForm, begin: str, end: str, count: int) -> list[Token]:
    """The answer in tokens; the marks that are one are tokens of their own."""
    ids = {mark.text: mark.id for mark in form.marks if mark.id is not None}
    texts = [begin] if begin and begin not in ids else []
    tokens = [Token(TokenInfo(ids[begin], begin), begin)] if begin in ids else []
    texts += [f" {WORDS[n % len(WORDS)]}" for n in range(count)] + [end]
    return tokens + [Token(TokenInfo(1, text), text) for text in texts if text]


def measured(form: AnswerForm, tokens: list[Token]) -> float:
    """Microseconds a token, the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        reader = open_reader(form, "", [TOOL])
        began = time.perf_counter()
        for token in tokens:
            reader.feed(token)
        reader.finish(Finish(FinishReason.EOS, ""))
        best = min(best, time.perf_counter() - began)
    return best / len(tokens) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    given = parser.parse_args()
    print(f"{given.tokens} tokens, one thread, best of {ROUNDS}\n")
    print("| answer | marks are | a token, µs | share of a core at 32 streams |\n|---|---|---|---|")
    rows = []
    for name, calls, thoughts, begin, end in CASES:
        form = find_form(None, lambda text: None, calls, thoughts)
        for kind in ("texts", "tokens") if form.marks else ("-",):
            marks = tuple(replace(mark, id=100_000 + n) for n, mark in enumerate(form.marks))
            used = replace(form, marks=marks) if kind == "tokens" else form
            if kind == "tokens" and name.startswith(("call", "text, gpt")):
                continue  # their beginning is several marks
            cost = measured(used, tokens_of(used, begin, end, given.tokens))
            share = cost * STREAMS * RATE / 1e4
            rows.append({"answer": name, "marks": kind, "us": round(cost, 2), "share": round(share, 2)})
            print(f"| {name} | {kind} | {cost:.1f} | {share:.2f} % |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
