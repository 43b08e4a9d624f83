"""``ppdl keys`` as a person uses it: what it leaves on disk, and what it leaves alone."""

from __future__ import annotations

import datetime
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from lightning_ppdl.cli import main
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.keys import make_keys
from lightning_ppdl.server.identity import Tokens

HOSTS = ["localhost", "127.0.0.1"]
BOTH = "participants=[clinic-a,clinic-b]"
SECRET = {"ca-key.pem", "server-key.pem", "tokens.txt"} | {
    f"clinic-{letter}{end}" for letter in "ab" for end in ("-key.pem", ".token")
}
PUBLIC = {"ca.pem", "server.pem", "clinic-a.pem", "clinic-b.pem"}

Ppdl = Callable[..., int]


@pytest.fixture
def ppdl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ppdl]:
    """Runs ``ppdl keys`` in this process, in an empty directory, and returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["ppdl", "keys", *arguments])
        return main()

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refusal(directory: Path, participants: list[str], hosts: list[str] = HOSTS, days: int = 365) -> str:
    with pytest.raises(ConfigurationError) as caught:
        make_keys(directory, hosts, participants, days)
    return str(caught.value)


# What is made


def test_everything_is_made_and_explained(
    ppdl: Ppdl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl(BOTH) == 0
    out = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"keys"}, "nothing but the keys, no run directory"
    assert set(contents(tmp_path / "keys")) == SECRET | PUBLIC
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    for name in SECRET:
        assert (tmp_path / "keys" / name).stat().st_mode & 0o777 == 0o600
    lines = out.splitlines()
    assert lines[0].startswith("made in keys: ") and set(lines[0].split()[3:]) == SECRET | PUBLIC
    gets = {line.split(" gets ")[0]: line.split(" gets ")[1].split() for line in lines if " gets " in line}
    assert gets["the server"] == ["ca.pem", "server.pem", "server-key.pem", "tokens.txt"]
    assert gets["clinic-a"] == ["ca.pem", "clinic-a.pem", "clinic-a-key.pem", "clinic-a.token"]
    assert gets["nobody"][0] == "ca-key.pem:"
    assert "in production use your organisation's own" in lines[-1]
    assert "kept" not in out and "note" not in out
    tokens = Tokens.read(tmp_path / "keys" / "tokens.txt")
    for name in ("clinic-a", "clinic-b"):
        token = (tmp_path / "keys" / f"{name}.token").read_text().strip()
        assert tokens.owner(token) == name and token not in out


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_secrets_do_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        make_keys(tmp_path, HOSTS, ["clinic-a"])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} >= {
        "ca-key.pem",
        "server-key.pem",
        "clinic-a-key.pem",
        "clinic-a.token",
        "tokens.txt",
    }


def test_hosts_and_days_reach_the_certificate(ppdl: Ppdl, tmp_path: Path) -> None:
    assert ppdl("directory=here", "hosts=[ppdl.example.org,10.0.0.7,'::1',my_host,'*.lab']", "days=30") == 0
    server = x509.load_pem_x509_certificate((tmp_path / "here" / "server.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["ppdl.example.org", "my_host", "*.lab"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    left = server.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    assert datetime.timedelta(days=29) < left <= datetime.timedelta(days=30)


# What is left alone


def test_nothing_is_replaced(ppdl: Ppdl, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppdl(BOTH) == 0
    before = contents(tmp_path / "keys")
    capsys.readouterr()
    assert ppdl(BOTH) == 0
    assert contents(tmp_path / "keys") == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("kept in keys: ") and set(lines[0].split()[3:]) == SECRET | PUBLIC
    assert lines[1] == "made in keys: nothing, all were there"


def test_a_participant_is_added_later(ppdl: Ppdl, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ppdl(BOTH) == 0
    before = contents(tmp_path / "keys")
    table = tmp_path / "keys" / "tokens.txt"
    table.write_bytes(before["tokens.txt"].rstrip(b"\n"))  # as some editors leave it
    capsys.readouterr()
    assert ppdl("participants=[clinic-c]") == 0
    after = contents(tmp_path / "keys")
    assert set(after) - set(before) == {"clinic-c.pem", "clinic-c-key.pem", "clinic-c.token"}
    assert {**after, "tokens.txt": b""} | {**before, "tokens.txt": b""} == {**after, "tokens.txt": b""}
    assert after["tokens.txt"].startswith(before["tokens.txt"])
    assert Tokens.read(table).names == {"clinic-a", "clinic-b", "clinic-c"}
    out = capsys.readouterr().out
    assert "made in keys: clinic-c-key.pem clinic-c.pem clinic-c.token tokens.txt\n" in out


def test_tokens_are_rotated_and_stay_revoked(tmp_path: Path) -> None:
    make_keys(tmp_path, HOSTS, ["clinic-a"])
    file, table = tmp_path / "clinic-a.token", tmp_path / "tokens.txt"
    old = file.read_text().strip()
    file.unlink()
    assert make_keys(tmp_path, HOSTS, ["clinic-a"]).made == ("clinic-a.token", "tokens.txt")
    new = file.read_text().strip()
    assert Tokens.read(table).owner(old) == Tokens.read(table).owner(new) == "clinic-a" and old != new
    table.write_text("")
    again = make_keys(tmp_path, HOSTS, ["clinic-a"])
    assert again.made == () and Tokens.read(table).owner(new) is None
    assert "clinic-a.token is not in tokens.txt" in again.notes[0]


def test_keys_that_were_handed_over_are_not_missed(tmp_path: Path) -> None:
    make_keys(tmp_path, HOSTS, ["clinic-a"])
    (tmp_path / "clinic-a-key.pem").unlink()
    (tmp_path / "server-key.pem").unlink()
    assert make_keys(tmp_path, HOSTS, ["clinic-a"]).made == ()


def test_hosts_that_the_kept_certificate_lacks_are_said(tmp_path: Path) -> None:
    make_keys(tmp_path, HOSTS)
    assert make_keys(tmp_path, ["localhost"]).notes == ()
    (note,) = make_keys(tmp_path, ["localhost", "10.0.0.7", "b.example"]).notes
    assert "is not for 10.0.0.7, b.example: move it and server-key.pem away" in note


# Refusals: each leaves all as it was


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["participants=[a/b]"], "'a/b' holds a character"),
        (["participants=['a\\\\b']"], "holds a character"),
        (["participants=[..]"], "'..' begins or ends"),
        (["participants=[.hidden]"], "'.hidden' begins or ends"),
        (["participants=['-rf']"], "'-rf' begins or ends"),
        (["participants=['#a']"], "'#a' begins or ends"),
        (["participants=[' a']"], "' a' begins or ends"),
        (["participants=['']"], "participants='' must be a name"),
        ([f"participants=[{'a' * 65}]"], "more than 64 characters"),
        (["participants=[CA]"], "the authority's"),
        (["participants=[server]"], "the server's"),
        (["participants=[clinic-a,clinic-a-key]"], "another's key"),
        (["participants=[clinic-a,Clinic-A]"], "the same files as 'clinic-a'"),
        (["participants=clinic-a"], "write participants=[clinic-a]"),
        (["hosts=localhost"], "write hosts=[localhost]"),
        (["hosts=[]"], "hosts=[] leaves the server without a name"),
        (["hosts=['localhost:50051']"], "without scheme and port"),
        (["hosts=['grpcs://localhost']"], "without scheme and port"),
        (["hosts=[10.0.0.256]"], "no name or IP address"),
        (["hosts=[0.0.0.0]"], "where a server listens"),
        (["hosts=['bücher.example']"], "in ASCII letters"),
        (["days=0"], "days=0"),
        (["days=3651"], "days=3651 must be at most 3650"),
        (["directory=missing/keys"], "make it first"),
        (["host=[a]"], "did you mean hosts?"),
        (["+participant=[a]"], "did you mean participants?"),
    ],
)
def test_a_setting_that_cannot_work(
    ppdl: Ppdl, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ppdl(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ppdl keys: ") and said in error and "Traceback" not in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("mine")
    assert "is a file: name a directory" in refusal(tmp_path / "keys", [])
    assert (tmp_path / "keys").read_text() == "mine"
    assert "there is no directory" in refusal(tmp_path / "keys" / "more", [])


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    def changed(name: str, content: bytes | None, participants: list[str]) -> str:
        directory = tmp_path / f"case-{len(list(tmp_path.iterdir()))}"
        make_keys(directory, HOSTS, ["clinic-a"])
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_bytes(content)
        before = contents(directory)
        message = refusal(directory, participants)
        assert contents(directory) == before
        return message

    make_keys(tmp_path / "other", HOSTS, ["clinic-a"])
    other = contents(tmp_path / "other")
    assert "ca-key.pem is missing" in changed("ca-key.pem", None, ["clinic-b"])
    assert "ca.pem is missing" in changed("ca.pem", None, ["clinic-b"])
    assert "is not the ECDSA key of ca.pem" in changed("ca-key.pem", other["ca-key.pem"], ["clinic-b"])
    assert "damaged" in changed("ca.pem", b"not a certificate", ["clinic-b"])
    assert "server.pem is no certificate of the auth" in changed("server.pem", other["server.pem"], [])
    assert "clinic-a.pem is no certificate" in changed("clinic-a.pem", other["clinic-a.pem"], ["clinic-a"])
    assert "clinic-a.pem is no certificate" in changed("clinic-a.pem", b"", ["clinic-a"])
    assert "clinic-a-key.pem has no clinic-a.pem" in changed("clinic-a.pem", None, ["clinic-a"])
    assert "line 1: " in changed("tokens.txt", b"nonsense\n", ["clinic-b"])


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("failing", ["the fifth file", "the token file"])
def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, failing: str
) -> None:
    directory = tmp_path / "keys"
    if there:
        make_keys(directory, HOSTS, ["clinic-z"])
    before = contents(directory) if there else None
    opened = 0
    real = os.open

    def full(path: Path, flags: int, mode: int) -> int:
        nonlocal opened
        opened += 1
        if opened == 5 if failing == "the fifth file" else path.name == "tokens.txt":
            raise OSError(28, "No space left on device")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", full)
    message = refusal(directory, ["clinic-a", "clinic-b"])
    assert "No space left on device" in message and "nothing was made" in message
    assert (contents(directory) if directory.exists() else None) == before


def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def racing(path: Path, flags: int, mode: int) -> int:
        if path.name == "server.pem":
            path.write_text("another's")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", racing)
    assert "nobody else is writing into it" in refusal(tmp_path / "keys", ["clinic-a"])
    assert contents(tmp_path / "keys") == {"server.pem": b"another's"}


def test_without_the_package_the_remedy_is_said(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None; sys.argv = ['ppdl', 'keys', *sys.argv[1:]]\n"
        "from lightning_ppdl.cli import main; raise SystemExit(main())"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == (
        "ppdl keys: making keys needs the package cryptography: pip install 'lightning_ppdl[network]'\n"
    )
    assert list(tmp_path.iterdir()) == []
