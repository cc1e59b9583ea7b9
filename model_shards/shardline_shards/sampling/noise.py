"""Noise as a pure function of (seed, index of the output token); no state, no generator.

So the same seed gives the same tokens alone or in any batch, preempted and replayed or not.
"""

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits; of `seed`, any integer, the lowest 64 bits count.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), whose
    `index`-th number can be computed directly, started at the mixed seed.
    """
    return (_mix(_mix(seed) + (index + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
