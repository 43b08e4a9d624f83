"""What all subcommands share: running Hydra, and errors without its wrapping."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_ppdl.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    ParticipantFailedError,
    PPDLError,
    RankZeroFailedError,
    ServerUnavailableError,
)

CONFIG_PATH = "pkg://lightning_ppdl.conf.ppdl"
_FULL_ERROR = "HYDRA_FULL_ERROR"

# Nested groups are written with a slash in Hydra; their keys, which stand in the same place of the
# configuration, with a dot. Either may be used to choose an option.
_NESTED_GROUPS = {"download.criterion": "download/criterion"}

_OPEN = "trainer."
"""Below this key anything may be added: Lightning knows what it takes."""


def run_application(name: str, task: Callable[[DictConfig], None], arguments: Sequence[str]) -> int:
    """Run ``task`` as the Hydra application ``name`` with the command line ``arguments``.

    Returns:
        The exit status: 0, 1 for a failed run, 2 for a configuration that cannot work, 130 for Ctrl-C.
    """
    wants_traceback = bool(os.environ.get(_FULL_ERROR))
    failures: list[Exception] = []

    def guarded(cfg: DictConfig) -> None:
        try:
            # Whole again, now that Hydra has read it: Lightning starts further processes from it.
            with _command_line([name, *arguments]):
                task(cfg)
        except Exception as error:
            # Past Hydra, which would announce a failed job: SystemExit is the one thing it lets through.
            failures.append(error)
            raise SystemExit from error
        except SystemExit as error:
            raise KeyboardInterrupt from error  # what Lightning makes of Ctrl-C, undone

    application = hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=name)(guarded)
    try:
        with _command_line(arguments), _errors_raised():
            application()
    except SystemExit as error:
        if not failures:  # a flag that Hydra does not know, or --help
            return error.code if isinstance(error.code, int) else 0
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(error)
    except ValueError as error:  # what Hydra says of GROUP=null
        failures.append(ConfigurationError(str(error)))
    except KeyboardInterrupt:
        print(f"ppdl {name}: interrupted", file=sys.stderr)
        return 130
    return _report(name, failures[0], arguments, wants_traceback) if failures else 0


def build(config: DictConfig, key: str) -> Any:
    """Make the object that the node at ``key`` describes; None for null and for an empty node.

    Raises:
        ConfigurationError: what its constructor says, with the full key in front.
    """
    node = OmegaConf.select(config, key)
    if node is None or node == {}:
        return None
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigurationError(f"{key}={node!r} is not one of the group's options; see --help")
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        # Of an object within the node Hydra says which, at the end of its own message.
        if inner := re.search(r"\nfull_key: (\S+)$", str(error)):
            key = inner[1]
        if isinstance(cause, PPDLError):
            said = str(cause)
            raise ConfigurationError(said if said.startswith(f"{key}.") else f"{key}.{said}") from error
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
        if unexpected:
            raise ConfigurationError(
                f"{key}.{unexpected[1]}: {node._target_} has no such argument"
            ) from error
        raise ConfigurationError(f"{key}: {cause or error}") from error


def scalar_for_list(arguments: Sequence[str], keys: Sequence[str]) -> str | None:
    """What to say of a setting that is a list and was given one value; Hydra would name its own types."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in keys and value not in ("", "null") and value[0] not in "[$":
            return f"{argument}: this setting is a list; write {key}=[{value}]"
    return None


def quiet_grpc() -> None:
    """Keep gRPC's own lines, which are in no form of ours, off stderr; before it is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def refuse_unknown(config: DictConfig, schema: type, prefix: str = "") -> None:
    """Raise ConfigurationError for a key that ``schema``, a dataclass, lacks.

    Hydra itself lets ``+KEY=VALUE`` add anything, misspelt or not.
    """
    hints = get_type_hints(schema)
    for key in config:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            raise ConfigurationError(
                f"there is no setting {prefix}{key!s}; "
                f"{f'did you mean {prefix}{close[0]}?' if close else '--cfg job shows all of them'}"
            )
        if is_dataclass(hints[key]):
            refuse_unknown(config[key], hints[key], f"{prefix}{key}.")


@contextmanager
def _errors_raised() -> Iterator[None]:
    """Let Hydra raise what it would otherwise print and exit on."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = before


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = [before[0], *(_with_slash(argument) for argument in arguments)]
    try:
        yield
    finally:
        sys.argv = before


def _with_slash(argument: str) -> str:
    key, equals, value = argument.partition("=")
    return f"{_NESTED_GROUPS.get(key, key)}{equals}{value}"


def _report(name: str, error: Exception, arguments: Sequence[str], wants_traceback: bool) -> int:
    if isinstance(error, RankZeroFailedError):
        return 1  # rank zero, a process beside this one, says it
    if isinstance(error, ParticipantFailedError):
        cause = error.__cause__
        if isinstance(cause, ConfigurationError | BudgetExhaustedError):
            error = cause  # what every participant would say, and no failure of one
    expected = isinstance(error, PPDLError | HydraException | OmegaConfBaseException)
    if isinstance(error, ParticipantFailedError):
        traceback.print_exception(error.__cause__)
    elif wants_traceback or not expected:
        traceback.print_exception(error)
    explained = _explain(name, error, arguments) if not isinstance(error, PPDLError) else str(error)
    print(f"ppdl {name}: {explained}", file=sys.stderr)
    return 2 if expected and not isinstance(error, ParticipantFailedError | ServerUnavailableError) else 1


def _explain(name: str, error: BaseException, arguments: Sequence[str]) -> str:
    message = str(error).strip().partition("\nConfig search path:")[0]
    unknown = re.search(r"Could not override '([^']+)'", message)
    if unknown is None:
        unknown = re.search(r"Key '([^']+)' (?:is )?not in", message)
    if unknown:
        key = unknown[1]
        given = next((a for a in arguments if a.lstrip("+~").partition("=")[0] == key), key)
        if key.startswith(_OPEN):
            # Only now: it brings Lightning, which most commands do without.
            from lightning_ppdl.trainer_arguments import trainer_argument_problem

            argument, _, value = given.partition("=")
            parsed = OmegaConf.from_dotlist([f"value={value}"]).value
            return trainer_argument_problem(argument.removeprefix(_OPEN), parsed) or (
                f"{given}: write +{given} to pass a Trainer argument that is not among the settings"
            )
        close = difflib.get_close_matches(key, _known_keys(name, arguments), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "--cfg job shows all of them"
        return f"{given}: there is no setting {key!r}; {hint}"
    parts = [message]
    while error.__cause__ is not None:
        error = error.__cause__
        parts.append(str(error).strip())
    lines = [
        line
        for line in "\n".join(parts).splitlines()
        if not re.match(r"\s*(object_type|reference_type)=", line)
    ]
    return "\n".join(dict.fromkeys(lines))


def _known_keys(name: str, arguments: Sequence[str]) -> list[str]:
    """The keys of the configuration, with the options that the user chose and without other overrides."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_module("lightning_ppdl.conf.ppdl", version_base="1.3"):
        try:
            config = compose(name, [argument for argument in arguments if re.match(r"[\w/]+=\w+$", argument)])
        except HydraException:
            config = compose(name)
    return [*_leaves(OmegaConf.to_container(config), "")]


def _leaves(node: Any, prefix: str) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        yield prefix + key
        yield from _leaves(value, f"{prefix}{key}.")
