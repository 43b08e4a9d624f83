"""Generators derived from (seed, labels): the same labels give the same stream, anywhere, any order.

The global generator is Lightning's and the user's; nothing in this package draws from it. These
streams are reproducible and so not secret: they order and sample, they never make noise for privacy.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """63-bit seed, a cryptographic hash of ``seed`` and ``labels`` (which say what it is for)."""
    content = "\0".join([str(seed), *(f"{type(label).__name__}:{label}" for label in labels)])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *labels: str | int) -> torch.Generator:
    """CPU generator for ``labels``, e.g. ``torch_generator(0, "clinic-a", 3, "selection")``."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


def numpy_generator(seed: int, *labels: str | int) -> np.random.Generator:
    """The same for numpy; another stream than :func:`torch_generator` gives for equal labels."""
    return np.random.default_rng(derive_seed(seed, *labels))
