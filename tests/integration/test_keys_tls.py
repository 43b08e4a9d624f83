"""TLS with the keys that ``ppdl keys`` makes, and with those of the documented recipe for openssl."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from lightning_ppdl import keys
from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.keys import make_keys
from lightning_ppdl.server.identity import Tokens, certificate_names

PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
HOSTS = ["localhost", "127.0.0.1"]


def made_by_the_library(directory: Path) -> None:
    make_keys(directory, HOSTS, ["clinic-a", "clinic-b"])


def made_by_the_recipe(directory: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    directory.mkdir()
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks[0]],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module", params=[made_by_the_library, made_by_the_recipe])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of keys. Not to be changed."""
    if request.param is made_by_the_recipe and shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("keys") / "keys"
    request.param(directory)
    return directory


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names, by another authority."""
    directory = tmp_path_factory.mktemp("foreign") / "keys"
    made_by_the_library(directory)
    return directory


# TLS


def pair(directory: Path, stem: str) -> tuple[bytes, bytes]:
    return (directory / f"{stem}-key.pem").read_bytes(), (directory / f"{stem}.pem").read_bytes()


def whoami(request: bytes, context: grpc.ServicerContext) -> bytes:
    return ",".join(sorted(certificate_names(context.auth_context()))).encode()


@contextmanager
def serving(directory: Path, stem: str = "server", *, mutual: bool = True) -> Iterator[int]:
    """A server that answers with the caller's proved names; the port it listens on."""
    server = grpc.server(ThreadPoolExecutor(2))
    method = grpc.unary_unary_rpc_method_handler(whoami)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"whoami": method}),))
    authority = (directory / "ca.pem").read_bytes() if mutual else None
    credentials = grpc.ssl_server_credentials([pair(directory, stem)], authority, mutual)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def call(
    port: int,
    authority: Path,
    own: tuple[bytes, bytes] = (b"", b""),
    host: str = "localhost",
    expected: str | None = None,
) -> str:
    """What the server says; for a refused connection, "refused". ``expected``: its name, if not ``host``."""
    key, chain = own
    credentials = grpc.ssl_channel_credentials(
        (authority / "ca.pem").read_bytes(), key or None, chain or None
    )
    options = [] if expected is None else [("grpc.ssl_target_name_override", expected)]
    with grpc.secure_channel(f"{host}:{port}", credentials, options) as channel:
        try:
            return str(channel.unary_unary("/test/whoami")(b"", timeout=20).decode())
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return "refused"
            raise


def test_both_sides_know_each_other(made: Path) -> None:
    with serving(made) as port:
        for host in HOSTS:
            assert call(port, made, pair(made, "clinic-a"), host) == "clinic-a"
        assert call(port, made, pair(made, "clinic-b")) == "clinic-b"


def test_a_server_without_client_certificates_proves_itself_alone(made: Path) -> None:
    with serving(made, mutual=False) as port:
        assert call(port, made) == ""
        assert call(port, made, pair(made, "clinic-a")) == ""


def test_who_has_no_certificate_of_this_authority_is_refused(made: Path, foreign: Path) -> None:
    with serving(made) as port:
        assert call(port, made) == "refused"
        assert call(port, made, pair(foreign, "clinic-a")) == "refused"
        assert call(port, made, pair(made, "clinic-a")) == "clinic-a"


def test_a_server_of_another_authority_is_refused(made: Path, foreign: Path) -> None:
    with serving(foreign) as port:
        assert call(port, made, pair(foreign, "clinic-a")) == "refused"


def test_a_server_by_another_name_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ["elsewhere.example"], ["clinic-a"])
    with serving(tmp_path / "keys") as port:
        assert call(port, tmp_path / "keys", pair(tmp_path / "keys", "clinic-a")) == "refused"


def test_no_certificate_is_good_for_the_other_end(made: Path) -> None:
    with serving(made) as port:
        assert call(port, made, pair(made, "server")) == "refused"
    # Without alternative names the common name counts as the host's: only its usage refuses it.
    with serving(made, stem="clinic-b") as port:
        assert call(port, made, pair(made, "clinic-a"), expected="clinic-b") == "refused"


def test_names_beyond_ascii_arrive_as_they_are(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", HOSTS, ["Klinik Süd"])
    with serving(tmp_path / "keys") as port:
        assert call(port, tmp_path / "keys", pair(tmp_path / "keys", "Klinik Süd")) == "Klinik Süd"


def test_a_certificate_that_has_ended_is_refused_until_it_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "keys"
    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=31)
    with monkeypatch.context() as patch:
        patch.setattr(keys, "_now", lambda: past)
        make_keys(directory, HOSTS, ["clinic-a"], days=30)
    (directory / "server.pem").unlink()
    (directory / "server-key.pem").unlink()
    again = make_keys(directory, HOSTS, ["clinic-a", "clinic-b"])
    assert set(again.made) == {"server.pem", "server-key.pem", "tokens.txt"} | {
        "clinic-b.pem",
        "clinic-b-key.pem",
        "clinic-b.token",
    }
    (note,) = again.notes
    assert "clinic-a.pem ended on " in note and "move it and its key away" in note
    with serving(directory) as port:
        assert call(port, directory, pair(directory, "clinic-a")) == "refused"
        assert call(port, directory, pair(directory, "clinic-b")) == "clinic-b"
    (directory / "clinic-a.pem").rename(directory / "old.pem")
    (directory / "clinic-a-key.pem").rename(directory / "old-key.pem")
    make_keys(directory, HOSTS, ["clinic-a"])
    with serving(directory) as port:
        assert call(port, directory, pair(directory, "clinic-a")) == "clinic-a"


def test_a_participant_that_is_added_later_is_known_to_the_running_server(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    make_keys(directory, HOSTS, ["clinic-a"])
    with serving(directory) as port:
        make_keys(directory, HOSTS, ["clinic-b"])
        assert call(port, directory, pair(directory, "clinic-b")) == "clinic-b"


def test_no_certificate_outlives_its_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    monkeypatch.setattr(keys, "_now", lambda: now - datetime.timedelta(days=3600))
    make_keys(tmp_path, HOSTS)
    monkeypatch.setattr(keys, "_now", lambda: now)
    assert "clinic-a.pem is valid until " in "".join(make_keys(tmp_path, HOSTS, ["clinic-a"]).notes)
    ends = {
        name: x509.load_pem_x509_certificate((tmp_path / name).read_bytes()).not_valid_after_utc
        for name in ("ca.pem", "clinic-a.pem")
    }
    assert ends["clinic-a.pem"] == ends["ca.pem"]
    monkeypatch.setattr(keys, "_now", lambda: now + datetime.timedelta(days=60))
    with pytest.raises(ConfigurationError, match="in another directory"):
        make_keys(tmp_path, HOSTS, ["clinic-b"])
    assert not (tmp_path / "clinic-b.pem").exists()


# Files


def test_the_same_files_with_the_same_content(made: Path) -> None:
    extra = {"extensions.cnf"}
    names = {path.name for path in made.iterdir()} - extra
    participants = {f"clinic-{x}{end}" for x in "ab" for end in (".pem", "-key.pem", ".token")}
    assert names == participants | {"ca.pem", "ca-key.pem", "server.pem", "server-key.pem", "tokens.txt"}
    for name in names:
        public = name.endswith(".pem") and not name.endswith("-key.pem")
        assert (made / name).stat().st_mode & 0o777 == (0o644 if public else 0o600), name
    tokens = Tokens.read(made / "tokens.txt")
    for name in ("clinic-a", "clinic-b"):
        token = (made / f"{name}.token").read_text()
        assert re.fullmatch(r"[0-9a-f]{64}\n", token)
        assert tokens.owner(token.strip()) == name
    assert tokens.names == {"clinic-a", "clinic-b"}


def test_the_certificates_say_the_same(made: Path, foreign: Path) -> None:
    """What the recipe makes against what the library makes: names, usages, how long."""

    def described(path: Path) -> object:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        days = round((found.not_valid_after_utc - found.not_valid_before_utc).total_seconds() / 86_400)
        usages = {
            extension.oid.dotted_string: (extension.critical, extension.value)
            for extension in found.extensions
            if not isinstance(extension.value, x509.SubjectKeyIdentifier | x509.AuthorityKeyIdentifier)
        }
        return found.version, found.subject, found.issuer, days, len(list(found.extensions)), usages

    for name in ("ca.pem", "server.pem", "clinic-a.pem"):
        assert described(made / name) == described(foreign / name), name


def test_ppdl_keys_goes_on_where_the_recipe_ended(made: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made, tmp_path / "keys"))
    more = make_keys(directory, HOSTS, ["clinic-a", "clinic-c"])
    assert set(more.made) == {"clinic-c.pem", "clinic-c-key.pem", "clinic-c.token", "tokens.txt"}
    assert more.notes == ()
    assert Tokens.read(directory / "tokens.txt").names == {"clinic-a", "clinic-b", "clinic-c"}
    with serving(made) as port:
        assert call(port, made, pair(directory, "clinic-c")) == "clinic-c"


def test_the_example_of_a_token_file_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```\n(# [^`]*)^```", PAGE, re.MULTILINE)
    (tmp_path / "tokens.txt").write_text(example, encoding="utf-8")
    assert Tokens.read(tmp_path / "tokens.txt").names == {"clinic-a", "clinic-b"}
