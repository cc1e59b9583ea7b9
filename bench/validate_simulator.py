"""The same load on a real server and in the simulator, side by side.

    python bench/validate_simulator.py demo --pp 2 --trace azure.csv --rate 2 --length-scale 0.25 \\
        --num-requests 120 --budget standard:ttft=1500,tpot=100 --seed 7

MODEL and --pp go to the server, everything else to `shardline bench` and `shardline simulate`. What
steps cost is what the server has learnt when it stops, kept in a cache folder of its own. First
tokens are timed by the client, and as the server tells: the simulator knows no front end and no
client.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving import serving

from shardline_client.bench.summary import Distribution

SHARDLINE = [sys.executable, "-m", "shardline_server"]
# Name, and where it is in a summary.
FIGURES = {
    "goodput, requests/s": ("budget", "goodput_per_s"),
    "refused": ("num_refused",),
    "TTFT p50, ms": ("ttft_ms", "p50"),
    "TTFT p90, ms": ("ttft_ms", "p90"),
    "TTFT p50 as told, ms": ("told_ttft_ms", "p50"),
    "TTFT p90 as told, ms": ("told_ttft_ms", "p90"),
    "TPOT p50, ms": ("tpot_ms", "p50"),
    "output tokens/s": ("output_tokens_per_s",),
}


def run(command: list[str], load: list[str], json_file: Path) -> dict[str, Any]:
    """The figures of a bench or a simulation."""
    words = [*SHARDLINE, *command, *load, "--json", str(json_file)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    report = json.loads(json_file.read_text())
    summary: dict[str, Any] = report["points"][0]["summary"]
    return summary | {"told_ttft_ms": _told(report["requests"]) or summary["ttft_ms"]}


def _told(requests: list[dict[str, Any]]) -> dict[str, float] | None:
    """Of what a server has told of the times to its first tokens; None if it is no server."""
    times_ms = (one["told_ttft_ms"] for one in requests)
    told = Distribution.of(time_ms / 1e3 for time_ms in times_ms if time_ms is not None)
    return told and asdict(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--pp", default="2")
    arguments, load = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        models = own / "models"
        models.symlink_to(_model_cache())
        with serving(arguments.model, f"1x{arguments.pp}", ["--cache", folder]) as (url, _):
            real = run(["bench", url], load, own / "real.json")
        told = ["--stages", arguments.pp, "--cache", folder]
        simulated = run(["simulate", *told], load, own / "simulated.json")
    print("| | server | simulator | difference |\n|---|---|---|---|")
    for name, keys in FIGURES.items():
        measured, computed = _find(real, keys), _find(simulated, keys)
        difference = f"{computed / measured - 1:+.1%}" if measured else "-"
        print(f"| {name} | {measured:.2f} | {computed:.2f} | {difference} |")


def _find(summary: dict[str, Any], keys: tuple[str, ...]) -> float:
    """0 where nobody was served, so that there are no times."""
    found: Any = summary
    for key in keys:
        found = found[key] if found is not None else 0.0
    return float(found or 0.0)


def _model_cache() -> Path:
    from shardline_shards.cache import default_cache_dir

    folder = default_cache_dir() / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
