"""The HTTP application: routes, keys and errors put together."""

from importlib import metadata
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from shardline_server.api_keys import TENANT_HEADER, ApiKeys
from shardline_server.door_config import DoorConfig
from shardline_server.generation import GenerationService
from shardline_server.http_api.body_limit import BodyLimit
from shardline_server.http_api.errors import install_error_handlers
from shardline_server.http_api.generation_routes import generation_router
from shardline_server.http_api.model_routes import model_router
from shardline_server.http_api.operator_routes import metrics_router, operator_router
from shardline_server.http_api.responses import ErrorResponse

Responses = dict[int | str, dict[str, Any]]


def create_app(service: GenerationService, keys: ApiKeys, door: DoorConfig) -> FastAPI:
    """The application over one service; with keys, clients' endpoints need one of them.

    With an admin port, metrics and documentation are `create_admin_app`'s.
    """
    bearer = HTTPBearer(auto_error=False)

    async def tenant_of(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        tenant: Annotated[str | None, Header(alias=TENANT_HEADER)] = None,
    ) -> str:
        return keys.tenant_of(credentials.credentials if credentials else None, tenant)

    is_public = door.admin_port is None
    app = _application(openapi_url="/openapi.json" if is_public else None)
    app.include_router(operator_router(service))
    if is_public:
        app.include_router(metrics_router(service))
    answers: Responses = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
    # Its endpoints ask for the tenant themselves: asking twice is a tenth of what a request takes.
    app.include_router(generation_router(service, tenant_of), responses=answers)
    app.include_router(model_router(service), dependencies=[Depends(tenant_of)], responses=answers)
    app.add_middleware(BodyLimit, max_bytes=door.limits.max_body_bytes)
    if door.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=door.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return app


def create_admin_app(service: GenerationService, public: FastAPI) -> FastAPI:
    """Metrics, and the documentation of the public application."""
    app = _application(openapi_url="/openapi.json")
    app.include_router(metrics_router(service))
    app.openapi = public.openapi  # type: ignore[method-assign]
    return app


def _application(*, openapi_url: str | None) -> FastAPI:
    app = FastAPI(
        title="Shardline",
        version=metadata.version("shardline"),
        description="One large language model, split over many devices.",
        strict_content_type=False,
        openapi_url=openapi_url,
    )
    install_error_handlers(app)
    return app
