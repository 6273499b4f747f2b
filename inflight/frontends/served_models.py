"""The language models that are served, by the ids that clients see: for OpenAI's `/v1/models` and Anthropic's."""

from __future__ import annotations

from typing import NamedTuple

from inflight.contract import Generator
from inflight.errors import NotFound
from inflight.frontends.base import Backend
from inflight.frontends.llm import loaded, pick
from inflight.wire import Scope, header

MODELS = "/v1/models"


class Served(NamedTuple):
    """A model under one of its ids. Attributes: parent: the model's id, where this is an adapter's."""

    id: str
    generator: Generator
    parent: str | None = None


def asks_for_anthropics(scope: Scope) -> bool:
    """Whether a request for models comes from a client of Anthropic's, which reads another form of them."""
    path: str = scope["path"]
    return (path == MODELS or path.startswith(f"{MODELS}/")) and header(scope, b"anthropic-version") is not None


def public_id(id: str, generator: Generator, tgi: bool) -> str:
    """The name that answers give a model: its id on the hub, or what the user chose, but no folder of the server. TGI
    shows even that."""
    known = generator.info.model_id
    return known if tgi or not known.startswith("/") else id


def served_models(backend: Backend, tgi: bool = False) -> list[Served]:
    """Every loaded model under each of its ids, then the adapters.

    Raises:
        Loading: no model is loaded yet.
    """
    known = {id: generator for id, generator in backend.generators.items() if generator.info.loaded}
    if not known:
        pick(backend)
    found: list[Served] = []
    for id, generator in known.items():
        public = public_id(id, generator, tgi)
        found += [Served(name, generator) for name in ((public,) if tgi else dict.fromkeys((public, id)))]
    found += [Served(adapter, generator, id) for id, generator in known.items() for adapter in generator.info.adapters]
    return found


def served_model(backend: Backend, name: str, tgi: bool = False) -> Served:
    """The model of this id.

    Raises:
        Loading: it is not loaded yet, or none is.
        NotFound: there is none.
    """
    one = next((each for each in served_models(backend, tgi) if each.id == name), None)
    if one is not None:
        return one
    for id, generator in backend.generators.items():
        if name in (id, generator.info.model_id, *generator.info.adapters):
            loaded(generator)
            return Served(name, generator)
    raise NotFound(f"The model `{name}` does not exist")
