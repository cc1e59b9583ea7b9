"""A step's arrays, on the device that computes it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 8  # of every array in the buffer, enough for int64


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Tensors of the same shapes and dtypes on `device`; on a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return move_together(arrays, device, pin=True)


def move_together(
    arrays: Sequence[NDArray[np.generic]], device: torch.device, *, pin: bool
) -> list[Tensor]:
    """Copy all of them at once: a copy to a GPU costs some microseconds however small it is.

    From pinned memory the copy does not wait; torch keeps the buffer until it is over.
    """
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)])
    buffer = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=pin)
    view = buffer.numpy()
    for array, start in zip(arrays, starts, strict=False):
        view[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = buffer.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0]).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts.tolist(), strict=False)
    ]
