"""Prepares texts for embedding: adds the model's prompts and truncates."""

from __future__ import annotations

from inflight.checkpoint import SentenceModel
from inflight.contract import GenerationRequest, Sampling
from inflight.errors import InvalidRequest
from inflight.text import Tokenizer


class Embedder:
    """Prepares the requests of one model as sentence-transformers does for the same folder.

    Args:
        model: the folder's settings of embeddings; None if it has none.
        pooling: `last` or `mean`, for decoders whose folder has no settings.
    """

    def __init__(self, model: SentenceModel | None, tokenizer: Tokenizer, pooling: str | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling or ("mean" if model is not None and model.poolings == ("mean",) else "last")
        self._lengths: dict[str, int] = {}

    def text(self, request: GenerationRequest) -> str:
        """The text with its prompt before it.

        Raises:
            InvalidRequest: there is no prompt of that name.
        """
        assert isinstance(request.prompt, str)
        return self._prompt(request) + request.prompt

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

    def sampling(self, request: GenerationRequest) -> Sampling:
        """The parameters of pooling, as the ranks take them.

        Raises:
            InvalidRequest: the request has token ids and names a prompt, which only goes before a text.
        """
        if not isinstance(request.prompt, str):
            if request.prompt_name is not None:
                raise InvalidRequest("`prompt_name` goes with texts; put the prompt's tokens before yours instead")
            return Sampling(pooling=self._pooling)
        prompt = self._prompt(request)
        if not prompt or self._model is None or self._model.include_prompt:
            return Sampling(pooling=self._pooling)
        if prompt not in self._lengths:
            self._lengths[prompt] = self._tokenizer.length_before(prompt)
        return Sampling(pooling=self._pooling, pooled_from=self._lengths[prompt])

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
