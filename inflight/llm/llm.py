"""`LLM`: a language model in this process, on the same engine that the server uses."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np

from inflight.config import (
    DEFAULT_START_TIMEOUT,
    AdapterConfig,
    ClusterConfig,
    DraftConfig,
    GeneratorConfig,
    ServerConfig,
    resources_of,
)
from inflight.contract import (
    GREEDY,
    Asked,
    Chat,
    FinishReason,
    GenerationRequest,
    Grammar,
    Sampling,
    ShardJob,
    TokenInfo,
    from_messages,
    paired,
    relevance,
    together,
    whole,
    with_images,
)
from inflight.engine import Engine, Executor, ShardGroup
from inflight.errors import InvalidRequest, StartError
from inflight.hub import HubModel, locate
from inflight.llm.judged import Classified, Ranked, classified, ranked
from inflight.llm.local import LocalExecutor
from inflight.llm.prompts import Prompt, Rendered, image_of_part, images_of
from inflight.place import Cluster, OnCluster
from inflight.startup import ProgressBar, aside, failed_load, waited_for, weight_bytes
from inflight.text import load_tokenizer
from inflight.vision import open_vision

T = TypeVar("T")

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Generation:
    """The result of one prompt.

    Attributes:
        text: generated text without special tokens.
        tokens: generated tokens, with log-probabilities if they were asked for.
        prompt: the prompt's tokens if `Sampling.prompt_logprobs`, else empty.
        prompt_length: number of tokens of the prompt.
        cached: number of prompt tokens that came from the prefix cache.
        prompt_top: the most likely tokens at each of `prompt`'s places if `Sampling.prompt_top`, else empty.
    """

    text: str
    tokens: tuple[TokenInfo, ...]
    finish_reason: FinishReason
    prompt: tuple[TokenInfo, ...]
    prompt_length: int
    cached: int
    prompt_top: tuple[tuple[TokenInfo, ...], ...] = ()

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def _checked(values: Sequence[T], count: int, what: str) -> list[T]:
    """Raises InvalidRequest if there is not one value for each prompt."""
    if len(values) != count:
        raise InvalidRequest(f"{count} prompts and {len(values)} {what}; give one for all or one for each")
    return list(values)


class LLM:
    """A language model in this process. All prompts of a call share its batches; a context manager.

    Args:
        model_dir: a folder in Hugging Face layout, or a GGUF file; or a model of the hub, which is fetched where it is
            not in the hub's cache: `org/name`, `org/name:Q4_K_M`, `org/name@revision`.
        revision: branch, tag or commit of a model of the hub.
        dtype: auto, float32, bfloat16 or float16.
        device_type: cpu, cuda, npu, or None for the best one here.
        replicas: copies of the model, each in a process of its own on a device of its own, from `device_id` on, or on
            its share of the processors. With 1 the model is in this process.
        threads: CPU threads; 0: all that this process may use.
        quantize: none, int8, int4, int4-64 or int4-128: what float weights are packed as, on CPUs.
        kv_cache_dtype: auto or int8, on CPUs.
        packed_cache: folder where packed weights are kept from one time to the next.
        prompt_cache: folder where computed prompts are kept from one time to the next.
        prompt_cache_size: its bytes at most.
        mmproj: the file with the vision part of a GGUF model; None: the one beside it.
        kv_cache_memory: bytes of the cache; None: measured.
        max_batch_size: prompts that are computed together.
        watermark_gamma, watermark_delta: share of the vocabulary that a watermark favours, and what it adds there.
        lora_adapters: folders of LoRA adapters (PEFT's layout), or their ids on the hub, by name.
        max_batch_prefill_tokens, max_batch_mixed_tokens: of `GeneratorConfig`; None: by device.
        speculate: next tokens that are guessed at most and checked in one step; None: 8, where it pays.
        draft_model: a smaller model with the same vocabulary that guesses them, as `model_dir`; None: there is none.
        tool_call_parser, reasoning_parser: the forms in which the model writes calls and thoughts, for doors over
            `engine`; None: as its chat template shows.
        start_timeout: seconds that loading may take; a thread that hangs in a library stays. None: any time.
        images_per_request, image_max_pixels, image_max_tokens, media_domains, media_cache_memory, vision_threads,
            default_image_prompt: of models that read images, as in `VisionConfig`.
        cluster: `ray` or `ray:HOST:PORT`: the replicas run on the machines of this Ray cluster, with the model at the
            same path, on devices that Ray chooses. None: on this machine.
        cluster_listen, cluster_plain, cluster_resources: as for `inflight serve`.

    Raises:
        ConfigError: an address that is none of the hub's, or another argument of the cluster.
        StartError: the model cannot be fetched or loaded, or the cluster does not answer.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device_type: str | None = None,
        device_id: int = 0,
        replicas: int = 1,
        threads: int = 0,
        quantize: str = "none",
        kv_cache_dtype: str = "auto",
        packed_cache: str | Path | None = None,
        prompt_cache: str | Path | None = None,
        prompt_cache_size: int = 16 << 30,
        mmproj: str | Path | None = None,
        kv_cache_memory: int | None = None,
        block_size: int = 16,
        max_batch_size: int = 64,
        max_batch_prefill_tokens: int | None = None,
        max_batch_mixed_tokens: int | None = None,
        max_total_tokens: int | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        speculate: int | None = None,
        draft_model: str | Path | None = None,
        plans_in_flight: int = 2,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        watermark_gamma: float = 0.5,
        watermark_delta: float = 2.0,
        lora_adapters: Mapping[str, str | Path] | None = None,
        start_timeout: float | None = DEFAULT_START_TIMEOUT,
        images_per_request: int = 8,
        image_max_pixels: int = 50_000_000,
        image_max_tokens: int = 1024,
        media_domains: tuple[str, ...] = (),
        media_cache_memory: int = 256 << 20,
        vision_threads: int = 0,
        default_image_prompt: str = "Describe the image.",
        cluster: str | None = None,
        cluster_listen: str | None = None,
        cluster_plain: bool = False,
        cluster_resources: Mapping[str, float] | None = None,
    ) -> None:
        settings = dict(locals())  # the arguments by the names of what they set
        machines = ClusterConfig.asked(cluster, cluster_listen, cluster_plain)
        where = locate(model_dir, revision=revision)
        config = GeneratorConfig.asked(
            where if isinstance(where, HubModel) else where.absolute(),
            where.name,
            settings,
            packed_cache=None if packed_cache is None else Path(packed_cache).absolute(),
            prompt_cache=None if prompt_cache is None else Path(prompt_cache).absolute(),
            mmproj=None if mmproj is None else Path(mmproj).absolute(),
            adapters=tuple(AdapterConfig.of(name, given) for name, given in (lora_adapters or {}).items()),
            draft_model=None if draft_model is None else DraftConfig.of(draft_model),
            device_type=device_type,
            device_ids=tuple(range(device_id, device_id + replicas)),
            max_batch_size=max_batch_size,
            max_concurrent_requests=1 << 30,
            speculate=speculate,
            plans_in_flight=plans_in_flight,
            resources=resources_of(cluster_resources),
        ).completed(os.environ)
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="inflight-llm", daemon=True)
        self._thread.start()
        try:
            self.engine, self._cluster = self._call(_started(config, start_timeout, machines))
        except BaseException:
            self._stop_loop()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        max_new_tokens: int | Sequence[int | None] | None = DEFAULT_NEW_TOKENS,
        stop: Iterable[str] = (),
        ignore_eos: bool = False,
        timeout: float | None = None,
        grammar: Grammar | Sequence[Grammar | None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Generation]:
        """Generates a continuation of every prompt. Results are in the order of the prompts.

        Args:
            prompts: a text, a text with images (`PromptWithImages`), several of these, or lists of token ids.
            sampling: for all, or one for each.
            max_new_tokens: exact limit, for all or one for each; None: as many as the model's length leaves.
            grammar: constrains the texts, for all or one for each.
            adapter: name of a LoRA adapter, for all or one for each.

        Raises:
            InflightError: the error of the first prompt that fails; the others are cancelled.
        """
        single = isinstance(prompts, (str, Mapping, Rendered))
        all_prompts: Any = [prompts] if single else prompts
        count = len(all_prompts)
        samplings = [sampling] * count if isinstance(sampling, Sampling) else sampling
        limits = (
            [max_new_tokens] * count if max_new_tokens is None or isinstance(max_new_tokens, int) else max_new_tokens
        )
        grammars = [grammar] * count if grammar is None or isinstance(grammar, Grammar) else grammar
        adapters = [adapter] * count if adapter is None or isinstance(adapter, str) else adapter
        requests = [
            self._request(
                prompt,
                prompt_sampling,
                limit,
                stop=tuple(stop),
                ignore_eos=ignore_eos,
                prompt_tokens=prompt_sampling.prompt_logprobs,
                timeout=timeout,
                grammar=prompt_grammar,
                adapter=prompt_adapter,
            )
            for prompt, prompt_sampling, limit, prompt_grammar, prompt_adapter in zip(
                all_prompts,
                _checked(samplings, count, "samplings"),
                _checked(limits, count, "limits"),
                _checked(grammars, count, "grammars"),
                _checked(adapters, count, "adapters"),
            )
        ]
        return self._call(together(self._generation(request) for request in requests))

    def embed(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        prompt_name: str | None = None,
        truncate: int | bool | None = None,
        timeout: float | None = None,
        adapter: str | None = None,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The vector of every text, float32 [texts, size]; of length 1 unless the model's folder says otherwise.

        Args:
            prompts: a text, texts, or lists of token ids.
            prompt_name: which of the model's prompts goes before each text; None: the model's default.
            truncate: truncate longer texts to this many tokens; True: to the model's limit; False: refuse them; None:
                as the model's folder says.
            adapter: name of a LoRA adapter.

        Raises:
            InflightError: the error of the first text that fails; the others are cancelled.
        """
        texts: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        cut, limit = (truncate, None) if isinstance(truncate, bool) else (None, truncate)
        requests = [
            GenerationRequest(
                text, truncate=limit, timeout=timeout, adapter=adapter, embed=True, prompt_name=prompt_name, cut=cut
            )
            for text in texts
        ]
        vectors = self._call(together(self._vector(request) for request in requests))
        return np.array(vectors, np.float32).reshape(len(vectors), self.engine.info.embedding_size)

    def score(
        self, first: str | Sequence[str], second: str | Sequence[str], *, truncate: bool | None = None
    ) -> list[float]:
        """The relevance of each pair's second text to its first: a reranker's score between 0 and 1, or the cosine of
        the vectors of a model of embeddings.

        Args:
            first, second: a text and texts, or as many texts.
            truncate: cut longer pairs to the model's limit; None: as the model's folder says.

        Raises:
            InflightError: the error of the first pair that fails; `Unable`: the model is of another kind.
        """
        return self._call(relevance(self.engine, paired(first, second), Asked(cut=truncate)))[0]

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, truncate: bool | None = None
    ) -> list[Ranked]:
        """The documents that are most relevant to a query, the first most; all of them without `top_n`. As `score`."""
        return self._call(ranked(self.engine, query, documents, Asked(cut=truncate)))[:top_n]

    def classify(
        self, texts: str | Sequence[str | tuple[str, str]], *, truncate: bool | None = None
    ) -> list[Classified]:
        """The label of each text or pair of texts, by a model of sequence classification. `truncate` as in `score`.

        Raises:
            InflightError: the error of the first text that fails; `Unable`: the model has no labels.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        return self._call(classified(self.engine, given, Asked(cut=truncate)))

    def chat(self, messages: list[dict[str, object]], sampling: Sampling = GREEDY, **options: Any) -> Generation:
        """One answer to a conversation; `options` as in `generate`.

        Args:
            messages: in OpenAI's form. An image is a content part `{"type": "image", "image": <any form of
                PromptWithImages>}` or `{"type": "image_url", "image_url": {"url": ...}}`.
        """
        shown, media = from_messages(messages, self.engine.info, image_of_part)
        text = self._call(self.engine.render(Chat(shown)))
        return self.generate(Rendered(text, media), sampling, **options)[0]

    def load_adapter(self, name: str, folder: str | Path, *, again: bool = False) -> None:
        """Loads a LoRA adapter, which `generate` and `embed` then know by its name.

        Args:
            again: it may take the place of an adapter of this name.

        Raises:
            InvalidRequest: the name is taken.
            StartError: it cannot be loaded; nothing has changed.
        """
        self._call(self.engine.load_adapter(name, Path(folder).absolute(), again=again))

    def unload_adapter(self, name: str) -> None:
        """Forgets a LoRA adapter.

        Raises:
            NotFound: there is none of this name.
        """
        self._call(self.engine.unload_adapter(name))

    def close(self) -> None:
        """Frees the model. Idempotent."""
        if not self._closed:
            self._closed = True
            self._call(self.engine.stop())
            if self._cluster is not None:
                self._call(self._cluster.stop())
            self._stop_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: Prompt, sampling: Sampling, limit: int | None, **options: Any) -> GenerationRequest:
        if isinstance(prompt, Rendered):
            options.update(add_special_tokens=False, media=prompt.media)
            return GenerationRequest(prompt.text, sampling, limit, **options)
        if isinstance(prompt, Mapping):
            request = GenerationRequest(prompt.get("prompt", ""), sampling, limit, **options)
            return self._call(with_images(self.engine, request, images_of(prompt)))
        return GenerationRequest(prompt, sampling, limit, **options)

    async def _generation(self, request: GenerationRequest) -> Generation:
        events = await whole(self.engine, request)
        start, finish = events.start, events.finish
        infos = tuple(token.info for token in events.tokens)
        length, cached = finish.prompt_length, start.cached
        return Generation(finish.text, infos, finish.reason, start.prompt, length, cached, start.prompt_top)

    async def _vector(self, request: GenerationRequest) -> np.ndarray[Any, np.dtype[np.float32]]:
        data = (await whole(self.engine, request)).finish.embedding
        assert data is not None, "a text ended without its vector"
        return np.frombuffer(data, np.float32)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop_loop(self) -> None:
        """Stops the event loop. Cancels its tasks first, because Ctrl+C may come in the middle of a start."""
        self._call(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _started(
    config: GeneratorConfig, start_timeout: float | None, machines: ClusterConfig
) -> tuple[Engine, Cluster | None]:
    """Starts the engine of a model, which is fetched first if it is a model of the hub.

    Returns:
        The engine, and the connection to the cluster that it runs on.

    Raises:
        StartError: it cannot be fetched or loaded, or the cluster does not answer.
    """
    config = await config.fetched()
    if machines.cluster is None:
        return await _engine(config, start_timeout, None), None
    cluster = Cluster.of(machines)
    try:
        await cluster.open()
        return await _engine(config, start_timeout, cluster), cluster
    except BaseException:
        await cluster.stop()
        raise


async def _engine(config: GeneratorConfig, start_timeout: float | None, cluster: Cluster | None) -> Engine:
    """Starts the engine of a model that is on this machine. Raises StartError: it cannot be loaded."""
    folder = config.model.model_dir
    progress = ProgressBar(f"{config.name}, weights", weight_bytes(folder), lines=False)
    loaded = 0.0

    def tell(done: float) -> None:
        nonlocal loaded
        loaded = done
        progress.share(done)

    executors: list[Executor]
    server = ServerConfig(start_timeout=start_timeout)
    if cluster is not None:
        alike = [
            msgspec.structs.replace(config.of_replica(number), model=config.model) for number in range(config.replicas)
        ]
        executors = [ShardGroup(one, server, placement=OnCluster(cluster)) for one in alike]
    elif config.replicas > 1:
        executors = [ShardGroup(config.of_replica(number), server) for number in range(config.replicas)]
    else:
        executors = [LocalExecutor(ShardJob.of(config), tell)]
    whole = False
    for executor in executors:
        executor.begin()  # it loads while the tokenizer is read
    try:
        try:
            tokenizer = await aside(
                partial(load_tokenizer, folder, None, config.tool_call_parser, config.reasoning_parser), "tokenizer"
            )
        except Exception as error:  # the tokenizer's library raises anything for a broken file
            await _give_up(executors)
            raise failed_load("the tokenizer", error, folder) from error
        try:
            engine = Engine(config, tokenizer, executors, vision=open_vision(config))
        except BaseException:
            await _give_up(executors)
            raise
        starting = asyncio.wait_for(engine.start(), start_timeout)
        if config.replicas == 1 and cluster is None:  # the processes of several tell of themselves
            starting = waited_for(lambda: f"{loaded:.0%} of the weights of '{folder}' are loaded", starting)
        await starting
        whole = True
    except asyncio.TimeoutError:
        raise StartError(f"the model was not loaded within {start_timeout:g} seconds (start_timeout)") from None
    except Exception as error:
        raise failed_load("the model", error, folder) from error
    finally:
        progress.close(whole)
        for executor in executors:
            if not whole and isinstance(executor, LocalExecutor):
                executor.shutdown()
    return engine


async def _give_up(executors: Sequence[Executor]) -> None:
    await asyncio.gather(*(executor.give_up() for executor in executors))


async def _end_tasks() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
