"""Our layouts and other servers, side by side: the same model, client, load and machine.

    python bench/peers.py demo --peers /path/to/peers --out peers
    python bench/peers.py demo --peers /path/to/peers --out peers --servers 'vllm 2 threads' --keep

Starts each server in turn (see servers.py for how, and for what has to lie in the folder), loads it
with `shardline bench` from 15 s after it is ready, and writes OUT/peers.json, OUT/peers.md and
OUT/peers.png: absolute figures, and ours as multiples of each peer's. Run it alone on the machine.
`--keep` adds to what OUT holds.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import servers
from client import bench
from machine import machine_facts
from servers import OURS, PEERS, SERVERS, Missing, Running
from tables import bars, markdown

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A closed loop of `num_streams`, in so many waves."""

    num_streams: int
    num_waves: int
    prompt_tokens: int = 256
    output_tokens: int = 128
    more: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        return [
            *("--concurrency", str(self.num_streams)),
            *("--num-requests", str(self.num_streams * self.num_waves)),
            *("--prompt-tokens", str(self.prompt_tokens)),
            *("--output-tokens", str(self.output_tokens)),
            *self.more,
        ]


SEED = ("--seed", "7")  # so that it can be sent again, for whoever caches prefixes
# Half of the requests are long prompts with one token of output, which has no ITL of its own.
# Who is long is drawn: the same ones for every server.
MIXED = (
    *("--budget", "standard", "--budget", "batch:prompt=2048,output=1", "--no-send-budget"),
    *("--seed", "12"),
)
CASES = {
    "1 stream": Case(num_streams=1, num_waves=3),
    "8 streams": Case(num_streams=8, num_waves=2),
    "32 streams": Case(num_streams=32, num_waves=2),
    "long prompt": Case(
        num_streams=1, num_waves=2, prompt_tokens=2048, output_tokens=64, more=SEED
    ),
    "the same again": Case(
        num_streams=1, num_waves=2, prompt_tokens=2048, output_tokens=64, more=SEED
    ),
    "4 streams, long prompts between": Case(num_streams=4, num_waves=4, more=MIXED),
}


def measure(server: Running, options: list[str]) -> Result:
    """The summary of one `shardline bench`."""
    (point,) = bench(server.url, options)["points"]
    return point["summary"] | {"client_cpu_share": point["runs"][0]["cpu_share"]}


def run_server(name: str, cases: list[str], arguments: argparse.Namespace) -> Result:
    """What one server did in each case."""
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        with servers.running(name, arguments.model_folder, arguments.peers) as server:
            time.sleep(servers.SETTLING_S)
            figures = {case: measure(server, CASES[case].options) for case in cases}
        facts = asdict(server) | {"measured_at": datetime.now(UTC).isoformat(timespec="seconds")}
        used = _kv_used(server, figures, servers.token_bytes(arguments.model_folder))
        return facts | {"kv_used_bytes": used, "cases": figures}
    except Missing as error:
        return {"missing": str(error)}
    except RuntimeError as error:
        return {"failed": str(error)}


def _kv_used(server: Running, figures: dict[str, Result], token_bytes: int) -> int:
    """KV memory that has been touched: a token's place is not used again before all are."""
    new = ((one["num_prompt_tokens"] - one["num_cached_tokens"]) for one in figures.values())
    num_tokens = sum(new) + sum(one["num_output_tokens"] for one in figures.values())
    touched = num_tokens * token_bytes + server.kv_ahead_bytes
    return min(server.kv_bytes, touched) if server.is_kv_lazy else server.kv_bytes


def server_rows(results: dict[str, Result]) -> Iterator[list[str]]:
    for name, result in results.items():
        if "cases" not in result:
            (word, why), *_ = result.items()
            yield [name, f"{word}: {why.splitlines()[0]}", *[""] * 4]
            continue
        peak, kv, used = (result[f"{name}_bytes"] for name in ("peak", "kv", "kv_used"))
        sizes = (f"{size / servers.GIB:.2f}" for size in (peak, kv, used, peak - used))
        yield [name, f"{result['ready_s']:.1f}", *sizes]


def case_rows(results: dict[str, Result], peers: list[str]) -> Iterator[list[str]]:
    """Each server in each case, and our tokens per second over each peer's."""
    for case in CASES:
        for name, result in results.items():
            figures = result.get("cases", {}).get(case)
            if figures is None:
                continue
            ratios = (_ratio(figures, results[peer]["cases"].get(case)) for peer in peers)
            unserved = figures["num_refused"] + figures["num_failed"] + figures["num_expired"]
            yield [
                case,
                name,
                f"{figures['output_tokens_per_s']:.1f}",
                *(_of(figures[latency]) for latency in ("tpot_ms", "ttft_ms")),
                *(_of(figures["itl_ms"], percentile) for percentile in ("p50", "p99")),
                str(unserved),
                *(ratios if name in OURS else [""] * len(peers)),
            ]


def _of(latency: dict[str, float] | None, figure: str = "mean") -> str:
    return "-" if latency is None else f"{latency[figure]:.1f}"


def _ratio(figures: Result, peer: Result | None) -> str:
    if peer is None or not peer["output_tokens_per_s"]:
        return "-"
    tokens = figures["output_tokens_per_s"] / peer["output_tokens_per_s"]
    ttft = figures["ttft_ms"]["mean"] / peer["ttft_ms"]["mean"]
    return f"{tokens:.2f} ({ttft:.2f})"


def report(results: dict[str, Result], facts: dict[str, str]) -> str:
    """The tables, in Markdown."""
    peers = [name for name in PEERS if "cases" in results.get(name, {})]
    head = ["server", "ready after s", "peak memory GiB", "KV memory GiB"]
    head += ["of it used", "KV aside GiB"]
    columns = ["case", "server", "tokens/s", "TPOT ms", "TTFT ms", "ITL p50", "p99"]
    columns += ["not served"]
    columns += [f"tokens/s to {peer} (TTFT)" for peer in peers]
    return "\n".join(
        [
            "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".\n",
            markdown(head, server_rows(results)),
            markdown(columns, case_rows(results, peers)),
        ]
    )


def draw(path: Path, results: dict[str, Result]) -> None:
    groups = {
        case: {
            name: result["cases"][case]["output_tokens_per_s"]
            for name, result in results.items()
            if case in result.get("cases", {})
        }
        for case in CASES
    }
    bars(path, "Output tokens per second", groups)


def write(out: Path, results: dict[str, Result], facts: dict[str, str]) -> str:
    """JSON, tables and chart; the tables."""
    ordered = {name: results[name] for name in SERVERS if name in results}
    text = report(ordered, facts)
    (out / "peers.json").write_text(json.dumps({"machine": facts, "servers": ordered}, indent=1))
    (out / "peers.md").write_text(text)
    draw(out / "peers.png", ordered)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--peers", type=Path, help="the folder that other servers lie in")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--keep", action="store_true", help="add to the results in OUT")
    arguments = parser.parse_args()
    servers.leave_on_sigterm()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.model_folder = servers.model_folder(arguments.model)
    path = arguments.out / "peers.json"
    is_kept = arguments.keep and path.exists()
    results = json.loads(path.read_text())["servers"] if is_kept else {}
    facts = machine_facts()
    for name in arguments.servers:
        results[name] = run_server(name, arguments.cases, arguments)
        text = write(arguments.out, results, facts)
    print(text)


if __name__ == "__main__":
    main()
