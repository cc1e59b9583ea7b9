"""Which block holds the KV of which prefix: full blocks by the chained hash of their tokens.

A block's digest covers all tokens up to its end: SHA-256 over the digest of the block before and
its own token ids. No two prefixes share a digest that anybody could find, so equal digests are
taken for equal prefixes.
"""

from array import array
from collections.abc import KeysView, Sequence
from hashlib import sha256

ROOT_DIGEST = b""


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of a full block with these token ids after the block with digest `parent`."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCache:
    """A two-way map between digests and blocks; every operation is O(1)."""

    def __init__(self) -> None:
        self._block_ids: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._digests

    def block_ids(self) -> KeysView[int]:
        """All blocks whose content is known."""
        return self._digests.keys()

    def find(self, digest: bytes) -> int | None:
        """The block that holds this prefix, if one does."""
        return self._block_ids.get(digest)

    def insert(self, digest: bytes, block_id: int) -> None:
        """Remember what `block_id` holds; where another block holds the same, that one stays."""
        if digest not in self._block_ids:
            assert block_id not in self._digests, f"block {block_id} is registered twice"
            self._block_ids[digest] = block_id
            self._digests[block_id] = digest

    def remove(self, block_id: int) -> None:
        """Forget a block that is about to be overwritten."""
        del self._block_ids[self._digests.pop(block_id)]
