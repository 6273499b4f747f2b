"""Harmony, the form of gpt-oss: an answer is a sequence of messages, each in a channel and to a recipient.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`. A message to
`functions.NAME` is a call, and `<|call|>` ends it. The recipient stands behind the channel's name, or before both.
"""

from __future__ import annotations

import re
from collections.abc import Generator

from inflight.text.answers.json_calls import json_value
from inflight.text.answers.reader import Reader, Wait

HARMONY = "openai"
"""The name of the form, as vLLM has it."""
BEGUN = "<|start|>assistant"
"""What a prompt ends with."""
FINAL = "<|channel|>final<|message|>"
THOUGHT_BEGINS = "<|channel|>analysis<|message|>"
THOUGHT_ENDS = "<|end|>"
MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", THOUGHT_ENDS, "<|call|>", "<|return|>")

_RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<\ud800-\udfff]+)")


def begun(prompt: str) -> str | None:
    """The head of the message that the prompt has begun; None: the model begins it."""
    _, found, rest = prompt.rpartition(BEGUN)
    head, message, _ = rest.partition("<|message|>")
    return head if found and message else None


def harmony(reader: Reader) -> Generator[None, None, bool]:
    """Reads a whole answer."""
    start, channel, message = map(reader.mark, ("<|start|>", "<|channel|>", "<|message|>"))
    head = begun(reader.prompt)
    if head is not None:
        yield from _message(reader, head.replace("<|channel|>", channel), continued=True)
    while reader.buffer or not reader.ended:
        first = yield from reader.starts(start, channel, "to=")
        if first is None:
            found = yield from reader.upto([start, channel], reader.show)
            reader.buffer = (found or "") + reader.buffer
            if found is None:
                break
            continue
        if first == "to=":
            first = " to="
        read = yield from reader.head([message])
        if read is None:  # it was cut, or is no message at all
            if not reader.ended:
                yield from reader.upto([start], reader.show)
                reader.buffer = start + reader.buffer
                continue
            break
        yield from _message(reader, first + read[0])
    return True


def _message(reader: Reader, head: str, continued: bool = False) -> Wait:
    """Reads a message behind its head, or the rest of it."""
    start, channel, end, call, done = map(
        reader.mark, ("<|start|>", "<|channel|>", THOUGHT_ENDS, "<|call|>", "<|return|>")
    )
    ends = [end, call, done, start, channel]
    recipient = _RECIPIENT.search(head)
    named = recipient[1].removeprefix("functions.") if recipient is not None else ""
    if reader.looks_for_calls and recipient is not None and (named != recipient[1] or reader.knows(named)):
        reader.begin(named)
        yield from reader.white()
        if reader.buffer.startswith(tuple(ends)) or not reader.buffer:
            reader.argue("{}")
        else:
            yield from json_value(reader)
        found = yield from reader.upto(ends, lambda text: None)
    elif head.partition(channel)[2].strip().startswith("analysis"):
        reader.thought(True)
        found = yield from reader.upto(ends, reader.think)
        reader.thought(False)
    else:
        if not continued:
            reader.apart()
        found = yield from reader.upto(ends, reader.show)
    if found in (start, channel):
        reader.buffer = found + reader.buffer
