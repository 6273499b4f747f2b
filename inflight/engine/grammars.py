"""Compiles grammars and computes masks of allowed tokens, both off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor

from inflight.contract import Grammar, Thought
from inflight.errors import InflightError, InvalidRequest, ModelError
from inflight.text import GrammarCompiler, Matcher, ThoughtMatcher, Tokenizer, thought_matcher

COMPILE_TIMEOUT = 10.0
"""Seconds after which a grammar is refused as too complex. The thread that compiles it ends by its own budget."""
COMPILERS = 2
"""Threads that compile, so that a slow grammar does not hold up the next one."""

Follower = Matcher | ThoughtMatcher
"""Follows one generation and says which tokens may come next."""
Masked = Callable[[list[bytes | InflightError]], None]


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

    def advance(self, steps: Items[tuple[Follower, int]], done: Masked) -> None:
        """Advances each matcher by its token and calls `done` on the loop with the masks that follow, in order."""
        future = asyncio.get_running_loop().run_in_executor(self._mask_thread, _masks, steps)
        future.add_done_callback(lambda work: None if work.cancelled() else done(work.result()))

    def close(self) -> None:
        self._compile_threads.shutdown(wait=False, cancel_futures=True)
        self._mask_thread.shutdown(wait=False, cancel_futures=True)


def _masks(steps: Items[tuple[Follower, int]]) -> list[bytes | InflightError]:
    masks: list[bytes | InflightError] = []
    for matcher, token in steps:
        try:
            matcher.advance(token)
            masks.append(matcher.mask())
        except InflightError as error:
            masks.append(error)
        except Exception as error:  # fails this generation only
            masks.append(ModelError(f"the grammar failed: {error}"))
    return masks
