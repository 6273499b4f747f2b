"""From a job description to a running pipeline: loads the servable and its models, and says what they offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inflight.errors import InflightError, StartError, describe
from inflight.link import GeneratorOffer, GraphOffer, MethodOffer, ModelOffer, Offer, WorkerJob
from inflight.pipeline import BatchedModel, LocalModel, ModelPort, Pipeline
from inflight.runtime import LoadedModel, LoadRequest, available_formats, configure, find_runtime, read_signature
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
from inflight.types import TensorSpec
from inflight.worker.remote import RemoteModel


@dataclass(frozen=True)
class Loaded:
    """A servable ready to run in this process."""

    spec: ServableSpec
    version: int
    ports: dict[str, ModelPort]
    models: list[ModelOffer]
    device_type: str


def load(job: WorkerJob, send_call: Callable[[str, int, list[tuple[int, list[object], int]]], None]) -> Loaded:
    """Loads what the job names.

    Args:
        send_call: how rows of a model that lives on another worker leave (`RemoteModel`).

    Raises:
        InflightError: with a text for the person who started the server.
    """
    configure(job.runtimes)
    allow_formats(available_formats())
    spec = _spec(job)
    has_files = any(model.files for model in spec.models.values())
    if job.model_file is None:
        version = resolve_version(Path(job.directory), job.name, job.version, has_files)
        number, folder = version.number, version.path or spec.directory
    else:
        number, folder = max(1, job.version), spec.directory
    generators: dict[str, ModelPort] = {
        key: RemoteModel(_generator_offer(key), send_call)
        for key, model in spec.models.items()
        if model.generator is not None
    }
    if not job.own_models:
        ports: dict[str, ModelPort] = {offer.key: RemoteModel(offer, send_call) for offer in job.models}
        ports.update(generators)
        return Loaded(spec, number, ports, job.models, "remote")
    ports = dict(generators)
    offers: list[ModelOffer] = []
    device = "none"
    for model in spec.models.values():
        if model.generator is not None:
            offers.append(_generator_offer(model.key))
            continue
        batched = _load_model(job, spec, model, folder)
        device = batched.model.device_type
        for graph in batched.model.graphs[:1]:
            check_model_counts(spec, model.key, len(graph.inputs), len(graph.outputs))
        ports[model.key] = LocalModel(model.key, batched)
        offers.append(_model_offer(batched))
    return Loaded(spec, number, ports, offers, device)


def offer(loaded: Loaded, pipeline: Pipeline, own_models: bool) -> Offer:
    """What the server needs to know of a loaded servable."""
    models = {model.key: model for model in loaded.models}
    declared = [_method_offer(method, models, pipeline.batch_size) for method in loaded.spec.methods.values()]
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
        )
        for (key, _), method in pipeline.hidden.items()
    ]
    return Offer(
        version=loaded.version,
        methods=declared + (hidden if own_models else []),
        models=loaded.models,
        own_models=own_models,
        device_type=loaded.device_type,
        generators=[
            GeneratorOffer(
                key, str(model.generator.model_dir), model.generator.tensor_parallel, dict(model.generator.options)
            )
            for key, model in loaded.spec.models.items()
            if model.generator is not None
        ],
    )


def _spec(job: WorkerJob) -> ServableSpec:
    if job.model_file is None:
        return load_servable(Path(job.directory), job.name)
    path = Path(job.model_file)
    graph = read_signature(path)
    names = [tensor.name for tensor in graph.inputs]
    outputs = [tensor.name for tensor in graph.outputs]
    if not names or not outputs:
        raise StartError(
            f"'{path.name}' does not say its inputs and outputs; write a servable_config.py that declares it"
        )
    firsts = {tensor.shape[0] if tensor.shape else None for tensor in (*graph.inputs, *graph.outputs)}
    return bare_model(
        path,
        job.name,
        names,
        outputs,
        max_batch_size=job.max_batch_size or DEFAULT_MAX_BATCH_SIZE,
        # One first dimension shared by everything is a batch; anything else is a model of whole calls.
        with_batch_dim=len(firsts) == 1 and None not in firsts,
    )


def _load_model(job: WorkerJob, spec: ServableSpec, model: ModelSpec, folder: Path) -> BatchedModel:
    where = f"servable directory: '{job.directory}', servable name: '{job.name}', model: '{model.key}'"
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
            config_file=spec.directory / model.config_file if model.config_file else None,
            target=model.target,
        )
        loaded: LoadedModel = runtime.load(request)
        return BatchedModel(model, loaded)
    except InflightError as error:
        text = str(error).removeprefix("Load model failed, ")
        raise StartError(f"Load model failed, {where}, {text}") from error
    except BaseException as error:  # a back end, or a callable's class, may raise anything
        raise StartError(f"Load model failed, {where}, {type(error).__name__}: {describe(error)}") from error


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


def _method_offer(method: MethodSpec, models: dict[str, ModelOffer], batch_size: int) -> MethodOffer:
    return MethodOffer(
        name=method.name,
        inputs=[_input_spec(method, index, name, models) for index, name in enumerate(method.inputs)],
        outputs=[_output_spec(method, index, name, models) for index, name in enumerate(method.outputs)],
        queue_size=method.queue_size,
        priority=method.priority,
        timeout=method.timeout,
        batch_size=batch_size,
        has_function_stage=method.has_function_stage,
    )


def _input_spec(method: MethodSpec, index: int, name: str, models: dict[str, ModelOffer]) -> TensorSpec:
    """What is known of a method's input: what the first model that reads it unchanged says."""
    for stage in method.stages:
        for position, ref in enumerate(stage.inputs):
            if stage.kind == "model" and ref == (0, index):
                model = models[stage.key]
                if position < len(model.graphs[0].inputs):
                    batched = model.batched and position not in model.unbatched_inputs
                    return _instance_spec(name, model.graphs[0].inputs[position], batched)
    return TensorSpec(name)


def _output_spec(method: MethodSpec, index: int, name: str, models: dict[str, ModelOffer]) -> TensorSpec:
    ref = method.returns[index]
    if ref.stage == 0:
        return _input_spec(method, ref.output, name, models)
    stage = method.stages[ref.stage - 1]
    if stage.kind == "model" and ref.output < len(models[stage.key].graphs[0].outputs):
        model = models[stage.key]
        return _instance_spec(name, model.graphs[0].outputs[ref.output], model.batched)
    return TensorSpec(name)


def _instance_spec(name: str, tensor: TensorSpec, batched: bool) -> TensorSpec:
    shape = tensor.shape[1:] if batched and tensor.shape is not None else tensor.shape
    return TensorSpec(name, tensor.dtype, shape)
