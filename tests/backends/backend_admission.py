"""Who may join with what, and which uploads are refused; see ``backend_suite.py``."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from backend_harness import MANIFEST, SIZE, Served, State, encoded, manifest

from lightning_ppdl import errors
from lightning_ppdl.records import Manifest, Membership, ParameterSpec
from lightning_ppdl.server.merge import ServerOptimizer


class AdmissionSuite(Served):
    """A refused request names its reason and leaves everything as it was."""

    def test_join_says_where_the_collaboration_stands(self) -> None:
        server = self.add_server()
        first = self.connect()
        anna = first.join("anna", MANIFEST)
        assert anna == Membership(
            anna.session, server.study, 0, 0, needs_initial=True, lease_seconds=60.0, anytime=True
        )
        first.offer_initial(np.arange(SIZE, dtype=np.float32))
        first.upload(encoded())
        second = self.connect()
        ben = second.join("ben", MANIFEST)
        assert ben == Membership(
            ben.session, server.study, 1, 0, needs_initial=False, lease_seconds=60.0, anytime=True
        )
        assert len({anna.session, ben.session}) == 2

    def test_only_the_first_offer_counts(self) -> None:
        server = self.add_server()
        first, second = self.connect(), self.connect()
        assert first.join("anna", MANIFEST).needs_initial and second.join("ben", MANIFEST).needs_initial
        second.offer_initial(np.ones(SIZE, np.float32))
        first.offer_initial(np.zeros(SIZE, np.float32))
        np.testing.assert_array_equal(server.parameters(), np.ones(SIZE))

    def test_the_server_may_bring_the_parameters(self) -> None:
        initial = np.arange(SIZE, dtype=np.float32)
        server = self.add_server(initial=initial)
        assert not self.connect().join("anna", MANIFEST).needs_initial
        np.testing.assert_array_equal(server.parameters(), initial)

    @pytest.mark.parametrize(
        "vector",
        [np.zeros(SIZE - 1), np.zeros((4, 5)), np.full(SIZE, np.nan), np.full(SIZE, np.inf)],
        ids=["short", "matrix", "nan", "inf"],
    )
    def test_unusable_parameters_are_refused(self, vector: Any) -> None:
        server = self.add_server()
        backend = self.connect()
        backend.join("anna", MANIFEST)
        with pytest.raises(errors.JoinRefusedError, match="finite float32"):
            backend.offer_initial(vector.astype(np.float32))
        backend.offer_initial(np.ones(SIZE, np.float32))
        assert server.parameters().tolist() == [1.0] * SIZE

    def test_other_parameters_are_told_apart_at_join(self) -> None:
        server = self.add_server()
        self.member("anna").upload(encoded())
        before = State(server)
        other = Manifest((MANIFEST.parameters[0], ParameterSpec("b", (9,), "float32")))
        backend = self.connect()
        with pytest.raises(errors.FingerprintMismatchError, match=r"parameter 1 is 'b' \[9\]") as raised:
            backend.join("ben", other)
        assert backend.url in str(raised.value)
        before.require_unchanged(server)

    @pytest.mark.parametrize(
        ("settings", "name", "declared", "error"),
        [
            ({"members": ["anna", "zoe"]}, "ben", manifest(), errors.UnknownParticipantError),
            ({"upload_fraction": 0.5}, "ben", manifest(0.51), errors.JoinRefusedError),
            ({"upload_fraction": 0.5}, "ben", manifest(float("nan")), errors.JoinRefusedError),
            ({}, "ben", manifest(-1.0), errors.JoinRefusedError),
            ({"bound": 0.1}, "ben", manifest(0.5, 0.11), errors.JoinRefusedError),
            ({"bound": 0.1}, "ben", manifest(0.5, None), errors.JoinRefusedError),
            ({"bound": 0.1}, "ben", manifest(0.5, float("nan")), errors.JoinRefusedError),
            ({"bound": 0.1}, "ben", manifest(0.5, float("inf")), errors.JoinRefusedError),
        ],
    )
    def test_joins_beyond_what_was_agreed_are_refused(
        self, settings: dict[str, Any], name: str, declared: Manifest, error: type[Exception]
    ) -> None:
        server = self.add_server(**settings)
        self.member("anna", manifest(0.5, 0.1)).upload(encoded(values=[0.1, 0.1]))
        before = State(server)
        backend = self.connect()
        with pytest.raises(error):
            backend.join(name, declared)
        before.require_unchanged(server)
        assert server.status().rejections == {error.__name__: 1}

    def test_gradients_need_a_rule_that_takes_them(self) -> None:
        gradients = manifest(quantity="gradient")
        self.add_server()
        with pytest.raises(errors.JoinRefusedError, match=r"quantity='gradient'.*ServerOptimizer"):
            self.connect().join("anna", gradients)
        server = self.make_server(merge=ServerOptimizer(functools.partial(torch.optim.SGD, lr=0.5)))
        self.member("anna", gradients).upload(encoded(indices=[2], values=[4.0]))
        assert server.parameters()[2] == -2.0

    # Refused uploads

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            (b"", errors.MalformedUpdateError),
            (encoded(round_=2)[:-1], errors.MalformedUpdateError),
            (encoded(round_=2, indices=[3, SIZE]), errors.IndexOutOfRangeError),
            (encoded(round_=2, indices=[2**40]), errors.IndexOutOfRangeError),
            (encoded(round_=2, indices=[1, 2], values=[0.1, np.nan]), errors.NonFiniteValueError),
            (encoded(round_=2, indices=[1], values=[-np.inf]), errors.NonFiniteValueError),
            (encoded(round_=2, indices=[1], values=[-0.5000001]), errors.BoundExceededError),
            (encoded(round_=2, indices=range(11), values=[0.1] * 11), errors.FractionExceededError),
            (encoded(round_=2, indices=range(SIZE), values=[0.1] * SIZE), errors.FractionExceededError),
            (encoded(round_=2, base=2, values=[0.1, 0.1]), errors.UnknownVersionError),
            (encoded(round_=1, values=[0.1, 0.2]), errors.RoundSeenBeforeError),
            (encoded(round_=1, indices=[0, 6], values=[0.1, 0.1]), errors.RoundSeenBeforeError),
            (encoded(round_=0, values=[0.1, 0.1]), errors.RoundSeenBeforeError),
            (encoded("stranger", 2, values=[0.1, 0.1]), errors.AuthenticationError),
        ],
    )
    def test_bad_uploads_are_refused_and_change_nothing(self, message: bytes, error: type[Exception]) -> None:
        server = self.add_server()
        backend = self.member("anna", manifest(0.5, 0.5))
        backend.upload(encoded(values=[0.1, 0.1]))
        before = State(server)
        with pytest.raises(error):
            backend.upload(message)
        before.require_unchanged(server)
        # And the participant may go on as if nothing had been.
        assert backend.upload(encoded(round_=2, base=1, values=[0.5, -0.5])).version == 2
