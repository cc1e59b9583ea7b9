"""Who keeps latency budgets: ours and other servers under the same loads, below and past capacity.

    python bench/budgets.py demo --peers /path/to/peers --out budgets --trace azure_2023_conv.csv

Finds the largest rate at which the first policy meets its budget for 90 % of what is offered, by
bisection, and then runs every load at multiples of that rate on every policy in turn. Requests have
256 ± 50 % prompt and 64 ± 50 % output tokens, and TTFT ≤ 1.5 s and mean TPOT ≤ 100 ms to keep. All
are judged by the client; a refusal is no success, and is timed from when it was sent. Memory is
what all processes of a server have after each load; loads begin 15 s after a server is ready.
Writes OUT/budgets.json, .md and .png. Run it alone on the machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import servers
from client import bench
from machine import machine_facts
from servers import Missing, Running
from tables import bars, markdown

Result = dict[str, Any]

SIZES = ["--prompt-tokens", "128:384", "--output-tokens", "32:96"]
INTERACTIVE = "interactive:ttft=1500,tpot=100"
PATIENCE = ["--timeout", "40"]  # the longest budget is over by then
TARGET = 0.9


@dataclass(frozen=True, kw_only=True)
class Load:
    """A multiple of the capacity, and how it differs from plain Poisson arrivals."""

    factor: float
    options: list[str] = field(default_factory=lambda: [*SIZES, "--budget", INTERACTIVE])
    has_trace: bool = False


LOADS = {
    "0.7x": Load(factor=0.7),
    "1.5x": Load(factor=1.5),
    "3x in bursts (CV 4)": Load(factor=3.0, options=[*SIZES, "--budget", INTERACTIVE, "--cv", "4"]),
    # A batch request takes two to three times of what the others do: that is 1.2 times what can be
    # served, half of it interactive.
    "1.2x mixed": Load(
        factor=0.8,
        options=[
            *SIZES,
            *("--budget", f"{INTERACTIVE},share=0.7"),
            *("--budget", "batch:deadline=30000,share=0.3,prompt=768:1024"),
        ],
    ),
    # Its requests take about half of what the others do: that is 1.3 times what can be served.
    "2.6x trace, lengths / 8": Load(
        factor=2.6, options=["--length-scale", "0.125", "--budget", INTERACTIVE], has_trace=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A server, the client's options (only ours is told the budgets), and the server's own."""

    server: str
    options: list[str] = field(default_factory=list)
    serve: list[str] = field(default_factory=list)


POLICIES = {name: Policy(server=name) for name in servers.SERVERS} | {
    f"{name}, fcfs": Policy(server=name, serve=["--policy", "fcfs"]) for name in servers.OURS
}
DEFAULT_POLICIES = [
    *("shardline 1x1", "shardline 1x2"),
    *("shardline 1x1, fcfs", "shardline 1x2, fcfs"),
    *("vllm 2 threads", "vllm 2 stages"),
]


def find_capacity(server: Running, policy: Policy, arguments: argparse.Namespace) -> float:
    """Requests per second."""
    options = [*LOADS["0.7x"].options, *policy.options, *PATIENCE, "--find-capacity"]
    options += ["--rate", str(arguments.first_rate), "--duration", str(arguments.seconds)]
    options += ["--num-seeds", str(arguments.num_seeds)]
    options += _counted(arguments.seconds)
    found = bench(server.url, options)["capacities"]
    return float(next(one["rate"] for one in found if one["target"] == TARGET))


def measure(
    server: Running, load: Load, policy: Policy, capacity: float, arguments: argparse.Namespace
) -> Result:
    """The summary at one load."""
    rate, seconds = capacity * load.factor, arguments.seconds
    options = [*load.options, *policy.options, *PATIENCE, "--rate", f"{rate:.4g}"]
    options += ["--num-requests", str(max(2, round(rate * seconds)))]
    options += ["--num-seeds", str(arguments.num_seeds), "--seed", "1"]
    options += _counted(seconds)
    if load.has_trace:
        options += ["--trace", str(arguments.trace)]
    (point,) = bench(server.url, options)["points"]
    memory = {"memory_gib": server.now_bytes / servers.GIB}
    return point["summary"] | {"rate": rate, "runs": point["runs"]} | memory


def _counted(seconds: float) -> list[str]:
    """All but the first tenth of the time, in which an empty server fills up, and the last."""
    return ["--warm-up", str(seconds / 10), "--cool-down", str(seconds / 10)]


def run_policy(name: str, capacity: float | None, arguments: argparse.Namespace) -> Result:
    """What one policy did under each load, and the capacity it was measured against."""
    print(f"{name} …", file=sys.stderr, flush=True)
    policy = POLICIES[name]
    try:
        with servers.running(
            policy.server, arguments.model_folder, arguments.peers, policy.serve
        ) as server:
            time.sleep(servers.SETTLING_S)
            is_found = capacity is None
            capacity = capacity or find_capacity(server, policy, arguments)
            if not capacity:
                return {"failed": f"it meets {TARGET:.0%} at no rate"}
            loads = {
                load: measure(server, LOADS[load], policy, capacity, arguments)
                for load in arguments.loads
                if arguments.trace is not None or not LOADS[load].has_trace
            }
        return {"capacity": capacity, "is_capacity_found": is_found, "loads": loads}
    except Missing as error:
        return {"missing": str(error)}
    except RuntimeError as error:
        return {"failed": str(error)}


def rows(results: dict[str, Result]) -> Iterator[list[str]]:
    for load in LOADS:
        for name, result in results.items():
            if load not in result.get("loads", {}):
                continue
            figures = result["loads"][load]
            budget = figures["budget"]
            yield [
                load,
                name,
                f"{figures['offered_per_s']:.2f}",
                f"{budget['goodput_per_s']:.2f}",
                *(
                    f"{budget[share]:.0%}"
                    for share in ("attainment", "admitted_attainment", "schedule_attainment")
                ),
                _by_class(figures["budget_by_class"]),
                f"{budget['num_refused']} of {budget['num_offered']}",
                _of(figures["refusal_ms"], "p99"),
                *(_of(figures["ttft_ms"], percentile) for percentile in ("p50", "p90")),
                _of(figures["tpot_ms"], "p90"),
                f"{figures['memory_gib']:.2f}",
            ]


def _by_class(classes: Result) -> str:
    """Where there are several, the share of each that was in time."""
    if len(classes) == 1:
        return ""
    return ", ".join(f"{name} {one['attainment']:.1%}" for name, one in classes.items())


def _of(latency: dict[str, float] | None, figure: str) -> str:
    return "-" if latency is None else f"{latency[figure]:.0f}"


def report(results: dict[str, Result], facts: dict[str, str]) -> str:
    """The tables, in Markdown."""
    troubles = [
        [name, word, result[word].splitlines()[0]]
        for name, result in results.items()
        for word in ("missing", "failed")
        if word in result
    ]
    columns = ["load", "server", "offered/s", "goodput/s", "met", "admitted met", "each token"]
    columns += ["met, by class", "refused", "refusal p99 ms"]
    columns += ["TTFT p50 ms", "TTFT p90 ms", "TPOT p90 ms", "memory GiB"]
    return "\n".join(
        [
            "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".",
            f"{_unit(results)}\n",
            markdown(columns, rows(results)),
            *([markdown(["server", "", "why"], troubles)] if troubles else []),
        ]
    )


def _unit(results: dict[str, Result]) -> str:
    """What multiples are of."""
    measured = [(name, one) for name, one in results.items() if "capacity" in one]
    if not measured:
        return "Nothing was measured."
    name, first = measured[0]
    is_found = first["is_capacity_found"]
    source = f"the most of which {name} meets {TARGET:.0%}" if is_found else "as it was asked for"
    return f"1x is {first['capacity']:.2f} requests/s, {source}."


def write(out: Path, results: dict[str, Result], facts: dict[str, str]) -> str:
    """JSON, tables and chart; the tables."""
    text = report(results, facts)
    (out / "budgets.json").write_text(json.dumps({"machine": facts, "policies": results}, indent=1))
    (out / "budgets.md").write_text(text)
    met = {
        load: {
            name: 100 * result["loads"][load]["budget"]["attainment"]
            for name, result in results.items()
            if load in result.get("loads", {})
        }
        for load in LOADS
    }
    bars(out / "budgets.png", "Share of all offered requests within their budget, %", met)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--peers", type=Path, help="the folder that other servers lie in")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=DEFAULT_POLICIES)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--trace", type=Path, help="an Azure trace; without it that load is left")
    parser.add_argument("--seconds", type=float, default=40, help="of arrivals, at each load")
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--capacity", type=float, help="requests/s, in place of searching it")
    parser.add_argument("--first-rate", type=float, default=2.0, help="that the search begins at")
    arguments = parser.parse_args()
    servers.leave_on_sigterm()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.model_folder = servers.model_folder(arguments.model)
    facts, results, capacity = machine_facts(), {}, arguments.capacity
    for name in arguments.policies:
        results[name] = run_policy(name, capacity, arguments)
        capacity = capacity or results[name].get("capacity")
        text = write(arguments.out, results, facts)
    print(text)


if __name__ == "__main__":
    main()
