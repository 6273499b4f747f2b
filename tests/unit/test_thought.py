"""Thoughts of a generation: what is written up to their end, at it and behind it, whatever else is computed.

The noise of a draw depends on the seed and the position only, so what a bounded generation must say can be put together
of free ones that go on from its parts.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonschema
import pytest

from inflight.contract import FinishReason, GenerationRequest, Grammar, Mark, Sampling, Thought, Whole, together, whole
from inflight.errors import InvalidRequest
from inflight.llm import LLM
from inflight.text import json_grammar

POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket"
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
OBJECT = json_grammar(SCHEMA)
BEHIND = Grammar("lark", "start: /\\n{0,2}/ %json @0@\n", schemas=(json.dumps(SCHEMA),))
"""Line ends may stand between a thought and its answer."""
CLOSE = Mark("<|pad|>", 0)
"""A token that the model never writes by itself."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(POCKET, kv_cache_memory=8 << 20, threads=2, max_batch_size=16, max_total_tokens=512) as made:
        yield made


def run(llm: LLM, requests: Sequence[GenerationRequest], losses: int = 0) -> list[Whole]:
    """Runs requests together; meanwhile the ranks are lost that many times."""

    async def lose() -> None:
        for _ in range(losses):
            await asyncio.sleep(0.05)
            await llm.engine._executors[0].abort()

    async def both() -> list[Whole]:
        losing = asyncio.ensure_future(lose())
        found = await together(whole(llm.engine, request) for request in requests)
        await losing
        return found

    return llm._call(both())


def free(llm: LLM, tokens: Sequence[int], seed: int, count: int, grammar: Grammar | None = None) -> list[int]:
    return ids(run(llm, [freely(tokens, seed, count, grammar)])[0])


def freely(tokens: Sequence[int], seed: int, count: int, grammar: Grammar | None = None) -> GenerationRequest:
    return GenerationRequest(list(tokens), sampling(seed), count, ignore_eos=True, grammar=grammar)


def sampling(seed: int) -> Sampling:
    return Sampling(do_sample=True, temperature=1.0, seed=seed)


def ids(answer: Whole) -> list[int]:
    return [token.info.id for token in answer.tokens]


def test_budgets_to_the_token_alone_in_a_crowd_and_after_losses(llm: LLM) -> None:
    tokenizer = llm.engine._tokenizer
    line = tokenizer.encode("\n", add_special_tokens=False)[0]
    forced = (0, line)
    budgets = (0, 1, 2, 3, 7, 15, 16, 17, 30, 40, 44, 47)
    prompts = [tokenizer.encode(f"Once upon a time number {seed}") for seed in range(len(budgets))]
    free_ones = run(llm, [freely(prompt, seed, 48) for seed, prompt in enumerate(prompts)])
    requests, heads, rests = [], [], []
    for seed, (prompt, budget, written) in enumerate(zip(prompts, budgets, map(ids, free_ones))):
        opened = None
        thought, grammar = written[:budget], None
        if seed % 3 == 1:  # the model opens its thought
            opened, thought = Mark("it", written[0]), written[: budget + 1]
        if seed % 2:
            grammar = OBJECT
            if 2 in thought:  # an end in the thought ends the thought only
                thought = thought[: thought.index(2) + 1]
        head = [*thought, *forced][:48]
        heads.append(head)
        rests.append(freely([*prompt, *head], seed, max(1, 48 - len(head)), grammar))
        rule = Thought(opened, CLOSE, forced, budget)
        requests.append(GenerationRequest(prompt, sampling(seed), 48, ignore_eos=True, grammar=grammar, thought=rule))
    wanted = [[*head, *ids(rest)][:48] for head, rest in zip(heads, run(llm, rests))]
    for request, tokens in zip(requests[:4], wanted):
        assert ids(run(llm, [request])[0]) == tokens
    assert [ids(one) for one in run(llm, requests)] == wanted
    assert [ids(one) for one in run(llm, requests, losses=2)] == wanted
    for request, answer in zip(requests, run(llm, requests)):
        if request.grammar is not None and answer.finish.reason is FinishReason.EOS:
            said = answer.finish.text.partition("\n")[2]
            jsonschema.validate(json.loads(said), SCHEMA)


def test_a_thought_that_ends_by_itself_and_the_answer_that_is_bound(llm: LLM) -> None:
    """Marks as tokens and in the text; the budget is not reached, or the model opens no thought."""
    tokenizer = llm.engine._tokenizer
    prompt = tokenizer.encode("Once upon a time")
    written = free(llm, prompt, 5, 40)
    text = tokenizer.decode(written)
    place = next(index for index in range(12, 40) if written[index] not in written[:index])
    token = Mark("it", written[place])
    bound = free(llm, [*prompt, *written[: place + 1]], 5, 60, BEHIND)
    spoken = text.strip()[:9]  # the text that the model begins with
    assert spoken
    ended = next(end for end in range(1, 40) if " ".join(text.split()[2:4]) in tokenizer.decode(written[:end]))
    word = Mark(" ".join(text.split()[2:4]))
    behind = free(llm, [*prompt, *written[:ended]], 5, 60, BEHIND)
    cases = [
        (Thought(None, token), [*written[: place + 1], *bound]),
        (Thought(Mark("it", written[0]), token, budget=40), [*written[: place + 1], *bound]),
        (Thought(Mark(spoken), token), [*written[: place + 1], *bound]),
        (Thought(None, word), [*written[:ended], *behind]),
        (Thought(CLOSE, token), free(llm, prompt, 5, 60, OBJECT)),  # none is opened: the grammar binds at once
        (Thought(Mark("<thinking>"), token), free(llm, prompt, 5, 60, OBJECT)),
    ]
    requests = [GenerationRequest(prompt, sampling(5), 90, grammar=OBJECT, thought=thought) for thought, _ in cases]
    for (thought, tokens), answer in zip(cases, run(llm, requests)):
        found = ids(answer)
        if thought.open is not None and thought.open.text == "<thinking>":
            # Tokens that begin this mark may come too.
            said = answer.finish.text.lstrip()
            assert said.startswith(("{", "<thinking>"))
            jsonschema.validate(json.loads(said[said.index("{") :]), SCHEMA)
            continue
        assert found == tokens[: len(found)], thought
        assert len(found) == min(90, len(tokens)), thought


def test_stop_texts_do_not_end_a_thought(llm: LLM) -> None:
    tokenizer = llm.engine._tokenizer
    prompt = tokenizer.encode("Once upon a time")
    written = free(llm, prompt, 3, 30)
    text = tokenizer.decode(written)
    stop = text[10:13]
    assert stop in text
    rules = [
        Thought(None, CLOSE, (0,), 20),
        Thought(None, CLOSE, (0,), 20, stops=True),
        Thought(Mark("it", written[0]), CLOSE),
        Thought(Mark("never", 5), CLOSE),
    ]
    requests = [GenerationRequest(prompt, sampling(3), 30, (stop,), ignore_eos=True, thought=rule) for rule in rules]
    bounded, asked, opened, plain = run(llm, requests)
    assert ids(bounded)[:21] == [*written[:20], 0]
    assert asked.finish.stop == stop
    assert ids(opened) == written
    assert opened.finish.text == text
    assert plain.finish.stop == stop
    assert "".join(token.delta for token in bounded.tokens) + bounded.finish.delta == bounded.finish.text


def test_an_end_that_the_model_cannot_write_is_told(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no token that ends its thought"):
        run(llm, [GenerationRequest("Once", thought=Thought(None, Mark("x", 99_999), budget=3))])
