"""Device functions that several kernels share."""

from __future__ import annotations

from fxmem.kernels._triton import jit, tl


@jit
def tanh(x):
    """Accurate near zero, where ``1 - exp(-2x)`` would cancel, and free of overflow."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    small = tl.exp(-2 * tl.abs(x))
    far = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -far, far))


@jit
def sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small)


@jit
def mix(x):
    """32-bit finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def random_bits(index, key):
    """32 bits for element ``index`` (int64) under ``key`` (0 <= key < 2^31): no state, no order."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    salt = mix(tl.zeros_like(low) + key + 0x9E3779B9)
    return mix(mix(low + salt) ^ mix(high + 0x7F4A7C15))


@jit
def round_stochastically(x, bits):
    """Float32 to a float32 that bfloat16 holds exactly: add 16 random low bits, truncate."""
    pattern = x.to(tl.uint32, bitcast=True)
    rounded = (pattern + (bits & 0xFFFF)) & 0xFFFF0000
    # A carry must not turn infinity into something else, nor NaN into a number.
    finite = (pattern & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded.to(tl.float32, bitcast=True), x)
