"""`shardline serve`: starts the engine, opens both doors, and ends everything in order."""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path

import uvloop

from shardline_scheduler.budget import Priority
from shardline_server.budgets import BudgetPolicy
from shardline_server.engine_config import NodesConfig
from shardline_server.engine_launch import plan_engine
from shardline_server.errors import ConfigError, EngineUnavailable
from shardline_server.frontend import Addresses, Frontend, FrontendConfig
from shardline_server.node_agent import run_node
from shardline_server.node_launchers import find_launch
from shardline_server.node_plan import plan_node
from shardline_server.settings import ServeSettings
from shardline_server.supervisor import Supervisor
from shardline_shards.sources import resolve_model

logger = logging.getLogger("shardline")

_FAILURE_SHOWS_S = 5.0  # for probes to see why; streams have ended by then


def serve(settings: ServeSettings) -> int:
    """Serve until a signal says stop; returns the exit status.

    Started by a launcher on another node than the first, this process takes part in what that
    one serves.

    Raises ConfigError and ShardError for what the operator can mend.
    """
    launch = find_launch(os.environ)
    if launch is not None and launch.node_index > 0:
        return run_node(plan_node(settings, launch))
    needs_weights = settings.load_format != "dummy"
    model_path = resolve_model(
        settings.model, cache_dir=settings.cache, needs_weights=needs_weights
    )
    config = plan_engine(settings, model_path, launch)
    if config.nodes is not None:
        print(_waiting_line(config.nodes, is_secret_known=settings.secret is not None), flush=True)
    supervisor = Supervisor(config)
    try:
        return uvloop.run(_serve(settings, model_path, supervisor))
    finally:
        supervisor.stop()


async def _serve(settings: ServeSettings, model_path: Path, supervisor: Supervisor) -> int:
    signals = _StopSignals()
    frontend = Frontend(
        FrontendConfig(
            host=settings.host,
            http_port=settings.port,
            grpc_port=settings.grpc_port,
            engine=await supervisor.wire(),
            model_path=model_path,
            served_model_names=(settings.model_name,),
            default_max_tokens=settings.default_max_tokens,
            budgets=BudgetPolicy(
                classes=settings.budget_classes, default=Priority(settings.default_priority)
            ),
            door=settings.door_config(),
        )
    )
    addresses = await frontend.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, frontend.reload_keys)
    watch = asyncio.create_task(supervisor.watch(frontend))
    announce = asyncio.create_task(_announce(frontend, addresses, settings))
    leave = asyncio.create_task(_asked_to_leave(signals, frontend))
    try:
        await asyncio.wait({announce, leave}, return_when=asyncio.FIRST_COMPLETED)
        has_served = announce.done() and await _has_started(announce, watch, supervisor)
        await asyncio.wait({watch, leave}, return_when=asyncio.FIRST_COMPLETED)
        if not leave.done():
            logger.error("The server ends: %s", watch.result())
            await asyncio.wait({leave}, timeout=_FAILURE_SHOWS_S if has_served else 0)
            return 1
        await _first_of(frontend.drain(settings.grace_s), signals.second.wait())
    finally:
        watch.cancel()
        announce.cancel()
        await frontend.stop()
        await asyncio.to_thread(supervisor.stop)
    return 0


async def _announce(frontend: Frontend, addresses: Addresses, settings: ServeSettings) -> None:
    """Print how to reach us. Raises EngineUnavailable if the engine ends before it is ready.

    What is there by now stays: to look through all of it for garbage takes 200 ms, and no request
    is to wait for that.
    """
    await frontend.wait_ready()
    gc.collect()
    gc.freeze()
    print(_banner(addresses, settings), flush=True)


async def _has_started(
    announce: asyncio.Task[None], watch: asyncio.Task[str], supervisor: Supervisor
) -> bool:
    """False if the engine has ended instead, for good: nobody's request is lost by that, whoever
    started us can do so again, and what kills a worker that loads mostly kills the next one.

    Raises ConfigError if it ended for what the operator can mend.
    """
    try:
        await announce
    except EngineUnavailable as error:
        await watch
        if supervisor.has_refused:
            raise ConfigError(str(error)) from error
        return False
    return True


def _waiting_line(nodes: NodesConfig, *, is_secret_known: bool) -> str:
    """What to type on the other nodes; a secret that the operator has chosen is not shown."""
    waiting = f"Waiting for {nodes.num_nodes - 1} more node(s)"
    if nodes.launcher is not None:
        return f"{waiting} that {nodes.launcher} has started."
    secret = '"$SHARDLINE_SECRET"' if is_secret_known else nodes.secret
    return f"""
{waiting}. On each of them:

  SHARDLINE_SECRET={secret} shardline worker --join {nodes.board}
"""


def _banner(addresses: Addresses, settings: ServeSettings) -> str:
    name, url, target = settings.model_name, addresses.http_url, addresses.grpc_target
    has_key = bool(settings.api_key or settings.api_key_file)
    key_header = " -H 'Authorization: Bearer YOUR_KEY'" if has_key else ""
    metadata = ", metadata=[('authorization', 'Bearer YOUR_KEY')]" if has_key else ""
    return f"""
Shardline serves {name}: {settings.pp} stages x {settings.tp} shards
  HTTP  {url}   (documentation at {addresses.admin_url}/docs)
  gRPC  {target}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key_header} \\
    -d '{{"model": "{name}", "temperature": 0, \
"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

  {sys.executable} -c "import grpc; from shardline_server.protos.shardline.v1 import \
generation_pb2 as pb, generation_pb2_grpc as rpc; \
stub = rpc.GenerationStub(grpc.insecure_channel('{target}')); \
request = pb.GenerateRequest(text='The capital of France is'); \
request.sampling.temperature = 0; print(stub.Generate(request{metadata}))"
"""


class _StopSignals:
    """SIGINT and SIGTERM: the first asks to leave, the second to be quick about it."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _asked_to_leave(signals: _StopSignals, frontend: Frontend) -> None:
    """Until a signal says so, here or on another node."""
    await _first_of(signals.first.wait(), frontend.wait_asked_to_leave())
    if not signals.first.is_set():
        logger.warning("The server leaves: %s", await frontend.wait_asked_to_leave())
        signals.first.set()


async def _first_of(*waits: Coroutine[None, None, object]) -> None:
    """Until one of them is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
