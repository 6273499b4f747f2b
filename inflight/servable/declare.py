"""`declare_model` and `declare_generator`: the models that a servable's stages run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from inflight.config import AdapterConfig, DraftConfig, GeneratorConfig, domains, resources_of
from inflight.errors import ConfigError, RegistrationError
from inflight.hub import HubModel, hint, locate
from inflight.servable.checks import check_bool, check_int, check_ints, check_settings, check_str, check_strs
from inflight.servable.device import AclOptions, Context, GpuOptions
from inflight.servable.model import Model
from inflight.servable.spec import DEFAULT_MAX_BATCH_SIZE, ModelSpec
from inflight.servable.trace import Registry, current_registry

logger = logging.getLogger("inflight")

BUILTIN_FORMATS = ("onnx", "torch", "callable", "mindir", "mindir_lite")
_ALIASES = {"mindir_opt": "mindir_lite"}
_plugin_formats: tuple[str, ...] = ()


def allow_formats(names: Iterable[str]) -> None:
    """Sets the format names that run-time plug-ins serve, beside the built-in ones. Case is ignored."""
    global _plugin_formats
    _plugin_formats = tuple(name.lower() for name in names)


def declare_model(
    model_file: str | tuple[str, ...] | list[str] | Callable[..., Any],
    model_format: str | None = None,
    with_batch_dim: bool = True,
    options: AclOptions | GpuOptions | None = None,
    without_batch_dim_inputs: int | tuple[int, ...] | list[int] | None = None,
    context: Context | None = None,
    config_file: str | None = None,
    *,
    max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
) -> Model:
    """Declares one model of the servable.

    Args:
        model_file: a file in the version directory; or several, which become the sub-graphs of one model; or a
            Python callable that takes and returns arrays; or, with format `callable`, where to import one from:
            `package.module:attribute`, `.module:attribute` for a module beside servable_config.py.
        model_format: `onnx`, `torch`, `MindIR`, `MindIR_Lite`, `callable` or a plug-in's; case is ignored. None:
            the file's ending decides.
        with_batch_dim: the first dimension of every input and output is the batch.
        options: deprecated, ignored where `context` is given.
        without_batch_dim_inputs: indices of inputs without a batch dimension; the first one alone is `(0,)`.
        context: threads and device options.
        config_file: configuration of the back end; absolute, or relative to the servable's directory.
        max_batch_size: rows in one run where the model's batch dimension is dynamic.

    Returns:
        The model, for `add_stage` and `Model.call`.

    Raises:
        RegistrationError: a parameter of the wrong type or value, an unknown format, or a file that another
            model of the servable uses.
    """
    # The checks are in MindSpore Serving's order, so that a script with two faults gets the same error.
    check_bool("with_batch_dim", with_batch_dim)
    registry = current_registry()
    names = () if callable(model_file) else check_strs("model_file", model_file)
    unbatched = check_unbatched(without_batch_dim_inputs)
    fmt = _check_format(model_format)
    settings = _check_context(options, context)
    if config_file is not None:
        check_str("config_file", config_file)
    check_int("max_batch_size", max_batch_size, 1)
    refuse_distributed(registry)
    key, files, target = _locate(registry, model_file, names, fmt)
    if key in registry.models:
        raise RegistrationError(f"model '{key}' has already been declared, give the callable another __name__")
    registry.models[key] = ModelSpec(
        key=key,
        files=files,
        format=fmt if target is None else "callable",
        with_batch_dim=with_batch_dim,
        without_batch_dim_inputs=unbatched,
        max_batch_size=max_batch_size,
        thread_num=settings.thread_num,
        device_options=settings.device_options(),
        config_file=config_file,
        target=target,
    )
    return Model(key)


def declare_generator(
    model_dir: str | Path,
    tensor_parallel: int = 1,
    *,
    replicas: int = 1,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    queue_time: float = 1.0,
    idle_time: float = 120.0,
    cluster_resources: Mapping[str, float] | None = None,
    dtype: str = "auto",
    kv_cache_memory: int | None = None,
    threads: int = 0,
    quantize: str = "none",
    kv_cache_dtype: str = "auto",
    prompt_cache: str | Path | None = None,
    prompt_cache_size: int = 16 << 30,
    mmproj: str | Path | None = None,
    max_batch_size: int = 128,
    max_concurrent_requests: int = 128,
    max_input_tokens: int | None = None,
    max_total_tokens: int | None = None,
    speculate: int | None = None,
    draft_model: str | Path | None = None,
    lora_adapters: Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    generation_config: str = "auto",
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
    pooling: str | None = None,
    images_per_request: int = 8,
    image_max_bytes: int = 20 << 20,
    image_max_pixels: int = 50_000_000,
    image_max_tokens: int = 1024,
    media_domains: tuple[str, ...] = (),
    media_cache_memory: int = 256 << 20,
    vision_threads: int = 0,
    default_image_prompt: str = "Describe the image.",
) -> Model:
    """Declares a language model of the servable.

    As a stage it takes a prompt, or a prompt and a JSON text of parameters (`{"max_new_tokens": 50, "temperature":
    0.7, "stop": ["."]}`), and gives the generated text. If the model reads images, they come between the two: uint8
    pixels [height, width, 3], [height, width] or [n, height, width, 3], bytes of a file, or an address. Arrays of
    another stage go in as they are. Their places are the placeholders in the prompt (`<image>`, ...); without any they
    come before it, in one turn of a chat if the model has a chat template.

    A model that only reads texts gives other things as a stage: an embedder the text's vector, a classifier the scores
    of its labels, a reranker the score of two texts (a query and a document). Behind them may stand a JSON text too:
    `{"normalize": true, "dimensions": 64, "truncate": true, "prompt_name": "query", "raw_scores": true}`.

    It also answers by itself under the servable's name: `POST /model/<servable>:generate` and `:generated_stream`, and
    the routes of TGI and OpenAI.

    Args:
        model_dir: a folder in Hugging Face layout, or a GGUF file; absolute, or relative to the servable's directory.
            Or a model of the hub: `org/name`, `org/name:Q4_K_M`, which the server fetches.
        tensor_parallel: processes (devices) that share the model.
        replicas: copies of the model, each with such processes of its own.
        min_replicas, max_replicas, queue_time, idle_time: how their number follows the queue, as for `inflight serve`.
        cluster_resources: what each process gets where the server has a cluster, like `{"cpu": 8}`.
        kv_cache_memory: bytes of each process's cache; None: measured.
        threads: CPU threads of each process, which replicas divide; 0: the cores, shared.
        prompt_cache: folder where computed prompts are kept from one start to the next, absolute or relative as
            `model_dir`; None: nowhere.
        prompt_cache_size: its bytes at most.
        mmproj: the file with the vision part of a GGUF model, absolute or relative as `model_dir`; None: the one beside
            it.
        draft_model: a smaller model with the same vocabulary that guesses next tokens, as `model_dir`; None: there is
            none.
        lora_adapters: folders or hub ids of LoRA adapters by name; `"adapter_id"` in the parameters picks one.
        revision: branch, tag or commit of a model of the hub.
        dtype, quantize, kv_cache_dtype, generation_config, tool_call_parser, reasoning_parser, pooling, max_batch_size,
            max_concurrent_requests, max_input_tokens, max_total_tokens, speculate: as for `inflight serve`.
        images_per_request, image_max_bytes, image_max_pixels, image_max_tokens, media_domains, media_cache_memory,
            vision_threads, default_image_prompt: of models that read images, as for `inflight serve`.

    Returns:
        The model, for `add_stage`, and for `Model.call` inside stage functions.

    Raises:
        RegistrationError: a parameter of the wrong type or value, or a second language model.
    """
    settings = check_settings(locals())
    check_int("max_batch_size", max_batch_size, 1)
    registry = current_registry()
    refuse_distributed(registry)
    if any(model.generator is not None for model in registry.models.values()):
        raise RegistrationError("a servable has one language model; declare the other one in a servable of its own")
    where = _model_source(model_dir, registry.directory, revision)
    adapters = _adapters(lora_adapters or {}, registry.directory)
    key = where.name
    try:
        generator = GeneratorConfig.asked(
            where,
            key,
            settings,
            model_id=_public_name(where),
            max_batch_size=max_batch_size,
            adapters=adapters,
            draft_model=None if draft_model is None else DraftConfig.of(draft_model, registry.directory),
            prompt_cache=None if prompt_cache is None else registry.directory / prompt_cache,
            mmproj=None if mmproj is None else _vision_part(mmproj, registry.directory),
            media_domains=_domains(media_domains),
            resources=_resources(cluster_resources),
        )
    except ConfigError as error:
        raise RegistrationError(str(error)) from None
    registry.models[key] = ModelSpec(key, files=(), format="generator", with_batch_dim=False, generator=generator)
    return Model(key, generates=True)


GGUF = ".gguf"


def _adapters(folders: Mapping[str, str | Path], directory: Path) -> tuple[AdapterConfig, ...]:
    return tuple(AdapterConfig.of(check_str("lora_adapters", name), path, directory) for name, path in folders.items())


def _vision_part(file: str | Path, directory: Path) -> Path:
    path = directory / file
    if not path.is_file():
        raise RegistrationError(f"mmproj: there is no file '{path}'")
    return path.resolve()


def _resources(given: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    try:
        return resources_of(given)
    except ConfigError as error:
        raise RegistrationError(f"Parameter {error}") from None


def _domains(names: object) -> tuple[str, ...]:
    try:
        return domains(",".join(check_strs("media_domains", names))) if names else ()
    except ValueError as error:
        raise RegistrationError(f"Parameter 'media_domains': {error}") from None


def _public_name(where: Path | HubModel) -> str | None:
    """The name that clients use for a model of the hub; None: the folder's name is used."""
    return str(where).removeprefix("hf.co/") if isinstance(where, HubModel) else None


def _model_source(model_dir: str | Path, directory: Path, revision: str | None) -> Path | HubModel:
    """The folder or GGUF file of a language model, or the model of the hub that the server will fetch.

    Raises:
        RegistrationError: the folder does not exist or holds no model.
    """
    try:
        where = locate(model_dir, directory, revision=revision)
    except ConfigError as error:
        raise RegistrationError(str(error)) from error
    if isinstance(where, HubModel) or (where.suffix == GGUF and where.is_file()):
        return where
    if not where.exists():
        raise RegistrationError(f"model_dir: there is no '{where}'; {hint(model_dir)}")
    if not (where / "config.json").is_file() and next(where.glob(f"*{GGUF}"), None) is None:
        raise RegistrationError(f"'{where}' has no config.json; give a folder in Hugging Face layout as model_dir")
    return where.resolve()


def _check_format(model_format: object) -> str | None:
    if model_format is None:
        return None
    name = check_str("model_format", model_format)
    fmt = _ALIASES.get(name.lower(), name.lower())
    if fmt == "om":
        raise RegistrationError(
            "model format 'OM' is not supported: such offline models ran on Ascend 310 only, which MindSpore "
            "Serving itself gave up. Export the network as MindIR or ONNX and set model_format to 'MindIR' or 'onnx'"
        )
    formats = list(dict.fromkeys((*BUILTIN_FORMATS, *_plugin_formats)))
    if fmt not in formats:
        raise RegistrationError(
            f"model format '{name}' is unknown, it can only be one of {', '.join(formats)}, case ignored; "
            "leave it out to let the file's ending decide, or install the runtime plug-in that serves it"
        )
    return fmt


def _check_context(options: object, context: object) -> Context:
    if context is not None:
        if not isinstance(context, Context):
            raise RegistrationError(f"Parameter 'context' should be Context, but actually {type(context)}")
        return context
    if options is None:
        return Context()
    if not isinstance(options, (AclOptions, GpuOptions)):
        raise RegistrationError(
            f"Parameter 'options' should be None, GpuOptions or AclOptions, but actually {type(options)}"
        )
    logger.warning("Parameter 'options' of declare_model is deprecated, use 'context'")
    return options.context


def refuse_distributed(registry: Registry) -> None:
    """Raises RegistrationError where the servable has a distributed model: that is its only one."""
    if any(model.ranks is not None for model in registry.models.values()):
        raise RegistrationError("Declare model failed, servable has already been declared as distributed servable")


def check_unbatched(indices: object) -> tuple[int, ...]:
    if indices == 0 and isinstance(indices, int) and not isinstance(indices, bool):
        # MindSpore Serving dropped a bare 0; a servable that works with it has a batch dimension there.
        logger.warning("without_batch_dim_inputs=0 is ignored, write without_batch_dim_inputs=(0,) for input 0")
        return ()
    return check_ints("without_batch_dim_inputs", indices, 0) if indices else ()


def _locate(
    registry: Registry, model_file: object, files: tuple[str, ...], fmt: str | None
) -> tuple[str, tuple[str, ...], Callable[..., Any] | None]:
    """Key, files and callable of a model; a callable model has no files."""
    if callable(model_file):
        if fmt not in (None, "callable"):
            raise RegistrationError(
                f"Parameter 'model_format' is '{fmt}', but 'model_file' is a Python callable: leave model_format out"
            )
        return getattr(model_file, "__name__", type(model_file).__name__), (), model_file
    if fmt == "callable":
        if len(files) > 1:
            raise RegistrationError("Parameter 'model_file' should name one callable, declare each on its own")
        return files[0], (), _import_callable(registry, files[0])
    for model in registry.models.values():
        for file in files:
            if file in model.files:
                raise RegistrationError(
                    f"Declare model failed, model file '{file}' has already been used by model '{model.key}': "
                    "declare it once and use the returned Model in every method"
                )
    return ";".join(files), files, None


def _import_callable(registry: Registry, reference: str) -> Callable[..., Any]:
    module_name, _, attribute = reference.partition(":")
    if not module_name.strip(".") or not attribute:
        raise RegistrationError(
            f"Parameter 'model_file' is '{reference}', but a callable is named '<package.module>:<attribute>'"
        )
    try:
        target: Any = importlib.import_module(module_name, registry.package)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError, TypeError) as error:
        raise RegistrationError(f"callable model '{reference}' cannot be imported: {error}") from error
    if not callable(target):
        raise RegistrationError(f"callable model '{reference}' should be callable, but actually {type(target)}")
    imported: Callable[..., Any] = target
    return imported
