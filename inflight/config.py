"""Start-up configuration as frozen dataclasses: parsed once at the edge, passed down, never read again."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from inflight.hub import HubModel, fetch, locate

DEFAULT_HTTP = "127.0.0.1:8080"
DEFAULT_GRPC = "127.0.0.1:8081"
DEFAULT_MAX_ENQUEUED = 10_000
DEFAULT_MAX_MESSAGE_MB = 100
DEFAULT_EXECUTION_TIMEOUT = 300.0
DEFAULT_START_TIMEOUT = 1800.0
GRPC_ENGINES = ("auto", "nghttp2", "zttp", "grpcio")
"""Who speaks HTTP/2 at the gRPC door. grpcio is the C core that has been proven for long; zttp (the extra of that name)
answers more calls per second and calls itself experimental. `auto`: zttp where the extra is installed, else grpcio."""

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time that a control group grants in a period: what `docker run --cpus` sets."""


def processors(quota: Path = CPU_QUOTA) -> int:
    """How many this process may use: those of its affinity, at most what its control group grants."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota.read_text().split()
        return max(1, min(allowed, -(-int(granted) // int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no control group of version 2, or `max`
        return allowed


@dataclass(frozen=True)
class TlsConfig:
    """PEM files of one listener. With `verify_client` a client must show a certificate signed by `custom_ca`."""

    certificate: str
    private_key: str
    custom_ca: str | None = None
    verify_client: bool = False


@dataclass(frozen=True)
class ListenConfig:
    """One listening socket: `ip:port`, or `unix:path` for gRPC."""

    address: str
    max_message_mb: int = DEFAULT_MAX_MESSAGE_MB
    tls: TlsConfig | None = None


@dataclass(frozen=True)
class RestConfig:
    """How MindSpore Serving's REST routes answer: HTTP 200 for errors too, unless `status_codes` is set."""

    status_codes: bool = False


@dataclass(frozen=True)
class ServableConfig:
    """One servable to start.

    Attributes:
        directory: the folder that holds the servable's folder; absolute.
        name: the servable's folder, and its name for clients.
        device_ids: one replica (worker process) for each; empty: only extra workers, on the CPU.
        version: 0 is the newest on disk.
        device_type: `ascend`, `gpu`, `cpu` or None.
        num_parallel_workers: worker processes that can run Python stages, in all.
        dec_key, dec_mode: how encrypted model files are opened.
        model_file: a bare model file served without any servable_config.py; then `directory` is its folder.
        max_batch_size: rows in one run of a bare model with a dynamic batch, or None for the default.
        execution_timeout: as the server's, for this servable; None: the server's.
    """

    directory: Path
    name: str
    device_ids: tuple[int, ...] = (0,)
    version: int = 0
    device_type: str | None = None
    num_parallel_workers: int = 0
    dec_key: bytes | None = None
    dec_mode: str = "AES-GCM"
    model_file: Path | None = None
    max_batch_size: int | None = None
    execution_timeout: float | None = None


QUANTIZE = ("none", "int8", "int4", "int4-64", "int4-128")
"""What weights can be packed as; int4 is in groups of 32."""
KV_CACHE_DTYPES = ("auto", "int8")
GENERATION_CONFIGS = ("auto", "none")
"""Whether OpenAI's routes take what a request does not say from the model's generation_config.json."""


@dataclass(frozen=True)
class AdapterConfig:
    """One LoRA adapter.

    Attributes:
        name: for clients.
        folder: in PEFT's layout; absolute. Of an adapter of the hub it is known once that is fetched.
        hub: what is to be fetched; None: it is here.
    """

    name: str
    folder: Path
    hub: HubModel | None = None

    @classmethod
    def of(cls, name: str, given: str | Path, base: Path | None = None, *, cache: str | None = None) -> AdapterConfig:
        """The adapter of that name at a path, or of the hub.

        Args:
            base: the folder that relative paths begin at; None: the working directory.
            cache: as for `locate`.

        Raises:
            ConfigError: as `locate`.
        """
        where = locate(given, base, cache=cache)
        if isinstance(where, HubModel):
            return cls(name, Path(where.repo), where)
        return cls(name, where.absolute())

    async def fetched(self) -> AdapterConfig:
        """The adapter on this disk.

        Raises:
            StartError: it cannot be fetched.
        """
        return self if self.hub is None else AdapterConfig(self.name, (await fetch(self.hub, adapter=True)).path)


@dataclass(frozen=True)
class GeneratorConfig:
    """One language model to start. The names of limits are TGI's.

    Attributes:
        model_dir: a folder in Hugging Face layout; absolute. Of a model of the hub it is known once that is fetched.
        hub: what is to be fetched before it is loaded; None: it is here.
        commit: of the hub's repository that it came from, where it did.
        name: its name for clients; `model_id`: what `/info` calls it, None: the folder.
        tensor_parallel: processes that share the model.
        device_type: cpu, gpu (or cuda), ascend (or npu), or None for the best one here.
        device_ids: one for each rank; empty: 0, 1, ...
        dtype: auto, float32, bfloat16 or float16.
        kv_cache_bytes: memory of each rank's cache; None: measured at start.
        block_size: tokens in one block of the cache.
        threads: CPU threads of each rank; 0: the cores divided by the ranks.
        quantize: none, int8, int4, int4-64 or int4-128: what float weights are packed as, on the CPU engine.
        kv_cache_dtype: auto (that of the weights) or int8, on the CPU engine.
        packed_cache: folder where packed weights are kept from one start to the next; None: nowhere.
        allow_pickle, trust_remote_code: read what can run code.
        max_concurrent_requests: more are refused (Overloaded).
        max_batch_size: rows that are computed together.
        max_batch_prefill_tokens: prompt tokens computed in one step; None: by device.
        max_batch_mixed_tokens: tokens up to which prompts fill a step in which others decode; None: by device.
        max_batch_total_tokens: tokens in the cache; None: all that fit.
        max_input_tokens, max_total_tokens: of one request; None: what model and cache allow.
        waiting_served_ratio, max_waiting_tokens: reported; with chunked prefill nobody waits for a pause.
        step_timeout: seconds after which a step counts as hung and the shards are replaced.
        plans_in_flight: steps the shards may have at once.
        payload_limit: bytes of a request's body.
        grammars: requests may ask for structured output.
        adapters: LoRA adapters that requests may name.
        tokenizer_config: another tokenizer_config.json than the model's, for its chat template.
        generation_config: auto: requests to OpenAI's routes that say nothing else are sampled as the model's
            generation_config.json says, as vLLM does it; none: as OpenAI does it, as TGI does.
        pooling: what a decoder's embeddings are: of the `last` token, or the `mean` of all. None: as its folder says,
            else `last`.
    """

    model_dir: Path
    name: str
    model_id: str | None = None
    tensor_parallel: int = 1
    device_type: str | None = None
    device_ids: tuple[int, ...] = ()
    dtype: str = "auto"
    kv_cache_bytes: int | None = None
    block_size: int = 16
    threads: int = 0
    quantize: str = "none"
    kv_cache_dtype: str = "auto"
    packed_cache: Path | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_client_batch_size: int = 4
    max_batch_size: int = 128
    max_batch_prefill_tokens: int | None = None
    max_batch_mixed_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    waiting_served_ratio: float = 0.3
    max_waiting_tokens: int = 20
    step_timeout: float = 300.0
    plans_in_flight: int = 2
    payload_limit: int = 2_000_000
    grammars: bool = True
    generation_config: str = "auto"
    pooling: str | None = None
    adapters: tuple[AdapterConfig, ...] = ()
    tokenizer_config: Path | None = None
    hub: HubModel | None = None
    commit: str | None = None

    async def fetched(self) -> GeneratorConfig:
        """The same with what it names of the hub on this disk. Cancelling ends a fetch.

        Raises:
            StartError: something cannot be fetched; the text says why and what to do.
        """
        adapters = tuple([await adapter.fetched() for adapter in self.adapters])
        if self.hub is None:
            return replace(self, adapters=adapters)
        found = await fetch(self.hub, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        return replace(self, model_dir=found.path, commit=found.commit, hub=None, adapters=adapters)

    def prefill_tokens(self, device_type: str | None) -> int:
        """The resolved `max_batch_prefill_tokens`: a chunk delays those that come, so it is small on a CPU."""
        return self.max_batch_prefill_tokens or (512 if device_type == "cpu" else 4096)

    def mixed_tokens(self, device_type: str | None) -> int | None:
        """The resolved `max_batch_mixed_tokens`: rows that keep the arithmetic busy, where that is known."""
        return self.max_batch_mixed_tokens or (32 if device_type == "cpu" else None)


@dataclass(frozen=True)
class RestartPolicy:
    """When a lost worker is started again.

    Attributes:
        only_proven: MindSpore Serving's rule: a worker that answered nothing since its start, or that left on
            its own, is not started again, and the last one's exit ends the server.
        first_delay, max_delay: back-off in seconds between starts that fail; a proven worker restarts at once.
    """

    only_proven: bool = False
    first_delay: float = 0.5
    max_delay: float = 30.0


@dataclass(frozen=True)
class ServerConfig:
    """What the whole server is told at its start.

    Attributes:
        max_enqueued_requests: requests in flight over the whole server before new ones are refused.
        start_timeout: seconds that a worker may take to load its servable, or the ranks their language model; None:
            any time.
        warm_up_timeout: seconds that one run of a model on made-up inputs may take when a worker starts; a worker that
            takes longer is started again without such runs.
        execution_timeout: seconds that one call of a stage's function or model may take before its worker counts as
            hung and is replaced; 0: any time.
        stop_timeout: seconds that running work may take when the server stops.
        log_dir: where each worker's output goes; None: the server's own stderr.
        restart: when a lost worker is started again.
        exit_when_lost: the server ends when no worker is left that could be restarted.
        rest: how the MindSpore Serving routes answer.
        grpc_engine: one of `GRPC_ENGINES`.
        api_key: what a caller of a model has to show, over HTTP and gRPC; None: nothing.
        cors_origins: web pages of these origins may call; `*` is any.
    """

    max_enqueued_requests: int = DEFAULT_MAX_ENQUEUED
    start_timeout: float | None = DEFAULT_START_TIMEOUT
    warm_up_timeout: float = 60.0
    execution_timeout: float = DEFAULT_EXECUTION_TIMEOUT
    stop_timeout: float = 10.0
    log_dir: Path | None = None
    restart: RestartPolicy = RestartPolicy()
    exit_when_lost: bool = False
    rest: RestConfig = RestConfig()
    grpc_engine: str = "auto"
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ("*",)
