"""The configuration of one language model: a record for its ranks, one for requests, one for the scheduler.

A setting's type, default, help and names are written here and nowhere else. Command lines, configuration files, `LLM`
and `declare_generator` are made from these fields, and messages carry the records unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from inflight.config.cluster import MAX_REPLICAS, Scaling
from inflight.config.draft import DraftConfig, draft_model
from inflight.config.parse import absolute, domains, memory, one_of, ratio, seconds, share, switch, whole
from inflight.config.setting import Setting, fields_of
from inflight.errors import ConfigError
from inflight.hub import HubModel, fetch, hint, locate

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8", "int4", "int4-64", "int4-128")
"""The formats that weights can be packed in; int4 is in groups of 32."""
KV_CACHE_DTYPES = ("auto", "int8")
GENERATION_CONFIGS = ("auto", "none")
"""Whether OpenAI's routes take the parameters that a request leaves out from the model's generation_config.json."""
CPU_ENGINES = ("auto", "torch")
POOLINGS = ("last", "mean", "cls", "splade")
MAX_RANKS = 64


@dataclass(frozen=True)
class AdapterConfig:
    """One LoRA adapter.

    Attributes:
        name: for clients.
        folder: in PEFT's layout, or a GGUF file; absolute. For an adapter of the hub it is valid after the fetch.
        hub: the adapter of the hub to fetch; None: the folder is on this machine.
        number: by which plans name it, of an adapter that was loaded while the model served; 0: its place among the
            model's first ones, from 1.
    """

    name: str
    folder: Path
    hub: HubModel | None = None
    number: int = 0

    @classmethod
    def of(cls, name: str, given: str | Path, base: Path | None = None, *, cache: str | None = None) -> AdapterConfig:
        """The adapter with that name, at a path or on the hub.

        Args:
            base: the folder that paths are relative to; None: the working directory.
            cache: as in `locate`.

        Raises:
            ConfigError: as in `locate`.
        """
        where = locate(given, base, cache=cache)
        if isinstance(where, HubModel):
            return cls(name, Path(where.repo), where)
        return cls(name, where.absolute())

    async def fetched(self) -> AdapterConfig:
        """The adapter, fetched to this machine.

        Raises:
            StartError: it cannot be fetched.
        """
        return self if self.hub is None else AdapterConfig(self.name, (await fetch(self.hub, adapter=True)).path)


def adapters(text: str, cache: str | None = None) -> tuple[AdapterConfig, ...]:
    """Reads a list such as `name=folder,org/name@revision`. Without a name an adapter is called by its folder's name or
    its id.

    Args:
        cache: folder in which adapters of the hub are kept; None: the hub's own cache.

    Raises:
        ConfigError: a folder that does not exist, or a name twice.
    """
    found: list[AdapterConfig] = []
    for part in (each.strip() for each in text.split(",")):
        if not part:
            continue
        name, _, given = part.rpartition("=")
        adapter = AdapterConfig.of(name, given, cache=cache)
        file = adapter.folder.suffix == ".gguf" and adapter.folder.is_file()
        if adapter.hub is None and not (file or (adapter.folder / "adapter_config.json").is_file()):
            known = adapter.folder.is_dir()
            raise ConfigError(
                f"'{given}' is no adapter: it holds no adapter_config.json"
                if known
                else f"'{given}' is no adapter: there is no such folder; {hint(given).replace('a model', 'an adapter')}"
            )
        found.append(replace(adapter, name=name or _called(adapter)))
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two adapters are named '{twice}'; write other=folder for one of them")
    return tuple(found)


def _called(adapter: AdapterConfig) -> str:
    """The name of an adapter that the user gave none: its folder's, or, as TGI's clients expect, its id on the hub."""
    if adapter.hub is not None:
        return adapter.hub.repo
    return adapter.folder.stem if adapter.folder.suffix == ".gguf" else adapter.folder.name


def _adapters(text: str) -> tuple[AdapterConfig, ...]:
    try:
        return adapters(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error


class ModelConfig(msgspec.Struct, frozen=True):
    """The settings of a language model that every rank needs.

    Attributes:
        model_dir: a folder in Hugging Face layout, or a GGUF file; absolute. For a model of the hub it is valid after
            the fetch.
        device_type: cpu, gpu (or cuda), ascend (or npu), or None for the best one here.
        dtype: auto, float32, bfloat16 or float16.
        kv_cache_bytes: memory of each rank's cache; None: measured at start.
        block_size: tokens in one block of the cache.
        threads: CPU threads of each rank, which replicas divide; 0: the cores divided by the ranks.
        quantize: none, int8, int4, int4-64 or int4-128: the format that the CPU engine packs float weights in.
        kv_cache_dtype: auto (that of the weights) or int8, on the CPU engine.
        packed_cache: folder where packed weights are kept from one start to the next; None: they are not kept.
        prompt_cache: folder where computed prompts are kept, to be found again after a start; None: they are not kept.
        prompt_cache_size: bytes of that folder.
        mmproj: the file with the vision part of a GGUF model; None: the one beside it.
        adapters: LoRA adapters that requests may name; the first one is number 1.
        draft_model: a smaller model with the same vocabulary that guesses the next tokens; None: there is none.
        allow_pickle, trust_remote_code: read files that can run code.
        watermark_gamma, watermark_delta: of `Watermark`.
        pooling: how a text's vector is made of its tokens: of `POOLINGS`. None: as its folder says, else of a decoder
            `last` and of an encoder `mean`.
        cpu_engine: auto, or torch, which does not use the native CPU engine; None: not set.
        cpu_isa: the engine's instruction set, for tests; None: the best available one.
    """

    model_dir: Path
    device_type: str | None = None
    dtype: Annotated[
        str, Setting("Of a language model's weights.", one_of(*DTYPES), "DTYPE", " auto: the checkpoint's", tgi="dtype")
    ] = "auto"
    kv_cache_bytes: Annotated[
        int | None,
        Setting(
            "Memory of each rank's key-value cache, like 4g.", memory, "SIZE", ": measured", flag="kv-cache-memory"
        ),
    ] = None
    block_size: Annotated[int, Setting("Tokens in a block of the cache.", whole(1, 256), "N")] = 16
    threads: Annotated[
        int, Setting("CPU threads of each rank; replicas divide them.", whole(0), "N", ": the cores, shared")
    ] = 0
    quantize: Annotated[
        str,
        Setting(
            "Pack weights as 8 or 4 bits (int4: groups of 32), on CPUs.", one_of(*QUANTIZE), "FORM", tgi="quantize"
        ),
    ] = "none"
    kv_cache_dtype: Annotated[
        str,
        Setting("Of the key-value cache: the weights' or int8, on CPUs.", one_of(*KV_CACHE_DTYPES), "DTYPE"),
    ] = "auto"
    packed_cache: Annotated[
        Path | None,
        Setting("Folder where packed weights are kept from one start to the next.", absolute, "DIR", ": nowhere"),
    ] = None
    prompt_cache: Annotated[
        Path | None,
        Setting(
            "Folder where computed prompts are kept, to be found again after a start and by other replicas.",
            absolute,
            "DIR",
            ": nowhere",
            tgi="prompt-cache",
        ),
    ] = None
    prompt_cache_size: Annotated[
        int,
        Setting(
            "Largest size of that folder, like 16g; what was not used for longest goes.",
            memory,
            "SIZE",
            " 16g",
            tgi="prompt-cache-size",
        ),
    ] = 16 << 30
    mmproj: Annotated[
        Path | None,
        Setting(
            "File with the vision part of a GGUF model.", absolute, "FILE", ": the one beside the model", tgi="mmproj"
        ),
    ] = None
    adapters: Annotated[
        tuple[AdapterConfig, ...],
        Setting(
            "LoRA adapters that requests may name: folders or ids of the hub, separated by commas: name=folder, "
            "folder, org/name, org/name@revision.",
            _adapters,
            "NAME=DIR,...",
            None,
            flag="lora-adapters",
            tgi="lora-adapters",
        ),
    ] = ()
    draft_model: Annotated[
        DraftConfig | None,
        Setting(
            "Smaller model with the same vocabulary, a path or an id of the hub, that guesses next tokens where the "
            "text itself has no guess; results stay the same.",
            draft_model,
            "MODEL",
            ": none",
            tgi="draft-model",
        ),
    ] = None
    allow_pickle: Annotated[bool, Setting("Read pickled weights (pytorch_model.bin), which can run code.", switch)] = (
        False
    )
    trust_remote_code: Annotated[
        bool, Setting("Run Python code that a model's directory holds.", switch, tgi="trust-remote-code")
    ] = False
    watermark_gamma: Annotated[
        float,
        Setting("Share of the vocabulary that a watermark favours.", share, "SHARE", tgi="watermark-gamma"),
    ] = 0.5
    watermark_delta: Annotated[
        float,
        Setting("What a watermark adds to its logits.", ratio, "NUMBER", tgi="watermark-delta"),
    ] = 2.0
    pooling: Annotated[
        str | None,
        Setting(
            "How a text's vector is made of its tokens; cls (the first) and splade (sparse, by a head that fills "
            "masks) are for encoders.",
            one_of(*POOLINGS),
            "KIND",
            ": as a sentence-transformers folder says, else last, of encoders mean",
        ),
    ] = None
    cpu_engine: Annotated[
        str | None,
        Setting(
            "What computes a model on CPUs: the native engine where it can (auto), or torch's operators (torch).",
            one_of(*CPU_ENGINES),
            "ENGINE",
            " auto",
            inherited=True,
        ),
    ] = None
    cpu_isa: Annotated[
        str | None,
        Setting("Instruction set of the native engine, for tests.", str, "NAME", ": the best one here", inherited=True),
    ] = None

    def of_draft(self, path: Path) -> ModelConfig:
        """The settings of the draft model at this path: those of the model, without what is of its own files."""
        own = {"mmproj": None, "adapters": (), "prompt_cache": None, "draft_model": None}
        return msgspec.structs.replace(self, model_dir=path, **own)

    def completed(self, environment: Mapping[str, str]) -> ModelConfig:
        """The same, with open settings taken from environment variables: for processes without a command line.

        Raises:
            ConfigError: a variable has a text that its setting does not accept.
        """
        told: dict[str, Any] = {}
        for field in fields_of(ModelConfig):
            text = environment.get(field.variable)
            if text and field.setting.inherited and getattr(self, field.name) is None:
                try:
                    told[field.name] = field.setting.parse(text)
                except ValueError as error:
                    raise ConfigError(f"{field.variable}: {error}") from None
        return msgspec.structs.replace(self, **told) if told else self


PAYLOAD_LIMIT = 2_000_000
"""TGI's default."""
IMAGE_PAYLOAD_LIMIT = 32 << 20
"""Room for a photograph of 20 MB in base64."""


class Limits(msgspec.Struct, frozen=True):
    """The limits of one request. The names are TGI's.

    Attributes:
        max_input_tokens, max_total_tokens: None: the limits of model and cache.
        payload_limit: bytes of a request's body; None: `PAYLOAD_LIMIT`, or `IMAGE_PAYLOAD_LIMIT` where it may hold
            images.
        grammars: requests may ask for structured output.
    """

    max_best_of: Annotated[int, Setting("Largest best_of.", whole(1), "N", tgi="max-best-of")] = 2
    max_stop_sequences: Annotated[int, Setting("Stop texts of a request.", whole(0), "N", tgi="max-stop-sequences")] = 4
    max_top_n_tokens: Annotated[int, Setting("Largest top_n_tokens.", whole(0), "N", tgi="max-top-n-tokens")] = 5
    max_client_batch_size: Annotated[
        int | None,
        Setting("Prompts in one completions request.", whole(1), "N", ": any number", tgi="max-client-batch-size"),
    ] = None
    max_input_tokens: Annotated[
        int | None, Setting("Longest prompt.", whole(1), "N", ": max-total-tokens less 1", tgi="max-input-tokens")
    ] = None
    max_total_tokens: Annotated[
        int | None,
        Setting("Longest prompt and output together.", whole(2), "N", ": the model's", tgi="max-total-tokens"),
    ] = None
    payload_limit: Annotated[
        int | None,
        Setting(
            "Bytes of a generation's body.",
            whole(1024),
            "N",
            f": {PAYLOAD_LIMIT}, or {IMAGE_PAYLOAD_LIMIT} for a model that reads images",
            tgi="payload-limit",
        ),
    ] = None
    grammars: Annotated[
        bool,
        Setting(
            "Refuse structured output.",
            switch,
            flag="disable-grammar-support",
            tgi="disable-grammar-support",
            opposite=True,
        ),
    ] = True


GUESSES = 8
"""Tokens that a row guesses at most, where the user has not said so."""


class Policy(msgspec.Struct, frozen=True):
    """The policy by which requests share the model. The names are TGI's.

    Attributes:
        max_concurrent_requests: further requests are refused (Overloaded).
        max_batch_size: rows that are computed together.
        max_batch_prefill_tokens: prompt tokens computed in one step; None: by device.
        max_batch_mixed_tokens: tokens up to which prompts fill a step in which other rows decode; None: by device.
        max_batch_total_tokens: tokens in the cache; None: all that fit.
        waiting_served_ratio, max_waiting_tokens: reported only; with chunked prefill requests do not wait for a pause.
        step_timeout: seconds after which a step counts as hung and the shards are replaced.
        plans_in_flight: number of steps that the shards may hold at once.
        speculate: next tokens that a row guesses at most (`inflight.sched.speculation`); None: `GUESSES`.
    """

    max_concurrent_requests: Annotated[
        int,
        Setting("Generations in the server before new ones are refused.", whole(1), "N", tgi="max-concurrent-requests"),
    ] = 128
    max_batch_size: int = 128
    max_batch_prefill_tokens: Annotated[
        int | None,
        Setting(
            "Prompt tokens computed in one step: what a prompt may delay those that come by.",
            whole(1),
            "N",
            " 512 on a CPU, else 4096",
            tgi="max-batch-prefill-tokens",
        ),
    ] = None
    max_batch_mixed_tokens: Annotated[
        int | None,
        Setting(
            "Tokens up to which prompts fill a step in which others stream, so that these are hardly delayed.",
            whole(1),
            "N",
            " 32 on a CPU, else without such a limit",
        ),
    ] = None
    max_batch_total_tokens: Annotated[
        int | None,
        Setting("Tokens in the cache.", whole(1), "N", ": what fits", tgi="max-batch-total-tokens"),
    ] = None
    waiting_served_ratio: Annotated[
        float,
        Setting(
            "Accepted for TGI's scripts; prompts are computed in chunks, so nobody waits for a pause.",
            ratio,
            "RATIO",
            None,
            tgi="waiting-served-ratio",
        ),
    ] = 0.3
    max_waiting_tokens: Annotated[
        int, Setting("As waiting-served-ratio.", whole(0), "N", None, tgi="max-waiting-tokens")
    ] = 20
    step_timeout: Annotated[
        float,
        Setting(
            "Seconds after which a step counts as hung and the model's processes are replaced.",
            seconds,
            "SECONDS",
            " 300",
        ),
    ] = 300.0
    plans_in_flight: int = 2
    speculate: Annotated[
        int | None,
        Setting(
            "Next tokens guessed, from the text itself or by a draft model, and checked in one step; results stay the "
            "same. 0: none.",
            whole(0),
            "N",
            f": up to {GUESSES}, where it pays",
            tgi="speculate",
        ),
    ] = None

    @property
    def guesses(self) -> int:
        """The resolved `speculate`."""
        return GUESSES if self.speculate is None else self.speculate

    def prefill_tokens(self, device_type: str | None) -> int:
        """The resolved `max_batch_prefill_tokens`. It is small on a CPU, because a chunk delays the next requests."""
        return self.max_batch_prefill_tokens or (512 if device_type == "cpu" else 4096)

    def resolved(self, device_type: str, max_rows: int) -> Policy:
        """The policy with its open settings resolved, for shards with `max_rows` rows on such a device.

        `max_batch_mixed_tokens` becomes the number of tokens that keep the arithmetic busy, if that is known.
        """
        return msgspec.structs.replace(
            self,
            max_batch_size=min(self.max_batch_size, max_rows),
            max_batch_prefill_tokens=self.prefill_tokens(device_type),
            max_batch_mixed_tokens=self.max_batch_mixed_tokens or (32 if device_type == "cpu" else None),
        )


class VisionConfig(msgspec.Struct, frozen=True):
    """The settings and limits of a model that reads images.

    Attributes:
        images_per_request: upper limit.
        image_max_bytes: of one image's file; also what is read of a fetched one.
        image_max_pixels: width times height; larger images are refused before they are decoded.
        image_max_tokens: an image is read in fewer tokens if it would have more.
        media_domains: hosts that images may be fetched from, private addresses included; `none`: nothing is fetched;
            empty: any host with public addresses.
        media_path: folder below which `file:` is allowed; None: nowhere.
        media_cache_memory: bytes of encoded images that are kept.
        vision_queue: images that may wait for the worker.
        vision_memory: bytes of encoded images that requests may hold which are not answered yet, those in the cache
            apart; while they are more, images that would have to be encoded are refused.
        vision_threads: CPU threads of the worker; 0: half of the cores.
        default_image_prompt: the text of a request that has only images.
    """

    images_per_request: Annotated[int, Setting("Images in one request.", whole(1), "N")] = 8
    image_max_bytes: Annotated[
        int, Setting("Largest file of an image, like 20m.", memory, "SIZE", " 20m", tgi="max-image-fetch-size")
    ] = 20 << 20
    image_max_pixels: Annotated[int, Setting("Most pixels of an image.", whole(1), "N")] = 50_000_000
    image_max_tokens: Annotated[int, Setting("Most tokens that an image becomes.", whole(16), "N")] = 1024
    media_domains: Annotated[
        tuple[str, ...],
        Setting(
            "The only hosts that images may be fetched from, separated by commas, private ones too; none: no fetching.",
            domains,
            "HOST,...",
            ": any public address",
        ),
    ] = ()
    media_path: Annotated[
        Path | None, Setting("Folder below which file: addresses of images may lie.", absolute, "DIR", ": none")
    ] = None
    media_cache_memory: Annotated[int, Setting("Memory of encoded images that are kept.", memory, "SIZE", " 256m")] = (
        256 << 20
    )
    vision_queue: Annotated[int, Setting("Images that may wait to be encoded.", whole(1), "N")] = 64
    vision_memory: Annotated[
        int, Setting("Memory of encoded images that requests hold, the cache's apart.", memory, "SIZE", " 1g")
    ] = 1 << 30
    vision_threads: Annotated[int, Setting("CPU threads that encode images.", whole(0), "N", ": half of the cores")] = 0
    default_image_prompt: Annotated[str, Setting("The text of a request that has images and no text.", str, "TEXT")] = (
        "Describe the image."
    )


class GeneratorConfig(msgspec.Struct, frozen=True):
    """One language model to start.

    Attributes:
        model: the settings for its ranks.
        name: its name for clients; `model_id`: its name in `/info`, None: the folder.
        limits: of one request.
        policy: how requests share it.
        vision: of its images.
        tensor_parallel: number of processes that share the model.
        replicas: copies of the model, each with ranks, a cache and a queue of its own; the most that there may be.
        scaling: how many of them there are.
        replica: which of them this configuration is for (`of_replica`).
        device_ids: one for each rank, of one replica after the other; empty: 0, 1, ...
        generation_config: the defaults of sampling on OpenAI's routes; auto: the model's generation_config.json, as in
            vLLM; none: OpenAI's defaults, as in TGI.
        compute_type: the value of TGI's header x-compute-type; None: ranks and device.
        tool_call_parser, reasoning_parser: names of the forms in which the model writes calls and thoughts; None: as
            its chat template shows.
        tokenizer_config: another tokenizer_config.json than the model's, for its chat template.
        hub: the model of the hub to fetch before loading; None: the model is on this machine.
        commit: the commit of the hub's repository, for a model from the hub.
        version: its number for clients, that of its folder in a repository.
        base: the model's name, where this is a version that is served beside a newer one under another name.
    """

    model: ModelConfig
    name: str
    model_id: Annotated[
        str | None, Setting("What /info and /v1 call the language model.", str, "NAME", ": its path or id")
    ] = None
    limits: Limits = Limits()
    policy: Policy = Policy()
    vision: VisionConfig = VisionConfig()
    tensor_parallel: Annotated[
        int, Setting("Processes (devices) that share a language model.", whole(1, MAX_RANKS), "N", tgi="num-shard")
    ] = 1
    replicas: Annotated[
        int,
        Setting(
            "Copies of a language model; a request goes where its prefix is cached, and to another when one is lost.",
            whole(1, MAX_REPLICAS),
            "N",
            " 1, or as many as --device-ids name devices for",
            tgi="replicas",
        ),
    ] = 1
    replica: int = 0
    scaling: Scaling = Scaling()
    device_ids: tuple[int, ...] = ()
    generation_config: Annotated[
        str,
        Setting(
            "auto: OpenAI's routes take temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens from "
            "the model's generation_config.json where a request does not say them. none: as OpenAI and TGI do.",
            one_of(*GENERATION_CONFIGS),
            "FROM",
        ),
    ] = "auto"
    compute_type: Annotated[
        str | None,
        Setting("What TGI's header x-compute-type says.", str, "TEXT", ": ranks and device, like 1-cpu"),
    ] = None
    tool_call_parser: Annotated[
        str | None,
        Setting("Form of the model's tool calls, by vLLM's or SGLang's name.", str, "NAME", ": as its template shows"),
    ] = None
    reasoning_parser: Annotated[
        str | None,
        Setting("Form of the model's thoughts, by such a name.", str, "NAME", ": as its template shows"),
    ] = None
    tokenizer_config: Path | None = None
    hub: HubModel | None = None
    commit: str | None = None
    version: int = 1
    base: str = ""

    @classmethod
    def of(cls, where: Path | HubModel, name: str = "", **values: Any) -> GeneratorConfig:
        """Makes a configuration from fields of any of its records.

        Args:
            where: a folder or a file (absolute), or a model of the hub.
            name: empty: that of the folder, or of the repository.

        Raises:
            TypeError: a name that is not a field.
            ConfigError: fewer replicas at most than at least, or a draft model that may guess nothing.
        """
        folder, hub = (Path(where.repo), where) if isinstance(where, HubModel) else (where, None)
        parts = [
            {field: values.pop(field) for field in record.__struct_fields__ if field in values}
            for record in (ModelConfig, Limits, Policy, VisionConfig, Scaling)
        ]
        model, limits, policy, vision, scales = parts
        scaling = Scaling(**scales)
        if model.get("draft_model") is not None and policy.get("speculate") == 0:
            raise ConfigError("--draft-model guesses tokens and --speculate 0 forbids it; leave one of them out")
        values.update(limits=Limits(**limits), policy=Policy(**policy), vision=VisionConfig(**vision), hub=hub)
        values.update(scaling=scaling, replicas=scaling.most(values.get("replicas", 1)))
        return cls(ModelConfig(folder, **model), name or where.name, **values)

    @classmethod
    def asked(cls, where: Path | HubModel, name: str, values: Mapping[str, Any], **fields: Any) -> GeneratorConfig:
        """As `of`, with the settings whose keys are in `values`.

        Args:
            fields: by field name; they override `values`.
        """
        told = {each.name: each.told(values[each.key]) for each in SETTINGS if each.key in values}
        return cls.of(where, name, **{**told, **fields})

    @property
    def here(self) -> bool:
        """Whether nothing has to be fetched."""
        draft = self.model.draft_model
        hubs = [self.hub, *(each.hub for each in self.model.adapters), None if draft is None else draft.hub]
        return all(hub is None for hub in hubs)

    @property
    def least(self) -> int:
        """The replicas that there are always."""
        return self.scaling.least(self.replicas)

    def of_replica(self, number: int) -> GeneratorConfig:
        """The configuration of one replica: its devices, and its share of the threads."""
        if self.replicas == 1:
            return self
        size, threads = self.tensor_parallel, self.model.threads
        ids = self.device_ids or tuple(range(size * self.replicas))
        model = msgspec.structs.replace(self.model, threads=max(1, threads // self.replicas) if threads else 0)
        mine = ids[number * size : (number + 1) * size]
        return msgspec.structs.replace(self, model=model, replica=number, device_ids=mine)

    def completed(self, environment: Mapping[str, str]) -> GeneratorConfig:
        """See `ModelConfig.completed`."""
        return msgspec.structs.replace(self, model=self.model.completed(environment))

    async def fetched(self) -> GeneratorConfig:
        """The same, with the model, its draft model and adapters fetched to this machine. Cancelling ends a fetch.

        Raises:
            StartError: something cannot be fetched; the text says why and what to do.
        """
        model = self.model
        model = msgspec.structs.replace(model, adapters=tuple([await each.fetched() for each in model.adapters]))
        code = {"allow_pickle": model.allow_pickle, "trust_remote_code": model.trust_remote_code}
        if model.draft_model is not None:
            model = msgspec.structs.replace(model, draft_model=await model.draft_model.fetched(**code))
        if self.hub is None:
            return msgspec.structs.replace(self, model=model)
        found = await fetch(self.hub, **code)
        model = msgspec.structs.replace(model, model_dir=found.path)
        return msgspec.structs.replace(self, model=model, commit=found.commit, hub=None)


SETTINGS = tuple(
    field
    for record in (GeneratorConfig, ModelConfig, Policy, Limits, VisionConfig, Scaling)
    for field in fields_of(record)
)
"""All settings of a language model for a command line, a file or a script."""
