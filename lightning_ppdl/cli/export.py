"""``ppdl export``: the shared parameters of a running server, as a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from lightning_ppdl import __version__, config
from lightning_ppdl.cli.application import refuse_unknown, run_application
from lightning_ppdl.cli.remote import answer_of, make_backend, with_keys
from lightning_ppdl.errors import ConfigurationError, JoinRefusedError, ServerFailedError

_ORIGIN = "the first shared parameters and the participants' releases, nothing else"


def run(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    config.register()
    return run_application("export", _task, with_keys(arguments, ["server", "file"]))


def _task(cfg: DictConfig) -> None:
    refuse_unknown(cfg, config.ExportConfig)
    if not cfg.file:
        raise ConfigurationError("give the file to write: ppdl export grpc://HOST:PORT model.safetensors")
    backend = make_backend(cfg, "ppdl export")
    from lightning_ppdl import wire
    from lightning_ppdl.tensorfile import require_writable, write_vector

    require_writable(cfg.file, cfg.overwrite)  # before anything is fetched
    # Only whether it answers is a matter of seconds: a large vector takes its time.
    answer_of(backend.status, backend)
    try:
        manifest, message = backend.export()
    except JoinRefusedError as error:
        raise ConfigurationError(
            f"{backend.url!r} has no parameters yet; export them once the first participant has joined"
        ) from error
    download = wire.decode_download(message, manifest.size)
    if download.indices is not None:
        raise ServerFailedError(f"{backend.url!r} sent {len(download.values)} of {manifest.size} parameters")
    metadata = {
        "producer": f"lightning_ppdl {__version__}",
        "version": str(download.version),
        "fingerprint": manifest.fingerprint,
        "quantity": manifest.quantity,
        "built_from": _ORIGIN,
    }
    write_vector(cfg.file, download.values, manifest.parameters, metadata, cfg.overwrite)
    print(
        f"{cfg.file}: version {download.version}, {manifest.size:,} parameters in "
        f"{len(manifest.parameters)} tensors\n"
        f"Built from {_ORIGIN}. So it is as private as they are: see docs/privacy.md."
    )
