"""zstandard as the codecs of a message use it: two ways to compress, and one to unpack.

Compressors and decompressors are kept, a set for each thread: making one takes as long as packing ten
thousand entries, and two threads may not use the same.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import zstandard

from lightning_ppdl.errors import MalformedUpdateError

Plane = npt.NDArray[np.uint8]


class _PerThread(threading.local):
    def __init__(self) -> None:
        # A table of 64 places hardly ever finds a repetition, which leaves the Huffman coder. Random bytes of
        # few values repeat by chance all the time, and pointing back to that costs more than it saves.
        entropy = zstandard.ZstdCompressionParameters(
            compression_level=1, hash_log=6, min_match=7, write_content_size=True
        )
        self.entropy = zstandard.ZstdCompressor(compression_params=entropy)
        self.repetitions = zstandard.ZstdCompressor(level=3)
        self.unpack = zstandard.ZstdDecompressor()


_thread = _PerThread()


def code_entropy(plane: Plane) -> bytes:
    """Compress uint8 (n,) whose values are unevenly frequent but follow no pattern."""
    return _thread.entropy.compress(plane.data)


def code_repetitions(plane: Plane) -> bytes:
    """Compress uint8 (n,) in which sequences recur."""
    return _thread.repetitions.compress(plane.data)


def most_bytes(size: int) -> int:
    """No frame of ``size`` bytes of content is longer: zstandard's own bound for what does not compress."""
    return size + size // 256 + 64


def unpack(frame: memoryview, size: int, what: str) -> Plane:
    """The content of one frame as a read-only uint8 (size,).

    Args:
        frame: All of it, and nothing after it.
        size: Bytes of content, 1 or more. Nothing is allocated for a frame that says otherwise, or does not
            say, and zstandard stops where a frame goes on beyond what it says.
        what: Names the frame in error messages.

    Raises:
        MalformedUpdateError: if it is damaged, or its content has another size.
    """
    try:
        claimed = zstandard.frame_content_size(frame)
        if claimed != size:
            raise MalformedUpdateError(f"{what} of {len(frame)} bytes announces {claimed} where {size} fit")
        content = _thread.unpack.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedUpdateError(f"{what} of {len(frame)} bytes is damaged: {error}") from error
    if len(content) != size:
        raise MalformedUpdateError(f"{what} holds {len(content)} bytes and announces {size}")
    return np.frombuffer(content, np.uint8)
