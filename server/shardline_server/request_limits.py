"""What the operator allows in one request, below what the doors can read at all."""

from shardline_server.door_config import DoorLimits
from shardline_server.errors import InvalidRequest
from shardline_server.request_fields import MAX_CHOICES, SamplingFields


def check_size(fields: SamplingFields, num_prompts: int, limits: DoorLimits) -> None:
    """Raises InvalidRequest that names the field, its number and the limit."""
    num_choices = fields.n or 1
    for name, what, number, limit in (
        ("prompt", "prompts", num_prompts, limits.max_prompts),
        ("n", "choices of a prompt", num_choices, limits.max_n),
        ("n", "choices of all prompts", num_choices * num_prompts, MAX_CHOICES),
        ("stop", "stop strings", len(fields.stop or ()), limits.max_stop_strings),
        ("logit_bias", "entries", len(fields.logit_bias or ()), limits.max_logit_bias),
    ):
        if number > limit:
            message = f"{name}: {number} {what}; this server takes at most {limit}."
            raise InvalidRequest(message, param=name)
