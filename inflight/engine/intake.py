"""Checks requests and turns them into sequences that the scheduler can plan."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

from inflight.admission import Admission
from inflight.checkpoint import is_classifier, open_model, read_sentence_model
from inflight.config import GeneratorConfig
from inflight.contract import EncodedImage, GenerationRequest, GeneratorInfo, PoolingInfo, SeenImage, Span, Vision
from inflight.engine.adapters import Adapters
from inflight.engine.async_tokenizer import LONG, AsyncTokenizer
from inflight.engine.checks import token_ids
from inflight.engine.embedding import Embedder, check_wanted
from inflight.engine.grammars import Follower, Grammars
from inflight.engine.images import Images, Prompt, truncated
from inflight.engine.lanes import Lanes
from inflight.errors import OVERLOADED, InvalidRequest, Overloaded, TooLong
from inflight.sched import Sequence
from inflight.text import Tokenizer

LONGEST_TEXT = 16
"""Characters per token, the upper limit of a text's average: longer texts are refused before they are encoded."""


class Intake:
    """Encodes prompts, compiles grammars and makes sequences.

    Args:
        config: the model, limits, policies.
        tokenizer: of the model.
        admission: charged for the time spent on requests that are refused.
        grammars: compiles the requests' grammars.
        vision: encodes images; None: the model reads text only.

    Attributes:
        unit_vectors: the model's embeddings have length 1.
        images: of the prompts.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        tokenizer: Tokenizer,
        admission: Admission,
        grammars: Grammars,
        vision: Vision | None,
        adapters: Adapters,
    ) -> None:
        self._adapters = adapters
        self._allows_grammars = config.limits.grammars
        self._tokenizer = tokenizer
        self._admission = admission
        self._grammars = grammars
        self.images = Images(config.name, vision)
        self._async_tokenizer = AsyncTokenizer(tokenizer)
        self._folder = config.model.model_dir
        sentences = read_sentence_model(config.model.model_dir)
        self._embedder = Embedder(sentences, tokenizer, config.model.pooling)
        self.unit_vectors = sentences is None or sentences.unit
        self._next_id = 0

    def pooling(self, whole_texts: bool) -> PoolingInfo:
        """What the model computes of texts. Args: whole_texts: it is an encoder."""
        classifier: PoolingInfo | None = None
        config = open_model(self._folder).config
        if is_classifier(config):
            from inflight.models import classifier_info  # only classifiers' servers need it

            classifier = classifier_info(config)
        return self._embedder.info(whole_texts, classifier)

    def close(self) -> None:
        """Stops the tokenizer's threads; requests that wait for them fail."""
        self._async_tokenizer.close()

    async def prompt(self, request: GenerationRequest, info: GeneratorInfo, lanes: Lanes) -> Prompt:
        """Encodes, truncates and checks a prompt and its images. Images in front whose keys are cached are not encoded
        again.

        Raises:
            InvalidRequest: the prompt is empty or too long, or has tokens that the model does not know; an image cannot
                be read.
            Overloaded: too many long texts wait for the tokenizer, or too many images.
            DeadlineExceeded: the images took longer than the request's timeout.
        """
        limits = info.limits
        self.images.check(request)
        if request.media:
            self._check(request, info)  # before the images, which cost more
        if request.embed and request.pair is not None:
            return await self._pair(request, info)
        if isinstance(request.prompt, str):
            if request.embed:
                request = replace(request, prompt=self._embedder.text(request))
            most = limits.max_input_tokens * LONGEST_TEXT * 8
            if not self._cuts(request) and len(request.prompt) > most:
                raise _too_long(limits.max_input_tokens, f"{len(request.prompt)} characters")
        request = await self.images.fetched(request)
        images = await self.images.wanted(request)
        prompt = (await self._placed(request, images, info))._replace(images=images, media=request.media)
        if not any(isinstance(image, SeenImage) for image in images):
            return prompt
        if lanes.covers(self._trial(request, prompt, info)):
            self.images.skipped(images)
            return prompt
        return prompt._replace(images=await self.images.encode(request))

    async def _pair(self, request: GenerationRequest, info: GeneratorInfo) -> Prompt:
        """The tokens of two texts as one prompt. Raises as `prompt`."""
        self._check(request, info)
        assert isinstance(request.prompt, str)
        assert request.pair is not None
        cuts, most = self._cuts(request), info.limits.max_input_tokens
        longest = min(most, request.truncate or most)
        characters = len(request.prompt) + len(request.pair)
        if not cuts and characters > most * LONGEST_TEXT * 8:
            raise _too_long(most, f"{characters} characters")
        if characters > LONG and self._async_tokenizer.long > self._admission.limit // 4:
            raise Overloaded(OVERLOADED)
        left = self._embedder.cuts_left
        if self._embedder.writes_pairs:
            return Prompt(await self._in_words(request, longest if cuts else None, most, info))
        tokens, second = await self._async_tokenizer.pair(request.prompt, request.pair, longest if cuts else None, left)
        if len(tokens) > most:
            raise _too_long(most, str(len(tokens)))
        self._tokenizer.check(tokens, info.vocab_size)
        return Prompt(tokens, second=second)

    async def _in_words(
        self, request: GenerationRequest, longest: int | None, most: int, info: GeneratorInfo
    ) -> list[int]:
        """The tokens of a pair in the words of the chat template.

        Args:
            longest: the document is cut until the whole has at most so many tokens; None: it is not cut.
            most: of a pair.
        """
        assert request.pair is not None
        tokens = await self._of_template(self._embedder.pair(request, request.pair))
        if longest is not None and len(tokens) > longest:
            pieces = await self._async_tokenizer.pieces(request.pair)
            around, room = len(await self._of_template(self._embedder.pair(request, ""))), len(pieces)
            while len(tokens) > longest:
                room = min(room - (len(tokens) - longest), longest - around)
                if room < 1:
                    raise InvalidRequest(f"{longest} tokens are too few for this query; truncate to more")
                short = request.pair[: pieces[room - 1].stop]
                tokens = await self._of_template(self._embedder.pair(request, short))
        if len(tokens) > most:
            raise _too_long(most, str(len(tokens)))
        self._tokenizer.check(tokens, info.vocab_size)
        return tokens

    async def _of_template(self, text: str) -> list[int]:
        return (await self._async_tokenizer.encode(text, False, None)).tokens

    async def _placed(
        self, request: GenerationRequest, images: Items[EncodedImage | SeenImage], info: GeneratorInfo
    ) -> Prompt:
        """The tokens of a prompt with its images in their places. Raises as `prompt`."""
        limits = info.limits
        spans: tuple[Span, ...] = ()
        if isinstance(request.prompt, str):
            if images:
                if self.images.length(images) > limits.max_input_tokens:
                    raise _too_long(limits.max_input_tokens, f"{self.images.length(images)} tokens of images")
                request = self.images.written(request, images)
            tokens = await self._encoded(request, limits.max_input_tokens)
            spans = self.images.spans(tokens, images)
        else:
            tokens = token_ids(request.prompt)
        if request.embed:
            tokens = self._embedder.cut(tokens, request, limits.max_input_tokens)
        elif request.truncate is not None:
            tokens, spans = truncated(tokens, spans, request.truncate)
        if not tokens:
            raise InvalidRequest("`inputs` cannot be empty")
        if len(tokens) > limits.max_input_tokens:
            raise _too_long(limits.max_input_tokens, str(len(tokens)))
        tokens = self.images.known(tokens, spans, info.vocab_size)
        self._tokenizer.check(tokens, info.vocab_size)
        return Prompt(tokens, spans)

    def _trial(self, request: GenerationRequest, prompt: Prompt, info: GeneratorInfo) -> Sequence:
        """A sequence that shares blocks as the request's own will."""
        adapter = self._adapters.number(request.adapter)
        return Sequence(
            0,
            prompt.tokens,
            request.sampling,
            1,
            tenant=request.tenant,
            adapter=adapter,
            content=self._adapters.content(adapter),
            spans=prompt.spans,
            images=prompt.images,
        )

    async def follower(self, request: GenerationRequest, info: GeneratorInfo) -> tuple[Follower, bytes] | None:
        """Compiles the request's grammar and the rule of its thought to what follows the generation, and the mask of
        the first token; None where neither says anything about a token.

        Raises:
            InvalidRequest: the grammar is wrong, or this server allows none.
        """
        thought = request.thought
        if request.grammar is None:
            if thought is None or (thought.budget is None and (thought.stops or not request.stop)):
                return None
            return await self._grammars.open(None, info.vocab_size, thought)
        if not self._allows_grammars:
            raise InvalidRequest("this server was started without support of grammars; leave it out")
        return await self._grammars.open(request.grammar, info.vocab_size, thought)

    def sequence(self, request: GenerationRequest, prompt: Prompt, info: GeneratorInfo, lanes: Lanes) -> Sequence:
        """Makes the sequence of a request.

        Raises:
            InvalidRequest: the model cannot do what is asked, or the cache can never hold the sequence.
        """
        self._check(request, info)
        total, length = info.limits.max_total_tokens, len(prompt.tokens)
        new = 1 if request.embed else request.max_new_tokens
        if new is None or (request.fit and length + new > total):
            new = total - length
        if length + new > total:
            raise TooLong(
                f"`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {length} `inputs` tokens and "
                f"{new} `max_new_tokens`",
                total,
                length,
                new,
            )
        fault = request.sampling.fault(info.vocab_size)
        if fault is not None:
            raise InvalidRequest(fault)
        lanes.check(length, new)
        self._next_id += 1
        sampling, adapter = request.sampling, self._adapters.number(request.adapter)
        if request.embed:
            sampling = self._embedder.sampling(request, prompt.second)
        return Sequence(
            self._next_id,
            prompt.tokens,
            sampling,
            new,
            priority=request.priority,
            tenant=request.tenant,
            adapter=adapter,
            content=self._adapters.content(adapter),
            spans=prompt.spans,
            images=prompt.images,
        )

    def _check(self, request: GenerationRequest, info: GeneratorInfo) -> None:
        """Checks what a request asks for, whatever its prompt is.

        Raises:
            InvalidRequest: the model cannot do it.
        """
        new = request.max_new_tokens
        if request.embed:
            check_wanted(request, info)
        elif not info.generates:
            told = "embeds texts and writes none; use /v1/embeddings"
            if info.pooling is not None and info.pooling.kind != "embedding":
                told = "scores texts and writes none; use /rerank, /score or /classify"
            raise InvalidRequest(f"this model {told}")
        if not request.embed and new is not None and (not isinstance(new, int) or new < 1):
            raise InvalidRequest(f"`max_new_tokens` must be a whole number of at least 1. Given: {new}")
        if request.media:
            self._adapters.number(request.adapter)
            fault = request.sampling.fault(info.vocab_size)
            if fault is not None:
                raise InvalidRequest(fault)

    def _cuts(self, request: GenerationRequest) -> bool:
        """Whether a prompt that is too long is cut instead of refused."""
        return self._embedder.cuts(request) if request.embed else request.truncate is not None

    async def _encoded(self, request: GenerationRequest, most: int) -> list[int]:
        """Encodes a text prompt of at most `most` tokens, or of any length if the request truncates it."""
        assert isinstance(request.prompt, str)
        if len(request.prompt) > LONG and self._async_tokenizer.long > self._admission.limit // 4:
            raise Overloaded(OVERLOADED)  # long texts may occupy only a quarter of the places
        wanted = None if self._cuts(request) else most
        tokens, whole, seconds = await self._async_tokenizer.encode(request.prompt, request.add_special_tokens, wanted)
        if not whole or (wanted is not None and len(tokens) > wanted):
            self._admission.wasted(seconds)
        if not whole:
            raise _too_long(most, f"more than {len(tokens)}")
        return tokens


def _too_long(most: int, given: str) -> TooLong:
    return TooLong(f"`inputs` must have less than {most} tokens. Given: {given}", most, given)
