"""Whether a fit that was kept is still that of this machine."""

import pytest
from tests.scheduler.machine import Prices, exact_model

from shardline_scheduler import Sample, StepLoad
from shardline_server.step_costs import error_of
from shardline_server.sweep import Measurements

DECODES = [StepLoad(0, count, 64 * count, 0) for count in range(1, 13)]
PROMPTS = [StepLoad(64, 0, 0, 2016), StepLoad(128, 0, 0, 8128)]
NOW: Prices = (10e-3, 1e-3, 1e-3, 0.0, 0.0)


def measured(prices: Prices) -> Measurements:
    (stage,) = exact_model([prices]).stages
    return Measurements([[Sample(load, stage.seconds(load)) for load in DECODES + PROMPTS]])


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_fit_that_is_wrong_for_prompts_or_for_decodes_alone_is_seen(wrong: int) -> None:
    """Most steps that are measured are decodes, and must not outvote the prompts."""
    assert error_of(exact_model([NOW]), measured(NOW)) == pytest.approx(0.0)
    kept = tuple(5 * price if i == wrong else price for i, price in enumerate(NOW))
    assert error_of(exact_model([kept]), measured(NOW)) > 1.0


def test_nothing_measured_is_no_reason_to_doubt_it() -> None:
    assert error_of(exact_model([NOW]), Measurements([[]])) == 0.0
