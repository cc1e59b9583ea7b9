"""A client for whatever server answers at an address: ours, or another with OpenAI's API."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

from shardline_client.client import Client
from shardline_client.errors import ServerError
from shardline_client.results import Model
from shardline_client.settings import ClientOptions

OURS = "shardline"


@contextmanager
def connect(url: str, **options: Unpack[ClientOptions]) -> Iterator[Client]:
    """A client that names its model, and sends a server that is not ours only OpenAI's fields."""
    with Client(url, **options) as client:
        chosen = choose_model(client.models(), options.get("model"))
    with Client(url, **options | adapted(chosen)) as client:
        yield client


def choose_model(models: tuple[Model, ...], name: str | None) -> Model:
    """The one of this name (the server may know more than it lists), or the first."""
    if not models:
        raise ServerError("The server serves no model.")
    named = next((model for model in models if model.name == name), models[0])
    return named if name is None else Model(name=name, owned_by=named.owned_by)


def adapted(model: Model) -> ClientOptions:
    """The options that a client for this model differs in."""
    return {"model": model.name, "openai_only": model.owned_by != OURS}
