"""A step in the making: what it holds so far, and what more it can afford."""

from .cost import StepCost, StepLoad
from .memory import KvMemory
from .plan import LAST_DRAWN, Chunk, Decodes, NewRequest, StepPlan
from .request import Request


class Step:
    """Collects parts until it is completed into a StepPlan.

    `reads` is the last of the steps in flight whose drawn tokens it takes for known, or -1. Tokens
    are drawn for the `drawers`.
    """

    def __init__(self, step_id: int, cost: StepCost, memory: KvMemory) -> None:
        self.step_id = step_id
        self.reads = -1
        self.drawers: list[Request] = []
        self._cost = cost
        self._memory = memory
        self.load = StepLoad()
        self._new_requests: list[NewRequest] = []
        self._decodes = Decodes()
        self._chunks: list[Chunk] = []
        self._filled: list[Request] = []
        self._has_suspect = False

    def __len__(self) -> int:
        """How many requests have a part in it."""
        return len(self._decodes) + len(self._chunks)

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
        in the step before; there is a block for it, or enough of them. Whether it can be afforded
        is not asked: who began has a right to his next token.
        """
        columns, step_id, last_read = self._decodes, self.step_id, -1
        block_size = self._memory.block_size
        last_of_block = block_size - 1
        positions = [request.num_computed_tokens for request in decodes]
        for row, request in enumerate(decodes, len(columns)):
            position, token_ids = request.num_computed_tokens, request.token_ids
            if position < len(token_ids):
                columns.token_ids.append(token_ids[position])
            else:
                columns.token_ids.append(LAST_DRAWN)
                if request.drawing_step_id > last_read:
                    last_read = request.drawing_step_id
            place = position % block_size
            if not place:
                self._begin_block(row, request)
            if place == last_of_block:
                self._filled.append(request)
            request.num_computed_tokens = position + 1
            request.last_step_id = request.drawing_step_id = step_id
            request.num_tokens_in_flight += 1
        columns.request_indexes.extend([request.request_index for request in decodes])
        columns.num_computed_tokens.extend(positions)
        self.drawers += decodes
        self.reads = max(self.reads, last_read)
        self.load.num_decodes += len(decodes)
        self.load.decode_context += sum(positions)

    def _begin_block(self, row: int, decode: Request) -> None:
        """Its next token is the first of a block, which it may have already."""
        if self._memory.lacks_block(decode):
            self._memory.grow(decode)
        new_blocks = decode.block_table[decode.num_sent_blocks :]
        self._decodes.new_blocks.extend((row, block_id) for block_id in new_blocks)
        decode.num_sent_blocks = len(decode.block_table)

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
        new_blocks = request.block_table[request.num_sent_blocks :]
        self._chunks.append(
            Chunk(request.request_index, context, num_tokens, new_blocks, end == num_known)
        )
        request.num_sent_blocks = len(request.block_table)
        request.num_computed_tokens = end
        request.last_step_id = self.step_id
        if end == num_known:
            request.num_tokens_in_flight += 1
            request.drawing_step_id = self.step_id
            self.drawers.append(request)
        if self._memory.has_full_block(request):
            self._filled.append(request)
        return True

    def complete(self, released: list[int]) -> StepPlan:
        """The plan. From here on, later plans may share the blocks that it fills."""
        for request in self._filled:
            self._memory.register(request)
        return StepPlan(self.step_id, released, self._new_requests, self._decodes, self._chunks)
