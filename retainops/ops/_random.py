"""Random numbers that kernels make where they are used, as PyTorch's own operations make them: the same bits."""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
ROUNDS = 7


def new_seed(device: torch.device) -> torch.Tensor:
    """A seed on the device, drawn from PyTorch's generator there: no host sync, and safe in CUDA graphs."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def uniform(seed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Uniform float32 numbers in [0, 1), one for each element of a shape: `uniform` of kernels/tiles.py."""
    index = torch.arange(shape.numel(), dtype=torch.int64, device=seed.device).view(shape)
    return uniform_at(seed, index)


def uniform_at(seed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The numbers of these elements: word `index % 4` at the counter `index // 4`, its upper 24 bits."""
    c0, c1, c2, c3 = philox(seed, index >> 2)
    word = index & 3
    bits = torch.where(word == 0, c0, torch.where(word == 1, c1, torch.where(word == 2, c2, c3)))
    return (bits >> 8).to(torch.float32) * 2.0**-24


def philox(seed: torch.Tensor, counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words of each counter, as int64; seed and counter are of 64 bits.

    Source: Philox4x32-7, Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    none = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _LOW, _high(counter), none, none
    k0, k1 = seed & _LOW, _high(seed)
    for _ in range(ROUNDS):
        # A product of two 32-bit numbers wraps around in int64, which changes none of its 64 bits.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(b) ^ c1 ^ k0, b & _LOW, _high(a) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    return c0, c1, c2, c3


def _high(x: torch.Tensor) -> torch.Tensor:
    return (x >> 32) & _LOW
