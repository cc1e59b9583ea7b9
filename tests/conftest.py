import os
from pathlib import Path

import pytest

# No test needs the network; without this a typo in a model name would ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Servers that tests start shall be quick; measuring has tests of its own.
os.environ["SHARDLINE_MEASURE_SECONDS"] = "0"
# Kernels for GPUs run on a CPU then; it counts when Triton is imported first.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model as bf16 safetensors with tokenizer; converted once for all later sessions."""
    from shardline_shards.sources import resolve_model

    return resolve_model("demo")
