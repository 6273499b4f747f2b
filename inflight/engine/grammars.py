"""Compiles grammars and computes masks of allowed tokens, both off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from inflight.contract import Grammar, Thought
from inflight.errors import InflightError, InvalidRequest, ModelError
from inflight.sched import guess
from inflight.text import GrammarCompiler, Matcher, ThoughtMatcher, Tokenizer, thought_matcher

COMPILE_TIMEOUT = 10.0
"""Seconds after which a grammar is refused as too complex. The thread that compiles it ends by its own budget."""
COMPILERS = 2
"""Threads that compile, so that a slow grammar does not hold up the next one."""

Follower = Matcher | ThoughtMatcher
"""Follows one generation and says which tokens may come next."""


@dataclass(frozen=True)
class Step:
    """What one generation's follower is asked for.

    Attributes:
        tokens: those that came since the last time.
        known: all tokens, prompt first.
        forced: tokens of a draft that the grammar forces, at most; guesses: that are guessed, at most.
    """

    follower: Follower
    tokens: Items[int]
    known: Items[int] = ()
    forced: int = 0
    guesses: int = 0


class Next(NamedTuple):
    """What may follow: `Sequence.mask`, `Sequence.draft` and `Sequence.forced`."""

    mask: bytes
    draft: Items[tuple[int, bytes]] = ()
    forced: int = 0


Advanced = Callable[[list[Next | InflightError]], None]


class Grammars:
    """The grammars of one model. The tokenizer's tokens are prepared with the first: it takes a moment."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiler: asyncio.Future[GrammarCompiler] | None = None
        self._compile_threads = ThreadPoolExecutor(COMPILERS, "grammar-compile")
        self._mask_thread = ThreadPoolExecutor(1, "grammar-mask")

    async def open(
        self, grammar: Grammar | None, vocab_size: int, thought: Thought | None = None
    ) -> tuple[Follower, bytes]:
        """Compiles a grammar to a matcher for one generation and the mask of its first token.

        Args:
            grammar: None: the text is free, and only its thought is followed.
            vocab_size: number of logits of the model; the same in every call.
            thought: the grammar binds what stands behind it.

        Raises:
            InvalidRequest: the grammar is wrong, or takes too long to compile.
        """
        loop = asyncio.get_running_loop()
        if grammar is None:
            assert thought is not None
            follower = thought_matcher(thought, self._tokenizer, vocab_size)
            return follower, follower.start()
        if self._compiler is None:
            self._compiler = loop.run_in_executor(self._compile_threads, self._tokenizer.grammars, vocab_size)
        compiler = await asyncio.shield(self._compiler)

        def compile() -> tuple[Follower, bytes]:
            matcher = compiler.compile(grammar)
            if thought is None:
                return matcher, matcher.mask()
            follower = thought_matcher(thought, self._tokenizer, vocab_size, matcher, compiler)
            return follower, follower.start()

        work = loop.run_in_executor(self._compile_threads, compile)
        try:
            return await asyncio.wait_for(work, COMPILE_TIMEOUT)
        except asyncio.TimeoutError:
            raise InvalidRequest(
                f"the grammar was not compiled within {COMPILE_TIMEOUT:g} seconds; make it simpler"
            ) from None

    def advance(self, steps: Items[Step], done: Advanced) -> None:
        """Advances each matcher by its tokens and calls `done` on the loop with what follows, in order."""
        future = asyncio.get_running_loop().run_in_executor(self._mask_thread, _advanced, steps)
        future.add_done_callback(lambda work: None if work.cancelled() else done(work.result()))

    def close(self) -> None:
        self._compile_threads.shutdown(wait=False, cancel_futures=True)
        self._mask_thread.shutdown(wait=False, cancel_futures=True)


def _advanced(steps: Items[Step]) -> list[Next | InflightError]:
    found: list[Next | InflightError] = []
    for step in steps:
        try:
            for token in step.tokens:
                step.follower.advance(token)
            found.append(_next(step))
        except InflightError as error:
            found.append(error)
        except Exception as error:  # fails this generation only
            found.append(ModelError(f"the grammar failed: {error}"))
    return found


def _next(step: Step) -> Next:
    """The draft is what the grammar forces, then what the text itself says of the tokens behind."""
    mask, likely = step.follower.mask(), step.follower.forced()[: step.forced] if step.forced else []
    forced = len(likely)
    if step.guesses and forced < step.forced:
        likely += guess(np.array([*step.known, *likely], np.int32), step.guesses).tolist()
    draft = step.follower.along(likely) if likely else ()
    return Next(mask, draft, min(forced, len(draft)))
