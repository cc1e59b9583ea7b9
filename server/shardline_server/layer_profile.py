"""What the layers of a model take on this host: measured once, then kept in the cache folder."""

import hashlib
import logging
import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec

from shardline_server.child import start_child_process, stop_child_processes
from shardline_server.local_workers import deal_cores, thread_environment
from shardline_server.settings import ServeSettings
from shardline_shards.fingerprint import model_fingerprint
from shardline_shards.messages import ProfileConfig, ProfileOutcome
from shardline_shards.partition import LayerTimes

logger = logging.getLogger("shardline.launch")

_FOLDER = "layer-times"
_FORMAT = 4  # another usual step gives other times, and so does measuring it otherwise


def find_layer_times(
    settings: ServeSettings, model_path: Path, dtype: str, device: str, num_local_workers: int
) -> LayerTimes | None:
    """Times from the cache, else measured now; None, with a warning, if they cannot be measured.

    None also where nobody needs them: one stage, or stages that are given and not measured yet.
    """
    if settings.pp == 1:
        return None
    cpu_ids = deal_cores(num_local_workers)[0]
    config = ProfileConfig(
        parent_pid=os.getpid(),
        model_path=str(model_path),
        dtype=dtype,
        device=device,
        tp=settings.tp,
        num_threads=settings.threads_per_worker or max(1, len(cpu_ids)),
        cpu_ids=cpu_ids,
    )
    path = settings.cache / _FOLDER / f"{_cache_key(config)}.json"
    if (kept := _read(path)) is not None:
        return kept
    if settings.stage_layers is not None:
        return None
    logger.info("measuring the layers of %s, to cut it into stages; this is kept", model_path.name)
    outcome = measure(config)
    if outcome.times is None:
        logger.warning("layers cannot be measured: %s; stages get equal shares", outcome.problem)
    else:
        _keep(path, outcome.times)
    return outcome.times


def measure(config: ProfileConfig) -> ProfileOutcome:
    """Measure in a process of its own."""
    environment = thread_environment(config.num_threads)
    process = start_child_process(
        "shardline_shards.profile_process", config, environment=environment
    )
    assert process.stdout is not None
    answer = process.stdout.readline()
    stop_child_processes([process])
    if not answer:
        return ProfileOutcome(None, "the process that measures has ended without an answer")
    return msgspec.json.decode(answer, type=ProfileOutcome)


def _cache_key(config: ProfileConfig) -> str:
    """All that the times depend on: model, split, numbers, host, and the code that computes."""
    facts = (
        _FORMAT,
        model_fingerprint(Path(config.model_path)),
        config.dtype,
        config.device,
        config.tp,
        config.num_threads,
        platform.node(),
        *(metadata.version(name) for name in ("shardline", "torch", "transformers")),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> LayerTimes | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=LayerTimes)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("%s cannot be read (%s); layers are measured again", path, error)
        return None


def _keep(path: Path, times: LayerTimes) -> None:
    """Write it whole or not at all; a cache that cannot be written costs the next start time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(msgspec.json.encode(times))
        draft.replace(path)
    except OSError as error:
        logger.warning("the layers' times cannot be kept: %s", error)
