"""The HTTP application: routes, keys and errors put together."""

from importlib import metadata
from typing import Annotated

from fastapi import Depends, FastAPI, Header
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from shardline_server.api_keys import TENANT_HEADER, ApiKeys
from shardline_server.generation import GenerationService
from shardline_server.http_api.errors import install_error_handlers
from shardline_server.http_api.generation_routes import generation_router
from shardline_server.http_api.model_routes import model_router
from shardline_server.http_api.operator_routes import operator_router
from shardline_server.http_api.responses import ErrorResponse


def create_app(service: GenerationService, keys: ApiKeys) -> FastAPI:
    """The application over one service; with keys, clients' endpoints need one of them."""
    bearer = HTTPBearer(auto_error=False)

    async def tenant_of(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        tenant: Annotated[str | None, Header(alias=TENANT_HEADER)] = None,
    ) -> str:
        return keys.tenant_of(credentials.credentials if credentials else None, tenant)

    app = FastAPI(
        title="Shardline",
        version=metadata.version("shardline"),
        description="One large language model, split over many devices.",
        strict_content_type=False,
        openapi_url="/openapi.json",
    )
    install_error_handlers(app)
    app.include_router(operator_router(service))
    for router in (generation_router(service, tenant_of), model_router(service)):
        app.include_router(
            router,
            dependencies=[Depends(tenant_of)],
            responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
        )
    return app
