"""A step in the making: what it holds so far, and what more it can afford."""

from collections.abc import Sequence

from .cost import StepCost, StepLoad
from .memory import KvMemory
from .plan import LAST_DRAWN, NewRequest, ScheduledRequest, StepPlan
from .request import Request

_LAST_DRAWN = (LAST_DRAWN,)


class Step:
    """Collects parts until it is completed into a StepPlan.

    `reads` is the last of the steps in flight whose drawn tokens it takes for known, or -1.
    """

    def __init__(self, step_id: int, cost: StepCost, memory: KvMemory) -> None:
        self.step_id = step_id
        self.num_samples = 0
        self.reads = -1
        self._cost = cost
        self._memory = memory
        self.load = StepLoad()
        self._new_requests: list[NewRequest] = []
        self._scheduled: list[ScheduledRequest] = []
        self._filled: list[Request] = []
        self._has_suspect = False

    def __len__(self) -> int:
        """How many requests have a part in it."""
        return len(self._scheduled)

    def can_take(self, context: int) -> bool:
        """Whether it affords a token of a request that has `context` tokens computed."""
        return self._cost.affordable_tokens(self.load, context, 1) > 0

    def may_hold(self, request: Request) -> bool:
        """A step holds one request with a strike at most."""
        return not (request.num_strikes and self._has_suspect)

    def introduce(self, request: Request) -> None:
        """Make the request known to the workers, under its new index."""
        token_ids, num_prompt_tokens = list(request.token_ids), request.num_prompt_tokens
        request.num_sent_blocks = 0
        self._new_requests.append(
            NewRequest(request.request_index, token_ids, num_prompt_tokens, request.sampling)
        )

    def take_decodes(self, decodes: list[Request]) -> None:
        """Take the next token of each, which the workers have not been told yet, or which they draw
        in the step before. Whether it can be afforded is not asked: who began has a right to his
        next token.
        """
        scheduled, filled, step_id = self._scheduled, self._filled, self.step_id
        block_size, context, last_read = self._memory.block_size, 0, -1
        for request in decodes:
            token_ids, block_table = request.token_ids, request.block_table
            position, num_sent = request.num_computed_tokens, request.num_sent_blocks
            if position < len(token_ids):
                tokens = (token_ids[position],)
            else:
                tokens, last_read = _LAST_DRAWN, max(last_read, request.drawing_step_id)
            new_blocks: Sequence[int] = ()
            if num_sent < len(block_table):
                new_blocks = block_table[num_sent:]
                request.num_sent_blocks = len(block_table)
            scheduled.append(
                ScheduledRequest(request.request_index, position, 1, tokens, new_blocks, True)
            )
            request.num_computed_tokens = position + 1
            request.last_step_id = request.drawing_step_id = step_id
            request.num_tokens_in_flight += 1
            context += position
            if not (position + 1) % block_size:
                filled.append(request)
        self.reads = max(self.reads, last_read)
        self.num_samples += len(decodes)
        self.load.num_decodes += len(decodes)
        self.load.decode_context += context

    def schedule(self, request: Request) -> bool:
        """Take as much of a prompt, or of what is computed again, as the step can afford; False if
        that is nothing. The workers know its tokens.
        """
        context = request.num_computed_tokens
        num_known = len(request.token_ids)
        num_tokens = self._cost.affordable_tokens(self.load, context, num_known - context)
        if num_tokens < 1:
            return False
        self._has_suspect |= request.num_strikes > 0
        end = context + num_tokens
        self.load.add(num_tokens, context)
        self._scheduled.append(
            ScheduledRequest(
                request.request_index,
                context,
                num_tokens,
                [],
                request.block_table[request.num_sent_blocks :],
                end == num_known,
            )
        )
        request.num_sent_blocks = len(request.block_table)
        request.num_computed_tokens = end
        request.last_step_id = self.step_id
        if end == num_known:
            request.num_tokens_in_flight += 1
            request.drawing_step_id = self.step_id
            self.num_samples += 1
        if self._memory.has_full_block(request):
            self._filled.append(request)
        return True

    def complete(self, released: list[int]) -> StepPlan:
        """The plan. From here on, later plans may share the blocks that it fills."""
        for request in self._filled:
            self._memory.register(request)
        return StepPlan(self.step_id, released, self._new_requests, self._scheduled)
