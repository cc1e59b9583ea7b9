"""What goes wrong on the model side; every message says what the reader can do.

ShardError
├── ModelSourceError    the model cannot be found, fetched or converted
├── UnsupportedModel    this architecture, or this split of it, is not served
└── LoadError           the weights do not fit the model, or a file is damaged

LostPeer                another rank cannot be reached any more; nothing is wrong with this one
"""


class ShardError(Exception):
    """Base of the model side's errors."""


class ModelSourceError(ShardError):
    """The model cannot be found, fetched or converted."""


class UnsupportedModel(ShardError):
    """The architecture, or this way of splitting it, is not served."""


class LoadError(ShardError):
    """The weights are damaged, incomplete, or do not belong to the model."""


class LostPeer(RuntimeError):
    """Another rank cannot be reached any more; the message names it."""
