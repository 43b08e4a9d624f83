"""What no honest encoder makes, and a check must refuse all the same."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_ppdl import errors
from lightning_ppdl.records import Manifest, ParameterSpec, SparseUpdate
from lightning_ppdl.server.admission import check_update

MANIFEST = Manifest((ParameterSpec("w", (20,), "float32"),))


def update(indices: object, values: object, base: int = 0) -> SparseUpdate:
    return SparseUpdate("anna", 2, base, np.asarray(indices), np.asarray(values))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (update([5, 5], np.ones(2, np.float32)), errors.UnsortedIndicesError),
        (update([5, 4], np.ones(2, np.float32)), errors.UnsortedIndicesError),
        (update([-1, 4], np.ones(2, np.float32)), errors.IndexOutOfRangeError),
        (update([1, 2], np.ones(1, np.float32)), errors.MalformedUpdateError),
        (update(np.zeros(1, np.int32), np.ones(1, np.float32)), errors.MalformedUpdateError),
        (update([0], np.ones(1)), errors.MalformedUpdateError),
        (update([0, 5], np.ones(2, np.float32), base=-1), errors.UnknownVersionError),
    ],
)
def test_an_update_out_of_shape_is_refused(bad: SparseUpdate, error: type[Exception]) -> None:
    check_update(update([0, 5], np.ones(2, np.float32)), MANIFEST, version=1)
    with pytest.raises(error):
        check_update(bad, MANIFEST, version=1)
