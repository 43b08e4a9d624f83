"""Whose token, whose certificate: and what a token file may look like."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.server import identity
from lightning_ppdl.server.identity import (
    Identity,
    TokenFile,
    Tokens,
    certificate_names,
    hash_token,
    new_token,
    warn_if_exposed,
)

A, B, OLD = new_token(), new_token(), new_token()


def write(path: Path, *lines: str) -> Path:
    """Replace the file in one step, as an operator should."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    beside.chmod(0o600)
    beside.rename(path)
    return path


def line(name: str, token: str, gap: str = "\t") -> str:
    return f"{name}{gap}{hash_token(token)}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.txt"


# Tokens


def test_a_hash_is_that_of_sha256sum() -> None:
    assert hash_token("abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()
    assert hash_token("abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tokens_have_256_bits_and_never_repeat() -> None:
    made = {new_token() for _ in range(1000)}
    assert len(made) == 1000
    assert {len(bytes.fromhex(token)) for token in made} == {32}
    ones = sum(int(token, 16).bit_count() for token in made)
    assert abs(ones - 128_000) < 5 * 253  # five standard deviations of 256,000 fair coins


def test_a_token_has_one_owner(path: Path) -> None:
    tokens = Tokens.read(write(path, "# who", "", line("clinic-a", A), "  ", line("clinic-b", B, "  ")))
    assert tokens.owner(A) == "clinic-a"
    assert tokens.owner(B) == "clinic-b"
    assert tokens.names == {"clinic-a", "clinic-b"}
    for wrong in ("", A[:-1], A + "0", A + "\n", A.upper(), hash_token(A), new_token(), "\udcff", "ä"):
        assert tokens.owner(wrong) is None


def test_the_last_gap_of_a_line_separates(path: Path) -> None:
    spaced, shouted = line("St. Mary's Hospital", A, " \t "), f"  Klinik Süd\t{hash_token(B).upper()} "
    tokens = Tokens.read(write(path, spaced, shouted))
    assert tokens.owner(A) == "St. Mary's Hospital"
    assert tokens.owner(B) == "Klinik Süd"


def test_two_tokens_of_one_name_are_good_while_one_replaces_the_other(path: Path) -> None:
    tokens = Tokens.read(write(path, line("clinic-a", OLD), line("clinic-a", A), line("clinic-a", A)))
    assert tokens.owner(OLD) == tokens.owner(A) == "clinic-a"


def test_no_tokens_let_nobody_in(path: Path) -> None:
    assert Tokens().owner("") is None
    assert Tokens.read(write(path, "# all revoked")).owner(A) is None


def test_what_windows_writes_is_read(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + f"{line('clinic-a', A)}\r\n".encode())
    assert Tokens.read(path).owner(A) == "clinic-a"


def test_every_entry_is_compared_whichever_matches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens([(f"clinic-{i}", hash_token(str(i))) for i in range(20)])
    compared = []
    real = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for token, owner in (("0", "clinic-0"), ("19", "clinic-19"), ("20", None)):
        compared.clear()
        assert tokens.owner(token) == owner
        assert len(compared) == 20


@pytest.mark.parametrize(
    ("lines", "number", "said"),
    [
        (["clinic-a"], 1, "no name, a tab and a hash"),
        (["# fine", "", f"clinic-a\t{A}"], 3, "give the hash of the token, never the token itself"),
        ([f"{A}\tclinic-a"], 1, "give the hash of the token"),
        ([f"clinic-a\t{hash_token(A)[:-1]}"], 1, "sha256: and 64 hexadecimal digits"),
        ([f"clinic-a\t{hash_token(A)} # temporary"], 1, "sha256: and 64 hexadecimal digits"),
        ([line("clinic-a", A), line("clinic-b", A)], 2, "'clinic-a' too, now of 'clinic-b'"),
        ([line("x" * 256, A)], 1, "must be a name of 1 to 255 printable characters"),
    ],
)
def test_a_wrong_line_is_named(path: Path, lines: list[str], number: int, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Tokens.read(write(path, *lines))
    assert f"{path}, line {number}: " in str(caught.value)
    assert said in str(caught.value)
    assert A not in str(caught.value)


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no token file .*ppdl keys makes one"):
        Tokens.read(path)
    path.mkdir()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Tokens.read(path)
    path.rmdir()
    path.write_bytes(b"\xff\xfe\x00clinic")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        Tokens.read(path)


# Token files that change


def test_a_token_is_revoked_without_a_restart(path: Path) -> None:
    file = TokenFile(write(path, line("clinic-a", A), line("clinic-b", B)))
    assert file.owner(A) == "clinic-a"
    write(path, line("clinic-b", B))
    assert file.owner(A) is None
    assert file.owner(B) == "clinic-b"
    write(path, line("clinic-b", B), line("clinic-a", OLD))
    assert file.owner(OLD) == "clinic-a"


def test_a_change_in_place_of_the_same_size_and_time_is_seen(path: Path) -> None:
    file = TokenFile(write(path, line("clinic-a", A)))
    before = os.stat(path)
    path.write_text(f"{line('clinic-a', B)}\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.owner(A) is None
    assert file.owner(B) == "clinic-a"


def test_a_broken_change_changes_nothing_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TokenFile(write(path, line("clinic-a", A)))
    write(path, line("clinic-b", B), "clinic-c")
    for _ in range(3):
        assert file.owner(A) == "clinic-a"
        assert file.owner(B) is None
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert f"{path}, line 2" in record.getMessage()
    path.unlink()
    assert file.owner(A) == file.owner(A) == "clinic-a"
    assert "there is no token file" in caplog.text
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2
    write(path, line("clinic-b", B))
    assert file.owner(A) is None
    assert file.owner(B) == "clinic-b"


def test_a_file_that_never_changes_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TokenFile(write(path, line("clinic-a", A)))
    monkeypatch.setattr(identity.Tokens, "read", lambda path: pytest.fail("read again"))
    assert file.owner(A) == "clinic-a"


def test_a_file_that_is_wrong_from_the_beginning_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="line 1"):
        TokenFile(write(path, "clinic-a"))


# Permissions


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_warned_of(
    path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, line("clinic-a", A)).chmod(mode)
    warn_if_exposed(path)
    assert ("chmod 600" in caplog.text and f"{mode:03o}" in caplog.text) == warns
    caplog.clear()
    TokenFile(path)
    assert ("chmod 600" in caplog.text) == warns
    warn_if_exposed(path.with_name("missing"))


# Certificates


@pytest.mark.parametrize(
    ("context", "names"),
    [
        ({}, set()),
        ({"x509_common_name": [b"clinic-a"]}, {"clinic-a"}),
        ({"x509_common_name": ["Klinik Süd".encode()]}, {"Klinik Süd"}),
        ({"x509_common_name": [b"clinic-a"], "peer_uri": [b"https://a.example"]}, {"clinic-a"}),
        ({"x509_common_name": [b"clinic-a"], "peer_uri": [b"ppdl:clinic-b"]}, {"clinic-b"}),
        ({"peer_uri": [b"ppdl:clinic-a", b"ppdl:clinic%20b", b"PPDL:c"]}, {"clinic-a", "clinic b", "c"}),
        ({"x509_common_name": [b"clinic-a"], "peer_uri": [b"ppdl:"]}, set()),
        ({"x509_common_name": [b"clinic-a"], "peer_uri": [b"ppdl:%ff"]}, set()),
        ({"x509_common_name": [b""]}, set()),
        ({"x509_common_name": [b"\xff"]}, set()),
        # Of a host or of a person, however it is spelt.
        ({"peer_dns": [b"ppdl:clinic-b"], "x509_subject_alternative_name": [b"ppdl:clinic-b"]}, set()),
    ],
)
def test_whom_a_certificate_speaks_for(context: dict[str, list[bytes]], names: set[str]) -> None:
    assert certificate_names(context) == names


def test_names_match_exactly() -> None:
    names = certificate_names({"x509_common_name": [b"*"], "peer_uri": []})
    assert names == {"*"} and "clinic-a" not in names
    assert "clinic-a" not in certificate_names({"x509_common_name": [b"Clinic-A"]})
    assert "clinic-a" not in certificate_names({"x509_common_name": [b"clinic-a\x00.evil"]})


def test_an_identity_is_a_value() -> None:
    assert Identity("clinic-a", "token") == Identity("clinic-a", "token")
    assert Identity("clinic-a", "token") != Identity("clinic-a", "nobody")


def test_identity_needs_the_standard_library_alone() -> None:
    code = (
        "import sys, lightning_ppdl.server.identity\n"
        "print(sorted({'torch', 'numpy', 'grpc', 'cryptography', 'hydra'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
