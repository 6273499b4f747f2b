"""Prepares texts and pairs that a model reads whole: adds its prompts, truncates, says what it cannot compute."""

from __future__ import annotations

from functools import cached_property

from inflight.checkpoint import SentenceModel, pooled_as
from inflight.contract import Chat, GenerationRequest, GeneratorInfo, Pooled, PoolingInfo, Sampling
from inflight.errors import InvalidRequest, TemplateError, Unable
from inflight.text import Tokenizer

_WHAT: dict[Pooled, str] = {
    "embed": "embeddings", "tokens": "vectors of tokens", "sparse": "sparse vectors", "scores": "scores",
}  # fmt: skip


def check_wanted(request: GenerationRequest, info: GeneratorInfo) -> None:
    """Checks what is asked of a text.

    Raises:
        Unable: the model does not compute it.
        InvalidRequest: a pair of which one is token ids.
    """
    tasks = info.pooling.tasks if info.pooling is not None and info.embedding_size else ()
    if request.pooled not in tasks:
        given = " and ".join(_WHAT[task] for task in tasks)
        raise Unable(f"this model gives no {_WHAT[request.pooled]}" + (f"; it gives {given}" if given else ""))
    if request.pair is None:
        return
    if request.pooled != "scores":
        raise Unable(f"this model gives no {_WHAT[request.pooled]} of a pair; send its texts one by one")
    if not isinstance(request.prompt, str):
        raise InvalidRequest("a pair is two texts; its first one is given as token ids")


class Embedder:
    """Prepares the requests of one model as sentence-transformers does for the same folder.

    Args:
        model: the folder's settings of embeddings; None if it has none.
        pooling: in place of the folder's, or where it says nothing.
    """

    def __init__(self, model: SentenceModel | None, tokenizer: Tokenizer, pooling: str | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._asked = pooling
        self._pooling = pooling or ("mean" if model is not None and model.poolings == ("mean",) else "last")
        self._lengths: dict[str, int] = {}

    @property
    def cuts_left(self) -> bool:
        """Whether a text that is too long keeps its end."""
        return self._model is not None and self._model.cut_left

    def info(self, whole_texts: bool, classifier: PoolingInfo | None) -> PoolingInfo:
        """What the model computes of texts.

        Args:
            whole_texts: it is an encoder.
            classifier: what its head is, if it has one.
        """
        if classifier is not None and classifier.tasks:
            return classifier
        if self._model is not None and self._model.score is not None:
            return PoolingInfo("reranker", "lasttoken", ("LABEL_0",), ("scores",))
        if not whole_texts:
            meant = self._model is not None or self._asked is not None
            return PoolingInfo("embedding", "lasttoken" if self._pooling == "last" else self._pooling, meant=meant)
        model = pooled_as(self._model, self._asked)
        tasks: tuple[Pooled, ...] = ("embed", "tokens") if model.splade is None else ("sparse",)
        return PoolingInfo("embedding", "+".join(model.poolings), tasks=tasks)

    def text(self, request: GenerationRequest) -> str:
        """The text with its prompt before it.

        Raises:
            InvalidRequest: there is no prompt of that name.
        """
        assert isinstance(request.prompt, str)
        return self._prompt(request) + request.prompt

    @cached_property
    def writes_pairs(self) -> bool:
        """Whether the chat template writes messages of the roles `query` and `document`, as those of rerankers do."""
        marks = {"query": "aqueryx", "document": "adocumentx"}
        try:
            written = self._written(marks["query"], marks["document"], "")
        except (TemplateError, InvalidRequest):
            return False
        return all(mark in written for mark in marks.values())

    def pair(self, request: GenerationRequest, document: str) -> str:
        """A pair in the chat template's words; the model's prompt is the system's message.

        Raises:
            InvalidRequest: there is no prompt of that name, or the template refuses the pair.
        """
        assert isinstance(request.prompt, str)
        return self._written(request.prompt, document, self._prompt(request))

    def _written(self, query: str, document: str, prompt: str) -> str:
        template = self._tokenizer.chat
        if template is None:
            raise TemplateError("the model has no chat template")
        said: list[dict[str, object]] = [{"role": "system", "content": prompt}] if prompt else []
        said += [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return template.render(Chat(said))

    def cuts(self, request: GenerationRequest) -> bool:
        """Whether a text that is too long is cut instead of refused."""
        if request.truncate is not None or request.cut is None:
            return request.truncate is not None or (self._model is not None and self._model.cuts)
        return request.cut

    def cut(self, tokens: list[int], request: GenerationRequest, longest: int) -> list[int]:
        """Truncates tokens to what the request and the model allow. Special tokens at both ends stay.

        Args:
            longest: the model's limit in tokens.
        """
        if not self.cuts(request):
            return tokens
        model = self._model or SentenceModel()
        limit = min(longest, request.truncate or longest, model.longest or longest)
        return self._tokenizer.shorten(tokens, limit, model.cut_left)

    def sampling(self, request: GenerationRequest, second: int = 0) -> Sampling:
        """The parameters of pooling, as the ranks take them.

        Args:
            second: index of the first token of a pair's second text.

        Raises:
            InvalidRequest: the request has token ids and names a prompt, which only goes before a text.
        """
        pooling = self._pooling if request.pooled == "embed" else request.pooled
        if not isinstance(request.prompt, str):
            if request.prompt_name is not None:
                raise InvalidRequest("`prompt_name` goes with texts; put the prompt's tokens before yours instead")
            return Sampling(pooling=pooling)
        prompt = self._prompt(request)
        if not prompt or self._model is None or self._model.include_prompt:
            return Sampling(pooling=pooling, second_from=second)
        if prompt not in self._lengths:
            self._lengths[prompt] = self._tokenizer.length_before(prompt)
        return Sampling(pooling=pooling, pooled_from=self._lengths[prompt])

    def _prompt(self, request: GenerationRequest) -> str:
        model = self._model
        name = request.prompt_name
        if name is None:
            return model.prompts[model.default_prompt] if model is not None and model.default_prompt else ""
        known = model.prompts if model is not None else {}
        if name not in known:
            names = ", ".join(known) or "none"
            raise InvalidRequest(f"the prompt '{name}' is not one of this model's; its prompts are: {names}")
        return known[name]
