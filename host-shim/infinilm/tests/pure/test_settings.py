"""Config forms, their sources, and which of them counts."""

import argparse
import json
import os

import pytest

from kvhook_infinilm import settings
from kvhook_infinilm.settings import Choice, SettingsError

MODEL = {"kv_plugin": {"plugin": "noop"}}
VARIABLES = ("", "_CONFIG", "_PATH", "_STRICT")


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(f"INFINILM_KV_PLUGIN{variable}", raising=False)
    monkeypatch.setattr(settings, "_arguments", settings._arguments)
    monkeypatch.setattr(settings, "_flags", settings._flags)
    settings.set_arguments(None, None)
    flags()


def flags(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-cache-dtype")
    settings.add_flags(parser)
    settings.set_flags(parser.parse_args(arguments))


def choose(config=None):
    return settings.choose({} if config is None else config, "/models/m")


def chosen(config=None):
    choice = choose(config)
    return json.loads(choice.form), choice.source, choice.where


def test_nothing_configured_is_off():
    assert choose() is None
    assert choose({"kv_plugin": None}) is None
    assert choose({"kv_plugin": {}}) is None
    assert choose({"kv_plugin": []}) is None


def test_the_models_config_is_passed_whole_and_is_the_models():
    form = {"plugin": "truncate", "config": {"keep": 0.25}, "min_tokens": 512, "layers": "0-3"}
    assert chosen({"kv_plugin": form, "hidden_size": 8}) == (form, "model", "/models/m/config.json")
    text = {"plugin": "truncate", "config": "keep=0.25,recent=64"}
    assert chosen({"kv_plugin": text})[0] == text


def test_the_models_arms_as_a_form_and_as_a_list():
    arms = [
        {"name": "a", "plugin": "noop"},
        {"name": "b", "plugin": "truncate", "config": "keep=0.5"},
    ]
    assert chosen({"kv_plugin": {"arms": arms, "min_tokens": 9}})[0] == {
        "arms": arms,
        "min_tokens": 9,
    }
    assert chosen({"kv_plugin": arms}) == ({"arms": arms}, "model", "/models/m/config.json")


@pytest.mark.parametrize("value", ["truncate", 7, True])
def test_a_models_value_of_another_type_names_file_key_value_and_form(value):
    with pytest.raises(SettingsError) as error:
        choose({"kv_plugin": value})
    for part in ("/models/m/config.json", "`kv_plugin`", repr(value), '{"plugin": "truncate"'):
        assert part in str(error.value)


def test_arguments_of_attach():
    settings.set_arguments("truncate", "keep=0.5")
    form = {"plugin": "truncate", "config": "keep=0.5"}
    assert chosen() == (form, "operator", "attach()")
    settings.set_arguments("truncate", {"keep": 0.5, "layers": {"0-3": 1.0}})
    assert chosen()[0]["config"] == {"keep": 0.5, "layers": {"0-3": 1.0}}
    settings.set_arguments("/plugins/libmine.so", None)
    assert chosen()[0] == {"plugin": "/plugins/libmine.so"}


def test_flags():
    flags("--kv-plugin", "truncate", "--kv-plugin-config", "keep=0.5")
    form = {"plugin": "truncate", "config": "keep=0.5"}
    assert chosen() == (form, "operator", "--kv-plugin")


def test_environment(monkeypatch):
    monkeypatch.setenv("INFINILM_KV_PLUGIN", "truncate")
    monkeypatch.setenv("INFINILM_KV_PLUGIN_CONFIG", '{"keep": 0.5}')
    form = {"plugin": "truncate", "config": '{"keep": 0.5}'}
    assert chosen() == (form, "operator", "INFINILM_KV_PLUGIN")


def test_an_empty_variable_is_not_set(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(f"INFINILM_KV_PLUGIN{variable}", "")
    assert choose() is None
    assert chosen(MODEL)[1] == "model"
    assert settings.folders() == []
    assert not settings.strict()


def test_precedence(monkeypatch):
    assert chosen(MODEL)[2] == "/models/m/config.json"
    monkeypatch.setenv("INFINILM_KV_PLUGIN", "by_env")
    assert chosen(MODEL)[0] == {"plugin": "by_env"}
    flags("--kv-plugin", "by_flag")
    assert chosen(MODEL)[0] == {"plugin": "by_flag"}
    settings.set_arguments("by_argument", None)
    assert chosen(MODEL)[0] == {"plugin": "by_argument"}
    settings.set_arguments(None, None)
    assert chosen(MODEL)[0] == {"plugin": "by_flag"}


def test_a_config_never_goes_with_a_plugin_of_another_source(monkeypatch):
    monkeypatch.setenv("INFINILM_KV_PLUGIN_CONFIG", "keep=0.1")
    flags("--kv-plugin", "truncate")
    assert chosen()[0] == {"plugin": "truncate"}


@pytest.mark.parametrize("source", ["argument", "flag", "variable"])
def test_none_switches_off_what_the_others_name(source, monkeypatch):
    if source != "variable":
        monkeypatch.setenv("INFINILM_KV_PLUGIN", "noop")
    if source == "argument":
        settings.set_arguments("none", "keep=0.5")
    elif source == "flag":
        flags("--kv-plugin", "none", "--kv-plugin-config", "keep=0.5")
    else:
        monkeypatch.setenv("INFINILM_KV_PLUGIN", "none")
    assert choose(MODEL) is None


def test_a_config_without_a_plugin_names_both(monkeypatch):
    monkeypatch.setenv("INFINILM_KV_PLUGIN_CONFIG", "keep=0.5")
    with pytest.raises(
        SettingsError, match="INFINILM_KV_PLUGIN_CONFIG .* without INFINILM_KV_PLUGIN;"
    ):
        choose(MODEL)
    flags("--kv-plugin-config", "keep=0.5")
    with pytest.raises(SettingsError, match="--kv-plugin-config .* without --kv-plugin;"):
        choose(MODEL)
    settings.set_arguments(None, {"keep": 0.5})
    with pytest.raises(SettingsError, match=r"attach\(\): `config` .* without `plugin`"):
        choose(MODEL)


def test_a_plugin_that_is_a_whole_form_is_passed_as_it_is():
    form = ' {"arms": [{"name": "a", "plugin": "noop"}]}'
    flags("--kv-plugin", form)
    assert choose() == Choice(form.strip(), "operator", "--kv-plugin")


def test_a_whole_form_with_a_config_beside_it_is_refused():
    flags("--kv-plugin", '{"plugin": "truncate"}', "--kv-plugin-config", "keep=0.5")
    with pytest.raises(SettingsError, match="--kv-plugin is a whole form, and --kv-plugin-config"):
        choose()


def test_an_empty_plugin_is_refused():
    flags("--kv-plugin", "  ")
    with pytest.raises(SettingsError, match="--kv-plugin: the plugin's name is empty"):
        choose()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plugin": {"plugin": "noop"}}, "`plugin` is {'plugin': 'noop'} .dict.*json.dumps"),
        ({"plugin": "noop", "config": 3}, "`config` is 3 .int.; expected text or a dict"),
        ({"plugin": "noop", "folders": "/plugins"}, "`folders` is '/plugins' .str.*list"),
        ({"plugin": "noop", "folders": [1]}, "`folders` is .1. .list."),
        ({"plugin": "noop", "strict": "yes"}, "`strict` is 'yes' .str.*True"),
    ],
)
def test_arguments_of_wrong_types_are_named(arguments, message):
    with pytest.raises(SettingsError, match=message):
        settings.set_arguments(arguments.pop("plugin"), arguments.pop("config", None), **arguments)
    assert choose() is None, "what is refused is not taken"


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_a_config_that_is_no_json_is_refused(value):
    settings.set_arguments("truncate", {"keep": value})
    with pytest.raises(SettingsError, match=r"attach\(\): the config cannot be written as JSON"):
        choose()


def test_folders_of_all_sources_in_order_each_once(monkeypatch):
    monkeypatch.setenv("INFINILM_KV_PLUGIN_PATH", os.pathsep.join(["/c", "/a", ""]))
    flags("--kv-plugin-path", "/b", "--kv-plugin-path", "here")
    settings.set_arguments(None, None, folders=["/a"])
    assert settings.folders() == ["/a", "/b", os.path.abspath("here"), "/c"]


def test_strict_the_first_source_that_says_it_counts(monkeypatch):
    assert settings.strict() is False
    monkeypatch.setenv("INFINILM_KV_PLUGIN_STRICT", "1")
    assert settings.strict() is True
    settings.set_arguments(None, None, strict=False)
    assert settings.strict() is False
    monkeypatch.setenv("INFINILM_KV_PLUGIN_STRICT", "0")
    settings.set_arguments(None, None)
    assert settings.strict() is False
    flags("--kv-plugin-strict")
    assert settings.strict() is True


def test_flags_stand_in_the_parsers_help_and_leave_others_alone():
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    for flag in ("--kv-plugin ", "--kv-plugin-config", "--kv-plugin-path", "--kv-plugin-strict"):
        assert flag in parser.format_help()
    settings.set_flags(argparse.Namespace(model="m"))
    assert choose() is None
