"""Keys for trying out TLS: a demo certificate authority, certificates and tokens. ECDSA on P-256."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ppdl.errors import ConfigurationError
from lightning_ppdl.keyfiles import KeyFiles, require_stems
from lightning_ppdl.validation import require_count

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise ConfigurationError(
        "making keys needs the package cryptography: pip install 'lightning_ppdl[network]'"
    ) from error

_AUTHORITY_DAYS = 3650  # long enough to add participants for years
_DAYS = 3650
_HOST = re.compile(r"(?![\d.]+$)(\*\.)?[\w-]+(\.[\w-]+)*", re.ASCII)
_SKEW = datetime.timedelta(hours=1)  # by how much a participant's clock may be slow


@dataclass(frozen=True)
class Keys:
    """What :func:`make_keys` did: names of files in ``directory``, and what to know about those it kept."""

    directory: Path
    made: tuple[str, ...]
    kept: tuple[str, ...]
    notes: tuple[str, ...]


def make_keys(
    directory: str | Path, hosts: Sequence[str], participants: Sequence[str] = (), days: int = 365
) -> Keys:
    """Make the keys of a collaboration in ``directory``: those that are missing there.

    ======================================== ==================================================
    ``ca.pem``, ``ca-key.pem``               the authority, which signs the others; ten years
    ``server.pem``, ``server-key.pem``       for ``hosts``; only for a server's end of a connection
    ``NAME.pem``, ``NAME-key.pem``           common name NAME; only for a client's end
    ``NAME.token``, ``tokens.txt``           a bearer token, and the hashes of all tokens
    ======================================== ==================================================

    A file that is there is never replaced; ``tokens.txt`` gets lines at its end. If anything fails, what was
    made until then is removed again. Keys, tokens and ``tokens.txt`` are readable by their owner alone.

    Args:
        directory: Made, readable by its owner alone, if only its parent is there.
        hosts: Names and IP addresses of the server, as participants write them in its address.
        participants: Their names, which become names of files.
        days: How long the certificates are valid; at most as long as the authority's is.

    Raises:
        ConfigurationError: for an argument that cannot work, and for files that don't belong together.
    """
    names = require_stems(participants)
    addresses = [_address(host) for host in hosts]
    if not addresses:
        raise ConfigurationError(
            "hosts=[] leaves the server without a name: give those that participants write in its address, "
            "e.g. hosts=[localhost,127.0.0.1]"
        )
    if require_count("days", days) > _DAYS:
        raise ConfigurationError(f"days={days!r} must be at most {_DAYS}")
    files = KeyFiles(Path(directory))
    authority = _authority(files)
    server = authority.issue(files, "server", "ppdl server", days, addresses)
    if server is not None:
        _compare_hosts(files, server, addresses)
    for name in names:
        authority.issue(files, name, name, days)
    files.add_tokens(names)
    files.write()
    return Keys(files.directory, tuple(files.made), tuple(files.kept), tuple(files.notes))


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    now: datetime.datetime

    def issue(
        self,
        files: KeyFiles,
        stem: str,
        common_name: str,
        days: int,
        hosts: Sequence[x509.GeneralName] = (),
    ) -> x509.Certificate | None:
        """Add a key and its certificate, a server's if it has ``hosts``; the certificate there is, if any."""
        if files.keeps(f"{stem}.pem"):
            files.keeps(f"{stem}-key.pem")  # or it was handed over
            return self._check(files, f"{stem}.pem")
        if files.keeps(f"{stem}-key.pem"):
            raise ConfigurationError(
                f"{files.directory / stem}-key.pem has no {stem}.pem beside it: move the key away to have "
                f"both made anew, or put its certificate back"
            )
        end = self.now + datetime.timedelta(days=days)
        if end > self.certificate.not_valid_after_utc:
            end = self.certificate.not_valid_after_utc
            files.notes.append(f"{stem}.pem is valid until {end:%Y-%m-%d}, when ca.pem ends")
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(common_name, self.certificate.subject, key, self.now, end)
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            # Each for its own end only: no participant can pass for the server.
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        _add_pair(files, stem, key, builder.sign(self.key, hashes.SHA256()))
        return None

    def _check(self, files: KeyFiles, name: str) -> x509.Certificate:
        try:
            found = x509.load_pem_x509_certificate(files.read(name))
            found.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ConfigurationError(
                f"{files.directory / name} is no certificate of the authority in ca.pem: move it and its key "
                f"away to have them made anew, or use another directory"
            ) from error
        if found.not_valid_after_utc <= self.now:
            files.notes.append(
                f"{name} ended on {found.not_valid_after_utc:%Y-%m-%d}: move it and its key away, and run "
                f"this again, to have them made anew"
            )
        return found


def _authority(files: KeyFiles) -> _Authority:
    has_certificate, has_key = files.keeps("ca.pem"), files.keeps("ca-key.pem")
    now = _now()
    if not has_certificate and not has_key:
        key = ec.generate_private_key(ec.SECP256R1())
        end = now + datetime.timedelta(days=_AUTHORITY_DAYS)
        builder = _builder("ppdl demo CA", None, key, now, end)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        _add_pair(files, "ca", key, certificate)
        return _Authority(certificate, key, now)
    if not (has_certificate and has_key):
        missing = "ca-key.pem" if has_certificate else "ca.pem"
        raise ConfigurationError(
            f"{files.directory / missing} is missing beside its other half, and nothing can be signed "
            f"without it: put it back, or use another directory"
        )
    try:
        certificate = x509.load_pem_x509_certificate(files.read("ca.pem"))
        loaded = serialization.load_pem_private_key(files.read("ca-key.pem"), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{files.directory}: ca.pem or ca-key.pem is damaged or locked by a password ({error}): put the "
            f"right ones there, or use another directory"
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or certificate.public_key() != loaded.public_key():
        raise ConfigurationError(
            f"{files.directory}: ca-key.pem is not the ECDSA key of ca.pem: put the right ones there, or use "
            f"another directory"
        )
    if certificate.not_valid_after_utc <= now:
        raise ConfigurationError(
            f"{files.directory / 'ca.pem'} ended on {certificate.not_valid_after_utc:%Y-%m-%d}: make new "
            f"keys for all in another directory"
        )
    return _Authority(certificate, loaded, now)


def _builder(
    common_name: str,
    issuer: x509.Name | None,
    key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    """What all certificates have; signed by themselves without an ``issuer``."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _add_pair(files: KeyFiles, stem: str, key: ec.EllipticCurvePrivateKey, signed: x509.Certificate) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files.add(f"{stem}-key.pem", pem, secret=True)
    files.add(f"{stem}.pem", signed.public_bytes(serialization.Encoding.PEM), secret=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _address(host: str) -> x509.GeneralName:
    """As it stands in the server's certificate."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if len(host) > 253 or not _HOST.fullmatch(host):
            raise ConfigurationError(
                f"hosts=[{host}]: {host!r} is no name or IP address of a machine: give it without scheme and "
                f"port, in ASCII letters, e.g. hosts=[ppdl.example.org,10.0.0.7]"
            ) from None
        return x509.DNSName(host)
    if address.is_unspecified:
        raise ConfigurationError(
            f"hosts=[{host}] is where a server listens, no address that participants can reach: give theirs, "
            f"e.g. hosts=[localhost,127.0.0.1]"
        )
    return x509.IPAddress(address)


def _compare_hosts(files: KeyFiles, server: x509.Certificate, hosts: Sequence[x509.GeneralName]) -> None:
    """Note what the server's certificate, which is kept, lacks."""
    try:
        known = list(server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        known = []
    missing = ", ".join(str(host.value) for host in hosts if host not in known)
    if missing:
        files.notes.append(
            f"server.pem, which was there, is not for {missing}: move it and server-key.pem away, and run "
            f"this again, to have it made anew"
        )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
