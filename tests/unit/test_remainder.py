"""The asynchronous protocol's default: an update's remainder after what others have done."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_ppdl.records import SparseUpdate, Vector
from lightning_ppdl.server.merge import MergeContext, Remainder
from lightning_ppdl.server.protocol import Asynchronous
from lightning_ppdl.server.store import MemoryStore

SIZE = 4


class Server:
    """A store and the rule, fed with dense updates."""

    def __init__(self) -> None:
        self.store = MemoryStore(np.zeros(SIZE, dtype=np.float32))
        self.rule = Remainder()
        self.past = [np.array(self.store.parameters)]

    def upload(self, values: list[float], base: int) -> Vector:
        """Merge ``values``, based on version ``base``; what that changed."""
        update = SparseUpdate("a", 1, base, np.arange(SIZE), np.array(values, dtype=np.float32))
        before = np.array(self.store.parameters)
        context = MergeContext(self.store.version - base, "change", self.store.parameters)
        self.store.commit(self.rule.merge(update, context), update.indices, decay=1.0)
        self.past.append(np.array(self.store.parameters))
        return np.array(self.store.parameters - before)


def test_it_is_the_default_of_the_asynchronous_protocol() -> None:
    assert isinstance(Asynchronous().default_merge(), Remainder)


def test_without_staleness_it_adds() -> None:
    server = Server()
    for version, values in enumerate([[1.0, -2, 0.5, 0], [3.0, 1, -1, 2]]):
        np.testing.assert_array_equal(server.upload(values, base=version), np.array(values, dtype=np.float32))


def test_what_another_did_already_is_not_done_again() -> None:
    server = Server()
    server.upload([1.0, 1, 1, 0], base=0)
    changed = server.upload([1.0, 3, -1, 1], base=0)
    # Nothing was known before version 0, so nothing is persistent and the reach is 1: done before,
    # two thirds left, the other direction (all of it), and an entry nobody had touched.
    np.testing.assert_allclose(changed, np.array([0, 2, -1, 1]) / np.sqrt(2), rtol=1e-6)


def test_entries_that_keep_their_direction_reach_further_than_those_that_alternate() -> None:
    server = Server()
    steady = alternating = np.zeros(0)
    for step in range(12):
        sign = 1 if step % 4 < 2 else -1
        changed = server.upload([1.0, sign, 0, 0], base=max(0, step - 2))
        steady, alternating = np.append(steady, changed[0]), np.append(alternating, abs(changed[1]))
    assert steady[-1] > steady[2]
    assert server.store.parameters[0] > abs(server.store.parameters[1])


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-2, 2, width=32), min_size=SIZE, max_size=SIZE), st.integers(0, 9)),
        min_size=1,
        max_size=40,
    )
)
def test_no_entry_moves_further_than_its_upload_says_nor_the_other_way(
    uploads: list[tuple[list[float], int]],
) -> None:
    server = Server()
    for version, (values, staleness) in enumerate(uploads):
        wanted = np.array(values, dtype=np.float32)
        changed = server.upload(values, base=max(0, version - staleness))
        # Changes are read off sums in float32.
        tolerance = 1e-5 * (1 + np.abs(server.store.parameters))
        assert (np.abs(changed) <= np.abs(wanted) + tolerance).all()
        assert (changed * np.sign(wanted) >= -tolerance).all()


@given(st.integers(0, 2**32), st.integers(0, 2))
def test_it_is_the_formula_of_its_docstring(seed: int, staleness: int) -> None:
    """Against a literal transcription on the whole past, which few versions are all kept of."""
    stream = np.random.default_rng(seed)
    server = Server()
    persistence = np.zeros(SIZE)
    for version in range(5):
        values = stream.standard_normal(SIZE)
        stale = min(staleness, version)
        expected = values.copy()
        if stale:
            base, earlier = server.past[version - stale], server.past[max(0, version - 2 * stale)]
            for j in range(SIZE):
                sign = np.sign(values[j])
                agreement = sign * np.sign(float(base[j]) - float(earlier[j]))
                if agreement != 0:
                    persistence[j] += (agreement - persistence[j]) / (1 + stale)
                reach = min(1 / (1 - persistence[j]) if persistence[j] < 1 else np.inf, np.sqrt(1 + stale))
                done = max(0.0, sign * float(server.past[version][j] - base[j]))
                expected[j] = sign * max(0.0, reach * abs(values[j]) - done) / np.sqrt(1 + stale)
        changed = server.upload([float(v) for v in values], base=version - stale)
        np.testing.assert_allclose(changed, expected, atol=1e-4)
