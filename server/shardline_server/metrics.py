"""What Prometheus reads: names and buckets parallel to vLLM's, under `shardline:`."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardline_scheduler import Accuracy, ClassStats
from shardline_server.budgets import BudgetTimes
from shardline_server.engine_client import EngineClient
from shardline_server.messages import EngineStats, FinishReason, PipeStats

LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
TOKEN_TIME_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
TOKEN_COUNT_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Metrics:
    """Counts and times of the requests of one front end, beside the engine's own gauges."""

    def __init__(self, model_name: str, engine: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(model_name, engine))
        self._model_name = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Output tokens generated.")
        self.request_success = Counter(
            "shardline:request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.time_to_first_token = self._times("time_to_first_token", LATENCY_BUCKETS)
        self.inter_token_latency = self._times("inter_token_latency", TOKEN_TIME_BUCKETS)
        self.time_per_output_token = self._times(
            "request_time_per_output_token", TOKEN_TIME_BUCKETS
        )
        self.request_latency = self._times("e2e_request_latency", LATENCY_BUCKETS)
        self.request_prompt_tokens = self._sizes("request_prompt_tokens", "Prompt tokens.")
        self.request_generation_tokens = self._sizes("request_generation_tokens", "Output tokens.")

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def count_finish(self, reason: FinishReason) -> None:
        """One engine request has ended."""
        self.request_success.labels(self._model_name, reason.value).inc()

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"shardline:{name}", text, ["model_name"], registry=self.registry)
        return counter.labels(self._model_name)

    def _times(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        return self._histogram(f"{name}_seconds", f"{name} in seconds.", buckets)

    def _sizes(self, name: str, text: str) -> Histogram:
        return self._histogram(name, f"{text} Per request.", TOKEN_COUNT_BUCKETS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"shardline:{name}", text, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model_name)


class EngineCollector(Collector):
    """The engine's newest stats, as gauges and running totals."""

    def __init__(self, model_name: str, engine: EngineClient) -> None:
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Called by Prometheus' registry at each scrape."""
        yield _dropped(self._model_name, self._engine.drops)
        stats = self._engine.stats
        if stats is None:
            return
        for name, (text, value) in _gauges(stats).items():
            gauge = GaugeMetricFamily(f"shardline:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, (text, value) in _totals(stats).items():
            total = CounterMetricFamily(f"shardline:{name}", text, labels=["model_name"])
            total.add_metric([self._model_name], value)
            yield total
        yield from _budget_metrics(self._model_name, stats.classes)
        yield from _accuracy_metrics(self._model_name, stats.accuracy)
        losses = CounterMetricFamily(
            "shardline:recoveries", "Times that lost workers were replaced.", labels=["model_name"]
        )
        losses.add_metric([self._model_name], self._engine.num_losses)
        yield losses
        if self._engine.pipe is not None:
            yield from _pipe_metrics(self._model_name, self._engine.pipe)


def _dropped(model_name: str, drops: dict[str, int]) -> Metric:
    total = CounterMetricFamily(
        "shardline:internal_messages_dropped",
        "Messages between our own processes that could not be read, and connections of strangers.",
        labels=["model_name", "channel"],
    )
    for channel, count in drops.items():
        total.add_metric([model_name, channel], count)
    return total


def _gauges(stats: EngineStats) -> dict[str, tuple[str, float]]:
    usage = stats.num_used_kv_blocks / max(1, stats.num_kv_blocks)
    return {
        "num_requests_running": ("Requests that are being computed.", stats.num_running),
        "num_requests_waiting": ("Requests that wait for their first step.", stats.num_waiting),
        "kv_cache_usage_perc": ("KV blocks in use; 1 is all of them.", usage),
        "num_micro_batches_in_flight": ("Micro-batches inside the pipe.", stats.num_in_flight),
    }


def _totals(stats: EngineStats) -> dict[str, tuple[str, float]]:
    return {
        "prefix_cache_queries": ("Prompt tokens looked up.", stats.num_prefix_queries),
        "prefix_cache_hits": ("Prompt tokens found in the cache.", stats.num_prefix_hits),
        "num_preemptions": ("Requests put back for lack of blocks.", stats.num_preemptions),
        "num_steps": ("Steps executed.", stats.num_steps),
    }


def _budget_metrics(model_name: str, classes: list[ClassStats]) -> Iterator[Metric]:
    """Attainment is met / (met + missed); with refused ones added below, over what was offered."""
    for name, text, values in (
        ("budget_met", "Requests that kept their latency budget.", [c.num_met for c in classes]),
        ("budget_missed", "Requests that did not.", [c.num_missed for c in classes]),
        ("budget_refused", "Requests refused by prediction.", [c.num_refused for c in classes]),
        ("ttft_predictions", "First tokens predicted at arrival.", [c.num_ttft for c in classes]),
        (
            "ttft_predicted_seconds",
            "Predicted times to first token.",
            [c.predicted_ttft_s for c in classes],
        ),
        (
            "ttft_prediction_error_seconds",
            "By how much those predictions were off.",
            [c.ttft_error_s for c in classes],
        ),
    ):
        total = CounterMetricFamily(f"shardline:{name}", text, labels=["model_name", "class"])
        for one, value in zip(classes, values, strict=True):
            total.add_metric([model_name, one.priority.value], value)
        yield total


def _accuracy_metrics(model_name: str, accuracy: Accuracy) -> Iterator[Metric]:
    for name, text, value in (
        ("step_time_predicted_seconds", "What steps should have taken.", accuracy.predicted_s),
        ("step_time_measured_seconds", "What those steps took.", accuracy.measured_s),
    ):
        total = CounterMetricFamily(f"shardline:{name}", text, labels=["model_name"])
        total.add_metric([model_name], value)
        yield total
    error = GaugeMetricFamily(
        "shardline:step_time_error",
        "Relative error of predicted step times, over the last steps.",
        labels=["model_name", "quantile"],
    )
    error.add_metric([model_name, "0.5"], accuracy.median_error)
    error.add_metric([model_name, "0.9"], accuracy.p90_error)
    yield error


def _pipe_metrics(model_name: str, pipe: PipeStats) -> Iterator[Metric]:
    for name, text, value in (
        ("pipe_batch_imbalance", "1 - sum / (p * max) of micro-batches.", pipe.batch_imbalance),
        ("pipe_stage_imbalance", "1 - mean / max of stages' busy time.", pipe.stage_imbalance),
    ):
        gauge = GaugeMetricFamily(f"shardline:{name}", text, labels=["model_name"])
        gauge.add_metric([model_name], value)
        yield gauge
    steps = GaugeMetricFamily(
        "shardline:stage_step_seconds",
        "What a step took of a stage lately.",
        labels=["model_name", "stage"],
    )
    predicted = GaugeMetricFamily(
        "shardline:stage_predicted_step_seconds",
        "This stage's part of a step of all stages, as predicted when layers were dealt out.",
        labels=["model_name", "stage"],
    )
    seconds = CounterMetricFamily(
        "shardline:stage_time_seconds",
        "What a stage's time goes to; its parts sum to the wall.",
        labels=["model_name", "stage", "part"],
    )
    for stage_index, stage in enumerate(pipe.stages):
        steps.add_metric([model_name, str(stage_index)], stage.step_s)
        if stage.predicted_s is not None:
            predicted.add_metric([model_name, str(stage_index)], stage.predicted_s)
        for part, value in stage.seconds.items():
            seconds.add_metric([model_name, str(stage_index), part], value)
    yield from (steps, predicted, seconds)


class ChoiceTimer:
    """Watches one engine request from submission to its end."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int) -> None:
        self._metrics = metrics
        self._num_tokens = 0
        self._start = time.monotonic()
        self._first = self._last = self._start
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.request_prompt_tokens.observe(num_prompt_tokens)

    def observe_tokens(self, num_tokens: int) -> None:
        """Tokens have come, together."""
        if num_tokens == 0:
            return
        now = time.monotonic()
        if self._num_tokens == 0:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._start)
        else:
            self._metrics.inter_token_latency.observe(now - self._last)
        self._last = now
        self._num_tokens += num_tokens
        self._metrics.generation_tokens.inc(num_tokens)

    def observe_finish(self, reason: FinishReason) -> None:
        """It has ended, for whatever reason."""
        metrics = self._metrics
        metrics.count_finish(reason)
        metrics.request_latency.observe(time.monotonic() - self._start)
        metrics.request_generation_tokens.observe(self._num_tokens)
        if (mean := self._time_per_token) is not None:
            metrics.time_per_output_token.observe(mean)

    @property
    def times(self) -> BudgetTimes:
        """How long it took until now, by this process's clock."""
        has_begun = self._num_tokens > 0
        mean = self._time_per_token
        return BudgetTimes(
            ttft_ms=(self._first - self._start) * 1000 if has_begun else None,
            tpot_ms=None if mean is None else mean * 1000,
            e2e_ms=(time.monotonic() - self._start) * 1000,
        )

    @property
    def _time_per_token(self) -> float | None:
        if self._num_tokens < 2:
            return None
        return (self._last - self._first) / (self._num_tokens - 1)
