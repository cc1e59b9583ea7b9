"""Recursive least squares with forgetting, and coefficients that are never negative.

In information form: A = Σ λ^age w x xᵀ and m = Σ λ^age w y x of all samples (x, y) so far, with
w = 1 / y², so that errors are relative. The coefficients minimise the weighted squares under
θ >= 0, by coordinate descent from the previous ones: collinear features would else give one of
them a negative price. A weak ridge (Hoerl and Kennard, 1970) draws all but the first, the fixed
part, to what is assumed of them, the more the noisier the samples are: a few that hardly differ in
a feature would else give it any price, by their noise alone. Plain Python: five features take
about 20 µs a sample.
"""

from collections.abc import Sequence
from operator import mul

from msgspec import Struct, field

FORGETTING = 0.995
# How much of its first samples a fit keeps for ever: what has not been seen for a thousand steps,
# such as long prompts, would else be priced by the next sample alone.
ANCHOR_WEIGHT = 0.25
# A feature of unit size costs as much as this many usual samples, give or take: one sigma.
_ASSUMED_SIGMA = 2.0
# The variance of the noise, as a share of y squared: what is assumed counts as one sample.
_ASSUMED_NOISE = 0.1
_SWEEPS_PER_SAMPLE = 2
_SWEEPS_OF_A_FIT = 2000


class NonNegativeFit(Struct):
    """`coefficients` for features of about unit size, the first of them always 1, in the unit of
    y. Serialisable. `num_effective` is Σ λ^age, the samples that have not faded, and
    `squared_errors` sums how far each was from what had been predicted, as a share of y.
    """

    coefficients: list[float]
    assumed: list[float]
    information: list[list[float]]
    moments: list[float]
    num_effective: float = 0.0
    squared_errors: float = _ASSUMED_NOISE
    anchor_information: list[list[float]] = field(default_factory=list)
    anchor_moments: list[float] = field(default_factory=list)
    anchor_num_effective: float = 0.0

    @classmethod
    def of_size(cls, num_features: int) -> "NonNegativeFit":
        """A fit that has seen nothing, and assumes that nothing has a price."""
        return cls.assuming([0.0] * num_features)

    @classmethod
    def assuming(cls, coefficients: Sequence[float]) -> "NonNegativeFit":
        """A fit that has seen nothing, and predicts by `coefficients` until it has."""
        zeros = [0.0] * len(coefficients)
        return cls(list(coefficients), list(coefficients), [list(zeros) for _ in zeros], zeros)

    def update(self, features: Sequence[float], y: float) -> None:
        """Take in one sample; y > 0."""
        weight = 1.0 / (y * y)
        error = min(1.0, abs(sum(map(mul, features, self.coefficients)) / y - 1.0))
        for i, x in enumerate(features):
            row, scaled = self.information[i], weight * x
            for j, other in enumerate(features):
                row[j] = FORGETTING * row[j] + scaled * other
            self.moments[i] = FORGETTING * self.moments[i] + scaled * y
        self.num_effective = FORGETTING * self.num_effective + 1.0
        self.squared_errors = FORGETTING * self.squared_errors + error * error
        self._remember_anchor()
        self._descend(_SWEEPS_PER_SAMPLE)

    def settle(self) -> None:
        """After the first samples: solve to the end, and keep them as the anchor.

        What was predicted of them until now says nothing of their noise; what is left of them does.
        """
        self.squared_errors = _ASSUMED_NOISE
        self._descend(_SWEEPS_OF_A_FIT)
        self.squared_errors = self._left_over()
        self._descend(_SWEEPS_OF_A_FIT)
        self.anchor_information = [list(row) for row in self.information]
        self.anchor_moments = list(self.moments)
        self.anchor_num_effective = self.num_effective

    def _left_over(self) -> float:
        """Of the samples that have not faded, Σ λ^age (ŷ / y - 1)² = n - 2 θᵀm + θᵀAθ, and what is
        assumed.
        """
        theta = self.coefficients
        explained = sum(map(mul, self.moments, theta))
        rows = (sum(map(mul, row, theta)) for row in self.information)
        fitted = sum(map(mul, rows, theta))
        left_over: float = self.num_effective - 2 * explained + fitted
        return _ASSUMED_NOISE + max(0.0, left_over)

    def _remember_anchor(self) -> None:
        """At the rate at which information fades, so that a share of the anchor always stays."""
        share = (1 - FORGETTING) * ANCHOR_WEIGHT
        for row, anchor_row in zip(self.information, self.anchor_information, strict=False):
            for j, value in enumerate(anchor_row):
                row[j] += share * value
        for i, value in enumerate(self.anchor_moments):
            self.moments[i] += share * value
        self.num_effective += share * self.anchor_num_effective

    def _descend(self, num_sweeps: int) -> None:
        theta = self.coefficients
        noise = self.squared_errors / (self.num_effective + 1.0)
        ridge = noise / _ASSUMED_SIGMA**2 * self.information[0][0] / self.num_effective
        ridges = [0.0] + [ridge] * (len(theta) - 1)
        for _ in range(num_sweeps):
            for i, row in enumerate(self.information):
                if row[i] <= 0.0:
                    continue  # never seen
                slope = self.moments[i] - sum(map(mul, row, theta))
                slope += ridges[i] * (self.assumed[i] - theta[i])
                theta[i] = max(0.0, theta[i] + slope / (row[i] + ridges[i]))
