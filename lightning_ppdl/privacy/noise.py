"""Where noise and secret coins come from: a cipher keyed by the operating system, or, in simulations
only, a seed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.randomness import numpy_generator
from lightning_ppdl.validation import require_count

Floats = npt.NDArray[np.float64]

_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


# A count, not the process's id, which another process may come to have.
os.register_at_fork(after_in_child=_forked)


class NoiseSource(ABC):
    """Random numbers for noise and for sampling that must stay secret. Thread-safe.

    To add one, subclass, and write :meth:`_generator` and :meth:`spawn`.
    """

    simulated: bool
    """Whether whoever knows a seed can know the noise; then there is no privacy."""

    _stream: np.random.Generator | None = None
    _stream_forks = -1

    @abstractmethod
    def _generator(self, forks: int) -> np.random.Generator:
        """A new generator, for a process that is ``forks`` forks away from the one that began."""

    @abstractmethod
    def spawn(self, *labels: str | int) -> NoiseSource:
        """Another source of the same kind, independent of this one and of those with other labels."""

    def uniform(self, count: int) -> Floats:
        """float64 (count,), uniform in [0, 1)."""
        return self._current().random(count)

    def gaussian(self, count: int) -> Floats:
        """float64 (count,), standard normal."""
        return self._current().standard_normal(count)

    def laplace(self, count: int) -> Floats:
        """float64 (count,), Laplace of scale 1."""
        # The difference of two exponentials, which numpy draws without a logarithm: twice as fast.
        stream = self._current()
        drawn = stream.standard_exponential(count)
        drawn -= stream.standard_exponential(count)
        return drawn

    def _current(self) -> np.random.Generator:
        # A forked child holds a copy of its parent's stream, perhaps with a lock held for ever.
        if self._stream is None or self._stream_forks != _forks:
            self._stream = self._generator(_forks)
            self._stream_forks = _forks
        return self._stream


class SecretNoise(NoiseSource):
    """AES-128 in counter mode, keyed by the operating system; after a fork, keyed anew.

    Who does not know the key can tell its output from true randomness only by breaking the cipher. The
    key lives in this object and nowhere else: pickling and copying are refused, so no checkpoint holds it.
    A copy of the whole running machine is beyond its reach: both copies go on with the same noise.

    Raises:
        ConfigurationError: if randomgen is not installed.
    """

    simulated = False

    def __init__(self) -> None:
        _aes_counter()

    def _generator(self, forks: int) -> np.random.Generator:
        return np.random.Generator(_aes_counter()(key=int.from_bytes(os.urandom(16), "big")))

    def spawn(self, *labels: str | int) -> SecretNoise:
        return SecretNoise()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "SecretNoise can be neither pickled nor copied: noise that is drawn twice protects nothing. Make "
            "a new one, SecretNoise(), in each process"
        )


class SeededNoise(NoiseSource):
    """Noise that repeats, for simulations: whoever knows the seed can take it off again.

    Args:
        seed: Of the simulation.
        labels: What this stream is for, e.g. the participant's name; other labels, other noise.
        simulated: Must be given, and True: a reminder in the calling code that this protects nobody.
    """

    simulated = True

    def __init__(self, seed: int, *labels: str | int, simulated: bool = False) -> None:
        if simulated is not True:
            raise ConfigurationError(
                f"SeededNoise(seed={seed!r}, simulated={simulated!r}): seeded noise protects nobody. In a "
                f"simulation say so with simulated=True; otherwise use SecretNoise()"
            )
        self._seed = seed
        self._labels = labels

    def _generator(self, forks: int) -> np.random.Generator:
        fork = ("fork", forks) if forks else ()
        return numpy_generator(self._seed, "noise", *self._labels, *fork)

    def spawn(self, *labels: str | int) -> SeededNoise:
        return SeededNoise(self._seed, *self._labels, *labels, simulated=True)


class NoiseAhead:
    """Blocks of Gaussian noise, each drawn in the background while the one before is in use.

    Deterministic if the source is: give it a source that nothing else draws from, as
    :meth:`NoiseSource.spawn` makes. The thread ends with :meth:`close`, or when this object is no longer
    referred to. After a fork the child draws anew. Calls must come from one thread at a time.

    Args:
        noise: Where it comes from.
        count: Values in each block.
    """

    def __init__(self, noise: NoiseSource, count: int) -> None:
        self._noise = noise
        self._count = require_count("count", count)
        self._next: Future[Floats] | None = None
        self._forks = -1

    def gaussian(self) -> Floats:
        """float64 (count,), standard normal; the caller's own, to be changed as it likes."""
        if self._next is None or self._forks != _forks:
            self._forks = _forks
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
            self._next = self._draw()
        block = self._next.result()
        self._next = self._draw()
        return block

    def close(self) -> None:
        """End the thread, and drop what was drawn ahead; another call starts it again."""
        if self._next is not None and self._forks == _forks:
            self._thread.shutdown(cancel_futures=True)
        self._next = None

    def _draw(self) -> Future[Floats]:
        return self._thread.submit(self._noise.gaussian, self._count)


def _aes_counter() -> Any:
    try:
        from randomgen import AESCounter
    except ImportError as error:
        raise ConfigurationError(
            "secret noise needs randomgen, which is not installed: pip install 'lightning_ppdl[privacy]'"
        ) from error
    return AESCounter
