"""Entry point of the process that measures layers: `python -m shardline_shards.profile_process`.

Takes a `ProfileConfig` as JSON on standard input, answers with a `ProfileOutcome` on standard
output. A process of its own, so that whoever cuts a model into stages need not import torch.
"""

import os
import sys

import msgspec

from shardline_shards.messages import ProfileConfig
from shardline_shards.process import pin_to, start_child


def main() -> None:
    """Tie this process to its parent, measure, answer."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ProfileConfig)
    start_child("profile", config.parent_pid)
    pin_to(config.cpu_ids)
    from shardline_shards.profile import profile_model

    print(msgspec.json.encode(profile_model(config)).decode(), flush=True)
    os._exit(0)  # not sys.exit: taking torch down in order costs seconds


if __name__ == "__main__":
    main()
