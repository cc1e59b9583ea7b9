"""How well a server predicts its steps and first tokens, over a mixed load.

    python bench/prediction_error.py demo --layouts 1x1,1x2 --trace azure.csv --rate 3 \\
        --length-scale 0.125 --num-requests 150 --budget standard:ttft=1500,tpot=100 --seed 7

MODEL and --layouts (tp x pp) go to the servers, everything else to `shardline bench`. Quantiles of
|predicted / measured - 1| are the server's own, over its last 256 steps, read every two seconds
while the load lasts; the table has their medians. First tokens: |predicted / actual - 1|, as the
server tells both with each answer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
from prometheus_client.parser import text_string_to_metric_families
from serving import serving
from tables import markdown

SHARDLINE = [sys.executable, "-m", "shardline_server"]
LOOK_INTERVAL_S = 2.0


def read_metrics(url: str) -> dict[tuple[str, str], float]:
    """Sums over all other labels, by name and quantile."""
    sums: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            key = sample.name.removeprefix("shardline:"), sample.labels.get("quantile", "")
            sums[key] = sums.get(key, 0.0) + sample.value
    return sums


def looks(url: str, load: list[str], report: Path) -> Iterator[dict[tuple[str, str], float]]:
    """Metrics, now and then while the load runs, and at its end."""
    command = [*SHARDLINE, "bench", url, *load, "--json", str(report)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        try:
            process.wait(LOOK_INTERVAL_S)
        except subprocess.TimeoutExpired:
            yield read_metrics(url)
            continue
        if process.returncode:
            raise SystemExit(f"the load ended with status {process.returncode}")
        yield read_metrics(url)
        return


def first_token_errors(report: Path) -> list[float]:
    """Of every answer whose first token was predicted, in ascending order."""
    requests = json.loads(report.read_text())["requests"]
    pairs = [(one["predicted_ttft_ms"], one["told_ttft_ms"]) for one in requests]
    return sorted(abs(predicted / told - 1) for predicted, told in pairs if predicted and told)


def measure(model: str, layout: str, load: list[str]) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder, serving(model, layout, []) as (url, _):
        report = Path(folder) / "run.json"
        seen = list(looks(url, load, report))
        first = first_token_errors(report)
    steps = [median(one["step_time_error", q] for one in seen) for q in ("0.5", "0.9")]
    firsts = [first[int(share * len(first))] for share in (0.5, 0.9)]
    return [layout, *(f"{error:.1%}" for error in (*steps, *firsts)), str(len(first))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layouts", default="1x1,1x2")
    arguments, load = parser.parse_known_args()
    rows = [measure(arguments.model, layout, load) for layout in arguments.layouts.split(",")]
    columns = ["tp x pp", "step, median", "step, p90", "first token, median", "p90", "first tokens"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
