"""Loads a servable and its models, and describes them to the server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from inflight.contract import TensorSpec
from inflight.errors import InflightError, StartError, describe
from inflight.link import GeneratorOffer, GraphOffer, MethodOffer, ModelOffer, Offer, WorkerJob
from inflight.pipeline import BatchedModel, Finding, LocalModel, ModelPort, Pipeline, examine
from inflight.runtime import GraphSpec, LoadedModel, LoadRequest, available_formats, configure, find_runtime
from inflight.servable import (
    DEFAULT_MAX_BATCH_SIZE,
    MethodSpec,
    ModelSpec,
    ServableSpec,
    allow_formats,
    bare_model,
    check_model_counts,
    load_servable,
    resolve_version,
)
from inflight.worker.remote import RemoteModel, SendCall

if TYPE_CHECKING:
    from inflight.distributed import Loss, RankGroup

_log = logging.getLogger("inflight")


@dataclass(frozen=True)
class Loaded:
    """A servable ready to run in this process.

    Attributes:
        whole: it is a bare model file that takes one request a call.
    """

    spec: ServableSpec
    version: int
    ports: dict[str, ModelPort]
    models: list[ModelOffer]
    device_type: str
    whole: bool = False


_Trial: TypeAlias = "Callable[[], AbstractContextManager[None]]"


@dataclass(frozen=True)
class Hooks:
    """What a load tells its worker, and asks it.

    Attributes:
        send_call: sends rows of a model that runs on another worker (`RemoteModel`).
        trial: entered around runs of a model on made-up inputs, which may never end.
        phase: called with the step that begins.
        ending: whether this process is to end.
        lost: called when a distributed model has lost a rank, on a thread of its own.
        gathered: called with a distributed model's ranks when all are there.
    """

    send_call: SendCall
    trial: _Trial
    phase: Callable[[str], None]
    ending: Callable[[], bool] = lambda: False
    lost: Callable[[Loss], None] = lambda loss: None
    gathered: Callable[[RankGroup], None] = lambda group: None


def load(job: WorkerJob, hooks: Hooks) -> Loaded:
    """Loads the servable or the model file of the job.

    Raises:
        InflightError: with a text for the person who started the server.
    """
    send_call, trial, phase = hooks.send_call, hooks.trial, hooks.phase
    configure(job.runtimes)
    allow_formats(available_formats())
    if job.model_file is not None:
        phase(f"loads '{job.model_file}'")
        return _load_bare(job, Path(job.model_file), trial)
    phase("imports its servable_config.py")
    spec = load_servable(Path(job.directory), job.name)
    has_files = any(model.files for model in spec.models.values())
    version = resolve_version(Path(job.directory), job.name, job.version, has_files)
    number, folder = version.number, version.path or spec.directory
    generators: dict[str, ModelPort] = {
        key: RemoteModel(_generator_offer(key), send_call)
        for key, model in spec.models.items()
        if model.generator is not None
    }
    if not job.own_models:
        ports: dict[str, ModelPort] = {offer.key: RemoteModel(offer, send_call) for offer in job.models}
        ports.update(generators)
        return Loaded(spec, number, ports, job.models, "remote")
    _check_ranks(job, spec)
    if job.device_id is None:
        _check_cpu(job, spec)
    ports = dict(generators)
    offers: list[ModelOffer] = []
    device = "none"
    for model in spec.models.values():
        if model.generator is not None:
            offers.append(_generator_offer(model.key))
            continue
        phase(f"loads model '{model.key}'")
        if model.ranks is not None:
            batched = _open_ranks(job, spec.name, model, hooks)
        else:
            batched = _load_model(job, spec.directory, model, folder, trial)
        device = batched.model.device_type
        for graph in batched.model.graphs[:1]:
            check_model_counts(spec, model.key, len(graph.inputs), len(graph.outputs))
        ports[model.key] = LocalModel(model.key, batched)
        offers.append(_model_offer(batched))
    return Loaded(spec, number, ports, offers, device)


def offer(loaded: Loaded, pipeline: Pipeline, own_models: bool) -> Offer:
    """The description of a loaded servable for the server."""
    models = {model.key: model for model in loaded.models}
    declared = [
        _method_offer(method, loaded.spec, models, pipeline.batch_size, loaded.whole)
        for method in loaded.spec.methods.values()
    ]
    hidden = [
        MethodOffer(
            name=method.name,
            inputs=[],
            outputs=[],
            queue_size=None,
            # Python stages wait for these, so they go before anything new.
            priority=1 << 30,
            timeout=None,
            batch_size=models[key].batch_size,
            has_function_stage=False,
            model=key,
            subgraph=subgraph,
        )
        for (key, subgraph), method in pipeline.hidden.items()
    ]
    return Offer(
        version=loaded.version,
        methods=declared + (hidden if own_models else []),
        models=loaded.models,
        own_models=own_models,
        device_type=loaded.device_type,
        generators=[
            GeneratorOffer(key, model.generator)
            for key, model in loaded.spec.models.items()
            if model.generator is not None
        ],
    )


def _load_bare(job: WorkerJob, path: Path, trial: _Trial) -> Loaded:
    """A model file without a servable_config.py: its names, and whether it has a batch, come from the model."""
    loaded = _open(job, path.parent, ModelSpec(path.name, (path.name,)), path.parent, trial)
    graph = loaded.graphs[0]
    if not graph.inputs or not graph.outputs:
        raise StartError(
            f"'{path.name}' does not say its inputs and outputs; write a servable_config.py that declares it"
        )
    size = job.max_batch_size or DEFAULT_MAX_BATCH_SIZE
    whole = job.whole
    if whole is None:
        finding = _examine(job, loaded, size, trial)
        loaded.graphs = (GraphSpec(graph.inputs, finding.outputs),)
        whole = not finding.batched
        if whole:
            _log.warning(
                "model file '%s' is served one request a call: %s; where its first dimension is a batch all the same, "
                "declare the model in a servable_config.py",
                path.name,
                finding.reason,
            )
    names = [tensor.name for tensor in graph.inputs], [tensor.name for tensor in graph.outputs]
    spec = bare_model(
        path, job.name, *names, max_batch_size=size, with_batch_dim=not whole, max_wait_ms=job.max_wait_ms
    )
    batched = BatchedModel(spec.models[path.name], loaded)
    ports: dict[str, ModelPort] = {path.name: LocalModel(path.name, batched)}
    return Loaded(spec, max(1, job.version), ports, [_model_offer(batched)], loaded.device_type, whole)


def _check_cpu(job: WorkerJob, spec: ServableSpec) -> None:
    """Without `device_ids` models run on the CPU: checks that this is the device asked for and that their back ends
    support it.

    Raises:
        StartError: with MindSpore Serving's text.
    """
    text = (
        f"Servable '{spec.name}' has models declared by declare_model, but parameter 'device_ids' of "
        "ServableStartConfig is not set in Serving startup script when the"
    )
    for model in spec.models.values():
        if model.generator is not None:
            continue
        if job.device_type not in (None, "cpu"):
            raise StartError(f"{text} device target is not CPU, but '{job.device_type}'; give device_ids")
        file = Path(model.files[0]) if model.files else None
        runtime = find_runtime(model.format or ("callable" if model.target else None), file)
        if "cpu" not in runtime.devices():
            raise StartError(
                f"{text} MindSpore or Lite inference package not support CPU: {runtime.__name__} supports "
                f"{', '.join(runtime.devices())}; give device_ids"
            )


def _check_ranks(job: WorkerJob, spec: ServableSpec) -> None:
    """Raises StartError where a servable is started as distributed and is not declared so, or the other way round."""
    distributed = any(model.ranks is not None for model in spec.models.values())
    if distributed and job.ranks is None:
        raise StartError(
            f"servable '{spec.name}' is declared as distributed: start it with distributed.start_servable, or with "
            "inflight serve --rank-table FILE; both need a rank table"
        )
    if job.ranks is not None and not distributed:
        raise StartError(
            f"servable '{spec.name}' is started as distributed, but its servable_config.py declares no distributed "
            "model: use distributed.declare_servable there, or start it with start_servables"
        )


def _open_ranks(job: WorkerJob, servable: str, model: ModelSpec, hooks: Hooks) -> BatchedModel:
    from inflight.distributed import GroupModel, RankGroup  # other servables do without

    assert model.ranks is not None
    assert job.ranks is not None
    ranks = model.ranks
    declared = GroupModel(servable, ranks.size, ranks.stages, ranks.pipeline)
    group = RankGroup(declared, job.ranks, hooks.ending, hooks.phase, hooks.lost)
    hooks.gathered(group)
    try:
        return BatchedModel(model, group)
    except BaseException:
        group.close()
        raise


def _examine(job: WorkerJob, loaded: LoadedModel, size: int, trial: _Trial) -> Finding:
    if job.trial_seconds is None:
        return Finding(False, "its trial runs did not end in time", loaded.graphs[0].outputs)
    return examine(loaded, size, trial)


def _load_model(job: WorkerJob, directory: Path, model: ModelSpec, folder: Path, trial: _Trial) -> BatchedModel:
    loaded = _open(job, directory, model, folder, trial)
    try:
        return BatchedModel(model, loaded)
    except StartError as error:
        raise _about(job, model, error) from error


def _open(job: WorkerJob, directory: Path, model: ModelSpec, folder: Path, trial: _Trial) -> LoadedModel:
    files = tuple(folder / file for file in model.files) if model.target is None else ()
    try:
        for file in files:
            # A callable's "file" is a module path; everything else must be there.
            if not file.exists() and ":" not in file.name:
                raise StartError(f"model file '{file}' not exist")
        runtime = find_runtime(model.format or ("callable" if model.target else None), files[0] if files else None)
        usable = runtime.devices()
        wanted = job.device_type if job.device_id is not None else "cpu"
        if wanted is not None and wanted not in usable:
            raise StartError(
                f"device type '{wanted}' cannot be used here by {runtime.__name__}, which supports: {', '.join(usable)}"
            )
        device = wanted or usable[0]
        request = LoadRequest(
            files=tuple(Path(file) for file in model.files) if model.format == "callable" else files,
            device_type=device,
            device_id=job.device_id or 0,
            threads=model.thread_num or job.threads,
            options=dict(model.device_options[device].options) if device in model.device_options else {},
            dec_key=job.dec_key,
            dec_mode=job.dec_mode,
            config_file=directory / model.config_file if model.config_file else None,
            target=model.target,
            trial=None if job.trial_seconds is None else trial,
        )
        return runtime.load(request)
    except BaseException as error:  # a back end, or a callable's class, may raise anything
        raise _about(job, model, error) from error


def _about(job: WorkerJob, model: ModelSpec, error: BaseException) -> StartError:
    """The error of a model, with the place of its declaration."""
    where = f"servable directory: '{job.directory}', servable name: '{job.name}', model: '{model.key}'"
    text = str(error) if isinstance(error, InflightError) else f"{type(error).__name__}: {describe(error)}"
    return StartError(f"Load model failed, {where}, {text.removeprefix('Load model failed, ')}")


GENERATOR_ROWS = 256
"""Prompts that go to a language model in one message."""


def _generator_offer(key: str) -> ModelOffer:
    """A language model as a model of texts: a prompt, and parameters where the stage gives them; one text back."""
    graph = GraphOffer([TensorSpec("prompt", "str")], [TensorSpec("text", "str")])
    return ModelOffer(key, [graph], GENERATOR_ROWS, fixed=False, batched=False, unbatched_inputs=[])


def _model_offer(batched: BatchedModel) -> ModelOffer:
    return ModelOffer(
        key=batched.spec.key,
        graphs=[GraphOffer(list(graph.inputs), list(graph.outputs)) for graph in batched.model.graphs],
        batch_size=batched.batch_size,
        fixed=batched.fixed,
        batched=batched.spec.with_batch_dim,
        unbatched_inputs=list(batched.spec.without_batch_dim_inputs),
    )


def _method_offer(
    method: MethodSpec, spec: ServableSpec, models: dict[str, ModelOffer], batch_size: int, whole: bool
) -> MethodOffer:
    return MethodOffer(
        name=method.name,
        inputs=[_input_spec(method, spec, index, name, models) for index, name in enumerate(method.inputs)],
        outputs=[_output_spec(method, spec, index, name, models) for index, name in enumerate(method.outputs)],
        queue_size=method.queue_size,
        priority=method.priority,
        timeout=method.timeout,
        execution_timeout=method.execution_timeout,
        batch_size=batch_size,
        has_function_stage=method.has_function_stage,
        whole=whole,
    )


def _input_spec(
    method: MethodSpec, spec: ServableSpec, index: int, name: str, models: dict[str, ModelOffer]
) -> TensorSpec:
    """The known properties of a method's input: those of the first model that reads it unchanged, or that it is a text
    or bytes, as the first function that reads it is annotated."""
    for stage in method.stages:
        for position, ref in enumerate(stage.inputs):
            if stage.kind == "function" and ref == (0, index) and not method.mindspore_values:
                kind = spec.functions[stage.key].texts[position]
                if kind is not None:
                    return TensorSpec(name, kind, ())
            if stage.kind == "model" and ref == (0, index):
                model = models[stage.key]
                if position < len(model.graphs[0].inputs):
                    batched = model.batched and position not in model.unbatched_inputs
                    return _instance_spec(name, model.graphs[0].inputs[position], batched)
    return TensorSpec(name)


def _output_spec(
    method: MethodSpec, spec: ServableSpec, index: int, name: str, models: dict[str, ModelOffer]
) -> TensorSpec:
    ref = method.returns[index]
    if ref.stage == 0:
        return _input_spec(method, spec, ref.output, name, models)
    stage = method.stages[ref.stage - 1]
    if stage.kind == "model" and ref.output < len(models[stage.key].graphs[0].outputs):
        model = models[stage.key]
        return _instance_spec(name, model.graphs[0].outputs[ref.output], model.batched)
    return TensorSpec(name)


def _instance_spec(name: str, tensor: TensorSpec, batched: bool) -> TensorSpec:
    shape = tensor.shape[1:] if batched and tensor.shape is not None else tensor.shape
    return TensorSpec(name, tensor.dtype, shape)
