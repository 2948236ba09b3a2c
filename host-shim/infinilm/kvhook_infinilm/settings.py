"""Which plugin is to run: from the arguments of `attach()`, InfiniLM's command line, the environment or the model.

The first of these that names a plugin counts, whole: a config from one never goes with a plugin from another. What a
form says is checked by the host; here only what the host does not see is.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import KvhookError

OFF = "none"
"""The plugin's name that switches compression off, also what the model's config names."""

MODEL_KEY = "kv_plugin"
"""The key of a model's `config.json`."""

_ARGUMENTS = "attach()"


class SettingsError(KvhookError):
    """A setting cannot be used; the message says which, what was found and what to do."""


@dataclass(frozen=True)
class Choice:
    """What is to run, and who said so."""

    form: str
    """A `kv_plugin` form as JSON text."""
    source: str
    """`operator` or `model`."""
    where: str
    """`attach()`, `--kv-plugin`, `INFINILM_KV_PLUGIN` or the path of a `config.json`."""


@dataclass(frozen=True)
class _Given:
    """What one of the operator's sources says."""

    where: str
    """How this source names the plugin, in messages."""
    where_config: str
    plugin: str | None = None
    config: str | Mapping | None = None
    folders: tuple[str, ...] = ()
    strict: bool | None = None


_arguments = _Given(_ARGUMENTS, _ARGUMENTS)
_flags = _Given("--kv-plugin", "--kv-plugin-config")


def set_arguments(
    plugin: str | None,
    config: str | Mapping | None,
    folders: Sequence[str] = (),
    strict: bool | None = None,
) -> None:
    """Takes the arguments of `attach()`, in place of those of an earlier call.

    Args:
        plugin: A name, a path, `none`, or a whole `kv_plugin` form as JSON text.
        config: The plugin's config.
        folders: Plugin folders.
        strict: Whether a refusal is an error; None: as the flags or the environment say.

    Raises `SettingsError` for a value of another type.
    """
    global _arguments
    if plugin is not None and not isinstance(plugin, str):
        raise SettingsError(
            f"attach(): `plugin` is {_shown(plugin)}; expected text: a name, a path, `{OFF}`, "
            "or a whole form (`json.dumps(form)`)"
        )
    if config is not None and not isinstance(config, (str, Mapping)):
        raise SettingsError(f"attach(): `config` is {_shown(config)}; expected text or a dict")
    if isinstance(folders, str) or not all(
        isinstance(folder, (str, os.PathLike)) for folder in folders
    ):
        raise SettingsError(f"attach(): `folders` is {_shown(folders)}; expected a list of folders")
    if strict is not None and not isinstance(strict, bool):
        raise SettingsError(f"attach(): `strict` is {_shown(strict)}; expected True, False or None")
    _arguments = _Given(
        _ARGUMENTS, _ARGUMENTS, plugin, config, tuple(map(os.fspath, folders)), strict
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to a parser, InfiniLM's own or another."""
    group = parser.add_argument_group("KV-cache compression (kvhook)")
    group.add_argument(
        "--kv-plugin",
        metavar="PLUGIN",
        help=f"name or path of a plugin, a whole kv_plugin form as JSON, or `{OFF}`",
    )
    group.add_argument("--kv-plugin-config", metavar="CONFIG", help="the plugin's own config")
    group.add_argument(
        "--kv-plugin-path",
        metavar="FOLDER",
        action="append",
        help="folder in which plugins are looked up and allowed, repeatable",
    )
    group.add_argument(
        "--kv-plugin-strict",
        action="store_true",
        default=None,
        help="do not start when the plugin cannot run (without: start uncompressed)",
    )


def set_flags(namespace: argparse.Namespace) -> None:
    """Takes the values of the flags that `add_flags` added, in place of earlier ones."""
    global _flags
    _flags = _Given(
        "--kv-plugin",
        "--kv-plugin-config",
        getattr(namespace, "kv_plugin", None),
        getattr(namespace, "kv_plugin_config", None),
        tuple(getattr(namespace, "kv_plugin_path", None) or ()),
        getattr(namespace, "kv_plugin_strict", None),
    )


def choose(model_config: Mapping, model_path: str) -> Choice | None:
    """What is to run for a model; None: nothing.

    Args:
        model_config: The model's `config.json`.
        model_path: The model's folder, for messages.

    Raises `SettingsError`.
    """
    for given in _sources():
        if given.plugin is None and given.config is None:
            continue
        if given.plugin is None:
            raise SettingsError(_without_plugin(given))
        return _operator_choice(given)
    return _model_choice(model_config.get(MODEL_KEY), os.path.join(model_path, "config.json"))


def folders() -> list[str]:
    """The operator's plugin folders: those of `attach()`, of the flags, of the environment."""
    found = [os.path.abspath(folder) for given in _sources() for folder in given.folders if folder]
    return list(dict.fromkeys(found))


def strict() -> bool:
    """Whether a refusal is an error. The first source that says anything counts."""
    said = [given.strict for given in _sources() if given.strict is not None]
    return said[0] if said else False


def _sources() -> tuple[_Given, ...]:
    return _arguments, _flags, _environment()


def _environment() -> _Given:
    """The environment as it is now. A variable that is empty is not set."""

    def value(name: str) -> str | None:
        return os.environ.get(name) or None

    strict = value("INFINILM_KV_PLUGIN_STRICT")
    return _Given(
        "INFINILM_KV_PLUGIN",
        "INFINILM_KV_PLUGIN_CONFIG",
        value("INFINILM_KV_PLUGIN"),
        value("INFINILM_KV_PLUGIN_CONFIG"),
        tuple((value("INFINILM_KV_PLUGIN_PATH") or "").split(os.pathsep)),
        None if strict is None else strict.lower() not in ("0", "false", "no", "off"),
    )


def _operator_choice(given: _Given) -> Choice | None:
    plugin, config = given.plugin.strip(), given.config
    # Switching off takes one change: a config may stay.
    if plugin == OFF:
        return None
    if not plugin:
        raise SettingsError(
            f"{given.where}: the plugin's name is empty; give a name, a path or `{OFF}`"
        )
    if plugin.startswith("{"):
        if config is not None:
            raise SettingsError(
                f"{given.where} is a whole form, and {given.where_config} gives a config beside it; "
                'put it into the form: {"plugin": ..., "config": ...}'
            )
        return Choice(plugin, "operator", given.where)
    form = {"plugin": plugin} if config is None else {"plugin": plugin, "config": config}
    return Choice(_json(form, given.where_config), "operator", given.where)


def _model_choice(value, where: str) -> Choice | None:
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, list):
        value = {"arms": value}
    if not isinstance(value, Mapping):
        raise SettingsError(
            f"{where}: `{MODEL_KEY}` is {_shown(value)}; expected an object, as in "
            '{"plugin": "truncate", "config": "keep=0.25"}, or a list of arms'
        )
    return Choice(_json(value, where), "model", where)


def _without_plugin(given: _Given) -> str:
    if given.where == _ARGUMENTS:
        return "attach(): `config` is given without `plugin`; name the plugin that it is for"
    return (
        f"{given.where_config} is given without {given.where}; name the plugin that it is for "
        "in the same way"
    )


def _json(form: Mapping, where: str) -> str:
    try:
        return json.dumps(form, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"{where}: the config cannot be written as JSON ({error}); "
            "use text, numbers, true, false, null, lists and objects"
        ) from error


def _plain(value):
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value is of type {type(value).__name__}")


def _shown(value) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
