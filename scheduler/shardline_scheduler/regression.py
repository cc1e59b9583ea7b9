"""Recursive least squares with forgetting, and coefficients that are never negative.

In information form: A = Σ λ^age w x xᵀ and m = Σ λ^age w y x of all samples (x, y) so far, with
w = 1 / y², so that errors are relative. The coefficients minimise the weighted squares under
θ >= 0, by coordinate descent from the previous ones: collinear features would else give one of
them a negative price. Plain Python: five features take about 20 µs a sample.
"""

from collections.abc import Sequence
from operator import mul

from msgspec import Struct, field

FORGETTING = 0.995
# How much of its first samples a fit keeps for ever: what has not been seen for a thousand steps,
# such as long prompts, would else be priced by the next sample alone.
ANCHOR_WEIGHT = 0.25
_SWEEPS_PER_SAMPLE = 2
_SWEEPS_OF_A_FIT = 2000


class NonNegativeFit(Struct):
    """`coefficients` for features of about unit size, in the unit of y. Serialisable."""

    coefficients: list[float]
    information: list[list[float]]
    moments: list[float]
    anchor_information: list[list[float]] = field(default_factory=list)
    anchor_moments: list[float] = field(default_factory=list)

    @classmethod
    def of_size(cls, num_features: int) -> "NonNegativeFit":
        """A fit that has seen nothing."""
        zeros = [0.0] * num_features
        return cls(list(zeros), [list(zeros) for _ in zeros], list(zeros))

    def update(self, features: Sequence[float], y: float) -> None:
        """Take in one sample; y > 0."""
        weight = 1.0 / (y * y)
        for i, x in enumerate(features):
            row, scaled = self.information[i], weight * x
            for j, other in enumerate(features):
                row[j] = FORGETTING * row[j] + scaled * other
            self.moments[i] = FORGETTING * self.moments[i] + scaled * y
        self._remember_anchor()
        self._descend(_SWEEPS_PER_SAMPLE)

    def settle(self) -> None:
        """After the first samples: solve to the end, and keep them as the anchor."""
        self._descend(_SWEEPS_OF_A_FIT)
        self.anchor_information = [list(row) for row in self.information]
        self.anchor_moments = list(self.moments)

    def _remember_anchor(self) -> None:
        """At the rate at which information fades, so that a share of the anchor always stays."""
        share = (1 - FORGETTING) * ANCHOR_WEIGHT
        for row, anchor_row in zip(self.information, self.anchor_information, strict=False):
            for j, value in enumerate(anchor_row):
                row[j] += share * value
        for i, value in enumerate(self.anchor_moments):
            self.moments[i] += share * value

    def _descend(self, num_sweeps: int) -> None:
        theta = self.coefficients
        for _ in range(num_sweeps):
            for i, row in enumerate(self.information):
                if row[i] <= 0.0:
                    continue  # never seen
                residual = self.moments[i] - sum(map(mul, row, theta))
                theta[i] = max(0.0, theta[i] + residual / row[i])
