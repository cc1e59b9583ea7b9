"""What a step takes of each stage, learnt from what steps really took.

Per stage, t = a + b·P + c·D + d·C + e·X seconds: P prefill tokens, D decodes, C summed context of
the decodes, X summed context of the prefill tokens (DESIGN §5; the form is Niyama's, the relative
weights DistServe's). Two sets of coefficients, for steps that mostly read weights and for steps
that mostly compute. Planning adds the 0.9 quantile of what such steps took beyond their prediction,
of steps with prompts and of those without apart: the same millisecond is a large part of a decode.
"""

from collections.abc import Sequence
from math import ceil, inf, sqrt

from msgspec import Struct, field

from .cost import StepLoad
from .regression import NonNegativeFit

KNEES = (16, 32, 64, 128, 256, 512)
MIN_SAMPLES = 8
# Sizes of the features that cost about alike: the descent and the ridge want that.
_SCALES = (1.0, 64.0, 8.0, 4096.0, 131072.0)
_, _PER_TOKEN, _PER_DECODE, _PER_DECODE_CONTEXT, _PER_CONTEXT = (1 / scale for scale in _SCALES)
_WINDOW = 64
_OUTLIER_MADS = 5.0
_LEAST_MAD = 0.02
_QUANTILE = 0.9
_MANY_RESIDUALS = 32
_TRIP_SMOOTHING = 0.05
# What a prefill token costs at least, in seconds: with a tiny model the fit may well say nothing,
# and who admits by what a step has room for must still be able to count steps.
LEAST_TOKEN_S = 1e-9


class Sample(Struct, frozen=True):
    """One step of one stage: what it held, and how long it took."""

    load: StepLoad
    seconds: float


class Spread(Struct):
    """How far above their predictions, as a share of them, the last times of one kind of steps
    were, newest last; and what planning adds for it.
    """

    residuals: list[float] = field(default_factory=list)
    margin: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether it has seen enough to say anything."""
        return len(self.residuals) > 1

    def observe(self, residual: float) -> None:
        """One more step of that kind."""
        self.residuals = [*self.residuals[1 - _WINDOW :], residual]
        if self.is_known:
            self.margin = margin_of(self.residuals)

    def is_outlier(self, residual: float) -> bool:
        """Whether it is far from the last ones."""
        if len(self.residuals) < MIN_SAMPLES:
            return False
        median = quantile(self.residuals, 0.5)
        mad = quantile([abs(value - median) for value in self.residuals], 0.5)
        return abs(residual - median) > _OUTLIER_MADS * max(mad, _LEAST_MAD)


class RangeModel(Struct, forbid_unknown_fields=True):
    """The fit of one range of steps of one stage, and the spread of those with prompt tokens and of
    those with nothing but decodes.

    Until `MIN_SAMPLES` samples it predicts the longest time that it has seen.
    """

    fit: NonNegativeFit = field(default_factory=lambda: NonNegativeFit.of_size(len(_SCALES)))
    num_samples: int = 0
    max_seconds: float = 0.0
    with_prompts: Spread = field(default_factory=Spread)
    only_decodes: Spread = field(default_factory=Spread)

    @property
    def is_trusted(self) -> bool:
        """Whether it has seen enough to fit."""
        return self.num_samples >= MIN_SAMPLES

    @property
    def coefficients(self) -> list[float]:
        """a, b, c, d, e of the formula, in seconds and seconds per token, decode and so on."""
        a, b, c, d, e = (
            value / scale for value, scale in zip(self.fit.coefficients, _SCALES, strict=True)
        )
        return [a, max(b, LEAST_TOKEN_S), c, d, e]

    def seconds(self, load: StepLoad) -> float:
        """The expected time, without margin."""
        if self.num_samples < MIN_SAMPLES:
            return self.max_seconds
        return self.fit.coefficients[0] + self.added_seconds(load)

    def added_seconds(self, load: StepLoad) -> float:
        """What `load` adds to a step that is taken anyway, without margin. For a trusted model."""
        _, b, c, d, e = self.fit.coefficients
        token_s = b * _PER_TOKEN
        return (
            (token_s if token_s > LEAST_TOKEN_S else LEAST_TOKEN_S) * load.num_prefill_tokens
            + c * _PER_DECODE * load.num_decodes
            + d * _PER_DECODE_CONTEXT * load.decode_context
            + e * _PER_CONTEXT * load.prefill_context
        )

    def planned_added_seconds(self, load: StepLoad) -> float:
        """The same with margin."""
        return self.added_seconds(load) * (1 + self.margin_for(load))

    def planned_seconds(self, load: StepLoad) -> float:
        """The time to plan with: nine steps of ten of that kind take less."""
        return self.seconds(load) * (1 + self.margin_for(load))

    def margin_for(self, load: StepLoad) -> float:
        """What planning adds for such a step, as a share."""
        return (self.with_prompts if load.num_prefill_tokens else self.only_decodes).margin

    def widen(self, margin: float) -> None:
        """Plan with this margin at least."""
        for spread in (self.with_prompts, self.only_decodes):
            spread.margin = max(spread.margin, margin)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from one step, unless it is an outlier among the last ones.

        An outlier still counts as a residual: if many come, they are what steps now take.
        """
        expected = self.seconds(load) if self.is_trusted else 0.0
        if expected > 0 and self.note(load, seconds / expected - 1):
            return
        self.learn(load, seconds)
        if self.num_samples == MIN_SAMPLES:
            self.fit.settle()

    def note(self, load: StepLoad, residual: float) -> bool:
        """How far above its prediction the time of a step was; returns whether it is an outlier.

        Of a kind that nothing is known of, as much is thought as of the other one.
        """
        own, other = self.with_prompts, self.only_decodes
        if not load.has_prompts:
            own, other = other, own
        is_outlier = own.is_outlier(residual)
        own.observe(residual)
        if not other.is_known:
            other.margin = own.margin
        return is_outlier

    def learn(self, load: StepLoad, seconds: float) -> None:
        """Take the sample into the fit."""
        self.num_samples += 1
        self.max_seconds = max(self.max_seconds, seconds)
        self.fit.update(scaled_features(load), max(seconds, 1e-9))

    def tokens_within(self, seconds: float, load: StepLoad, context: int) -> int:
        """Prefill tokens behind `context` that may join `load` in a step of that time, margin
        included; solves e/2·n² + (b + e·(context - 1/2))·n = what is left, since the first of n
        tokens has `context` before it, and the last n - 1 more. Only for a trusted model.
        """
        _, b, _, _, e = self.fit.coefficients
        b, e = max(b / _SCALES[1], LEAST_TOKEN_S), e / _SCALES[4]
        left = seconds / (1 + self.with_prompts.margin) - self.seconds(load)
        slope = b + e * (context - 0.5)
        if left <= 0:
            return 0
        if e * left > _TINY * slope * slope:
            num_tokens = (sqrt(slope * slope + 2 * e * left) - slope) / e
        else:  # Chunks too short for their own length to matter, or for the root to be exact.
            num_tokens = left / slope if slope > 0 else inf
        return int(min(num_tokens, _MANY_TOKENS))


_MANY_TOKENS = 1 << 30
_TINY = 1e-9


class StageModel(Struct):
    """Step times of one stage. Steps of up to `knee` tokens mostly read weights."""

    knee: int = 64
    memory_bound: RangeModel = field(default_factory=RangeModel)
    compute_bound: RangeModel = field(default_factory=RangeModel)

    @classmethod
    def fitted(cls, samples: Sequence[Sample]) -> "StageModel":
        """From a sweep: at the knee that explains it best."""
        return min(
            (cls._fitted_at(knee, samples) for knee in KNEES),
            key=lambda model: sum(model._squared_error(sample) for sample in samples),
        )

    @classmethod
    def _fitted_at(cls, knee: int, samples: Sequence[Sample]) -> "StageModel":
        model = cls(knee=knee)
        for sample in samples:
            model._range_of(sample.load.num_tokens).learn(sample.load, sample.seconds)
        for part in (model.memory_bound, model.compute_bound):
            if part.is_trusted:
                part.fit.settle()
        for sample in samples:
            part = model._model_of(sample.load.num_tokens)
            part.note(sample.load, sample.seconds / part.seconds(sample.load) - 1)
        return model

    def _squared_error(self, sample: Sample) -> float:
        expected = self._model_of(sample.load.num_tokens).seconds(sample.load)
        return (sample.seconds / expected - 1) ** 2

    @property
    def num_samples(self) -> int:
        """Steps that it has learnt from."""
        return self.memory_bound.num_samples + self.compute_bound.num_samples

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from one step."""
        self._range_of(load.num_tokens).observe(load, seconds)

    def seconds(self, load: StepLoad) -> float:
        """The expected time, without margin."""
        return self._model_of(load.num_tokens).seconds(load)

    def planned_seconds(self, load: StepLoad) -> float:
        """The time to plan with."""
        return self._model_of(load.num_tokens).planned_seconds(load)

    def least_margin(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """The less of what planning adds for so many decodes, alone or with such a chunk."""
        alone, mixed = self._model_of(num_decodes), self._model_of(num_decodes + num_prefill_tokens)
        return min(alone.only_decodes.margin, mixed.with_prompts.margin)

    def most_seconds(self, load: StepLoad) -> float:
        """What no part of that load is planned to take longer than: ranges need not agree where
        they meet, and more tokens may seem to take less time.
        """
        if not self.is_trusted:
            return self.planned_seconds(load)
        return max(part.planned_seconds(load) for part in self._trusted)

    def work_seconds(self, load: StepLoad) -> float:
        """Planned time that all of a load adds to steps, whatever their range.

        The margin is that of large steps: what makes small ones uneven is what they take anyway.
        """
        small, large = self.memory_bound, self.compute_bound
        if not large.is_trusted:
            return small.planned_added_seconds(load)
        planned_s = large.planned_added_seconds(load)
        if not small.is_trusted:
            return planned_s
        return max(planned_s, small.added_seconds(load) * (1 + large.margin_for(load)))

    @property
    def work_margin(self) -> float:
        """What that has of margin, as a share."""
        part = self.compute_bound if self.compute_bound.is_trusted else self.memory_bound
        return part.with_prompts.margin

    def expected_prefill_seconds(self, num_tokens: int, context: int) -> float:
        """The same without margin, in the range that prefers it."""
        load = StepLoad()
        load.add_prefill(num_tokens, context)
        return min(part.added_seconds(load) for part in self._trusted)

    @property
    def is_trusted(self) -> bool:
        """Whether one of its ranges has seen enough."""
        return self.memory_bound.is_trusted or self.compute_bound.is_trusted

    @property
    def _trusted(self) -> list[RangeModel]:
        small, large = self.memory_bound, self.compute_bound
        if small.is_trusted and large.is_trusted:
            return [small, large]
        return [part for part in (small, large) if part.is_trusted]

    def tokens_within(self, seconds: float, load: StepLoad, context: int) -> int:
        """Prefill tokens behind `context` that may join `load` in a step of planned `seconds`."""
        small, large = self.memory_bound, self.compute_bound
        if not large.is_trusted:
            return small.tokens_within(seconds, load, context) if small.is_trusted else 0
        many = large.tokens_within(seconds, load, context)
        up_to_knee = self.knee - load.num_tokens
        if up_to_knee <= 0 or not small.is_trusted:
            return many
        few = small.tokens_within(seconds, load, context)
        return few if few < up_to_knee else max(many, up_to_knee)

    def _range_of(self, num_tokens: int) -> RangeModel:
        return self.memory_bound if num_tokens <= self.knee else self.compute_bound

    def _model_of(self, num_tokens: int) -> RangeModel:
        """The range's own model, or the other one while that alone can be trusted."""
        own = self._range_of(num_tokens)
        if own.is_trusted:
            return own
        other = self.compute_bound if own is self.memory_bound else self.memory_bound
        return other if other.is_trusted or not own.num_samples else own


class PipeModel(Struct):
    """All stages, one behind the other. With m steps in flight a cycle of them takes
    max(Σ τ, m · max τ); `trip_overhead_s` is what a step's way through the pipe takes beside
    computing: hops, the token's way back, planning.
    """

    stages: list[StageModel]
    trip_overhead_s: float = 0.0

    @classmethod
    def of_size(cls, num_stages: int) -> "PipeModel":
        """A model that has seen nothing."""
        return cls([StageModel() for _ in range(num_stages)])

    @property
    def is_ready(self) -> bool:
        """Whether every stage has seen enough steps, of one range at least."""
        return all(
            stage.memory_bound.is_trusted or stage.compute_bound.is_trusted for stage in self.stages
        )

    def become(self, other: "PipeModel") -> None:
        """Forget what has been learnt for what the other one has."""
        self.stages, self.trip_overhead_s = other.stages, other.trip_overhead_s

    def observe(self, stage_index: int, load: StepLoad, seconds: float) -> None:
        """Learn what a step took of a stage."""
        self.stages[stage_index].observe(load, seconds)

    def observe_trip(self, load: StepLoad, seconds: float) -> None:
        """Learn from the time between plan and result of a step that had the pipe for itself."""
        if not self.is_ready:
            return
        overhead = max(0.0, seconds - self._sum_of_expected(load))
        self.trip_overhead_s += _TRIP_SMOOTHING * (overhead - self.trip_overhead_s)

    def step_seconds(self, load: StepLoad) -> float:
        """Planned time of the slowest stage: what each step adds to a busy pipe."""
        return max([stage.planned_seconds(load) for stage in self.stages])

    def least_margin(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """The least, over the stages, of what planning adds for so many decodes, alone or with such
        a chunk; as a share.
        """
        return min([s.least_margin(num_decodes, num_prefill_tokens) for s in self.stages])

    def most_step_seconds(self, load: StepLoad) -> float:
        """What no part of that load is planned to take longer than."""
        return max([stage.most_seconds(load) for stage in self.stages])

    def expected_step_seconds(self, load: StepLoad) -> float:
        """The same without margin."""
        return max([stage.seconds(load) for stage in self.stages])

    def trip_seconds(self, load: StepLoad) -> float:
        """Planned time from plan to result."""
        return sum([stage.planned_seconds(load) for stage in self.stages]) + self.trip_overhead_s

    def expected_trip_seconds(self, load: StepLoad) -> float:
        """The same without margin."""
        return self._sum_of_expected(load) + self.trip_overhead_s

    def gap_seconds(self, trip_s: float, num_trips_at_once: float) -> float:
        """The least time between two tokens of a request whose steps take `trip_s` each, where so
        many of them are in flight: what a trip takes beside computing passes while others compute.
        """
        return max(trip_s - self.trip_overhead_s, trip_s / num_trips_at_once)

    def prefill_seconds(self, num_tokens: int, context: int) -> float:
        """Planned time that prefill tokens behind `context` add to a step of the slowest stage,
        whatever its range.
        """
        load = StepLoad()
        load.add_prefill(num_tokens, context)
        return self.work_seconds(load)

    def work_seconds(self, load: StepLoad) -> float:
        """Planned time that all of a load adds to steps of the slowest stage."""
        return max([stage.work_seconds(load) for stage in self.stages])

    @property
    def work_margin(self) -> float:
        """The least margin, over the stages, that planned work has; as a share."""
        return min([stage.work_margin for stage in self.stages])

    def expected_prefill_seconds(self, num_tokens: int, context: int) -> float:
        """The least of what they are expected to add to a step of the slowest stage."""
        return max([stage.expected_prefill_seconds(num_tokens, context) for stage in self.stages])

    def tokens_within(self, seconds: float, load: StepLoad, context: int) -> int:
        """Prefill tokens that may join `load` until the slowest stage takes `seconds`."""
        return min([stage.tokens_within(seconds, load, context) for stage in self.stages])

    def _sum_of_expected(self, load: StepLoad) -> float:
        return sum([stage.seconds(load) for stage in self.stages])


def scaled_features(load: StepLoad) -> tuple[float, ...]:
    """The features of a step, in units that make them alike."""
    return (
        1.0,
        load.num_prefill_tokens / _SCALES[1],
        load.num_decodes / _SCALES[2],
        load.decode_context / _SCALES[3],
        load.prefill_context / _SCALES[4],
    )


def margin_of(residuals: Sequence[float]) -> float:
    """What to add to predictions, as a share of them: the 0.9 quantile of the residuals.

    Fewer than `_MANY_RESIDUALS` are filled up with usual ones: two or three stalls by themselves
    say nothing of other steps, and who plans with them makes no more steps that would teach better.
    """
    if len(residuals) < 2:
        return 0.0
    usual = quantile([abs(value) for value in residuals], 0.5)
    filled = [*residuals, *[usual] * (_MANY_RESIDUALS - len(residuals))]
    return max(0.0, quantile(filled, _QUANTILE))


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share `q` of them does not exceed."""
    return sorted(values)[max(0, ceil(q * len(values)) - 1)]
