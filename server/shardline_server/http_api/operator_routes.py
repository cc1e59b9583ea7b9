"""What an operator and a load balancer ask; open to all, since it tells nothing of any request."""

from importlib import metadata
from typing import Any

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from shardline_server.generation import GenerationService
from shardline_server.messages import PipeStats


def operator_router(service: GenerationService) -> APIRouter:
    """Health, readiness, load, version."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process and its engine live (or still load); 503 with the reason after.

        Tells which part of the engine was lost last, and whether it is still being replaced.
        """
        engine = service.engine
        engine.require_healthy()
        answer = {"status": "recovering" if engine.is_recovering else "ok"}
        return answer if engine.last_loss is None else answer | {"last_loss": engine.last_loss}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """200 when requests can be served."""
        return {"status": "ready", "model": service.model.names[0]}

    @router.get("/load")
    async def load() -> dict[str, Any]:
        """Requests of clients in this process, what the engine runs and keeps waiting, and where
        the time of each stage has gone.
        """
        stats = service.engine.stats
        return {
            "server_load": service.num_running,
            "num_requests_running": stats.num_running if stats else 0,
            "num_requests_waiting": stats.num_waiting if stats else 0,
            "pipe": _describe(service.engine.pipe),
        }

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Shardline's version."""
        return {"version": metadata.version("shardline")}

    return router


def _describe(pipe: PipeStats | None) -> dict[str, Any] | None:
    """None until the engine has told."""
    if pipe is None:
        return None
    stages = [msgspec.structs.asdict(stage) for stage in pipe.stages]
    return msgspec.structs.asdict(pipe) | {"stages": stages}


def metrics_router(service: GenerationService) -> APIRouter:
    """What Prometheus reads."""
    router = APIRouter()

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
