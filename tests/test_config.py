"""The configuration: every shipped file loads, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import Config
from pipeline.models import builtin
from pipeline.models.hub import HUB_ID
from pipeline.models.names import presets
from storage.errors import ConfigError

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_configuration_loads(file: Path) -> None:
    config = Config.load(file)
    assert config.model.checkpoint
    assert file.read_text().startswith("# "), "says why it is as it is"


def test_every_promised_preset_is_shipped() -> None:
    opt = {f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b")}
    falcon = {f"falcon-{size}" for size in ("rw-1b", "7b", "7b-instruct", "40b")}
    llama = {f"llama-{size}-instruct" for size in ("3.2-1b", "3.2-3b", "3.1-8b")}
    smollm = {*(f"smollm2-{size}-instruct" for size in ("135m", "360m", "1.7b")), "smollm3-3b"}
    qwen2 = {f"qwen2.5-{size}-instruct" for size in ("0.5b", "1.5b", "3b", "7b")}
    qwen3 = {f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b")}
    gemma = {f"gemma-3-{size}-it" for size in ("270m", "1b", "4b")}
    granite = {f"granite-3.3-{size}" for size in ("2b", "8b")}
    single = {"mistral-7b-instruct", "phi-4-mini", "olmo-2-7b"}
    families = {*opt, *falcon, *llama, *smollm, *qwen2, *qwen3, *gemma, *granite, *single}
    assert set(presets()) == {"builtin", "builtin-moe", *families}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_configuration_names_a_model(file: Path) -> None:
    checkpoint = Config.load(file).model.checkpoint
    assert checkpoint in {builtin.NAME, builtin.MIXTURE} or HUB_ID.fullmatch(checkpoint)


def test_settings_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    preset, file = tmp_path / "preset.toml", tmp_path / "file.toml"
    preset.write_text("[cache]\nwindow = 3\nshare = 0.5\n[prefetcher]\nreaders = 7\n")
    file.write_text("[cache]\nwindow = 4\nslots_per_layer = 9\n")
    config = Config.load(file, ["cache.slots_per_layer=10"], preset=preset)
    assert (config.cache.window, config.cache.share, config.cache.slots_per_layer) == (4, 0.5, 10)
    assert config.prefetcher.readers == 7


def test_the_environment_names_the_device_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHRING_DEVICE", "torch-cpu")
    assert Config().compute.device == Config.parse({"compute": {"threads": 1}}).compute.device == "torch-cpu"
    assert Config.load(None, ["compute.device=cpu"]).compute.device == "cpu"
    assert Config.parse({"compute": {"device": "cuda"}}).compute.device == "cuda"
    for data in ({}, {"compute": {"threads": 1}}):
        monkeypatch.setenv("FLASHRING_DEVICE", "tpu")
        with pytest.raises(
            ConfigError, match=r"compute\.device by the environment variable FLASHRING_DEVICE:"
        ):
            Config.parse(data)
        monkeypatch.setenv("FLASHRING_DEVICE", "")
        assert Config.parse(data).compute.device == "cpu"


def test_what_a_configuration_changes_makes_it_again() -> None:
    settings = [
        "predictor.refine=false",
        "predictor.pinned_layers=[0, -1]",
        "cache.share=0.5",
        "model.store=x",
    ]
    config = Config.load(None, [*settings, "prefetcher.readers=1"])
    changes = config.changes("predictor", "cache", "prefetcher")
    assert changes == ("predictor.refine=false", "predictor.pinned_layers=[0, -1]", "cache.share=0.5")
    assert Config.load(None, [*changes, "model.store=x"]) == config


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("cache.windw=3", "unknown configuration key cache.windw; did you mean cache.window?"),
        ("cashe.window=3", "unknown configuration key cashe; did you mean cache?"),
        ("cache=3", "--set takes section.key=value, not 'cache=3'"),
        ("cache.window", "--set takes section.key=value, not 'cache.window'"),
    ],
)
def test_a_bad_setting_is_named(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.load(None, [setting])
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("cache.share=2", "cache.share"),
        ("predictor.kind=best", "predictor.kind"),
        ("prefetcher.readers=0", "prefetcher.readers"),
        ("compute.context=many", "compute.context"),
        ("compute.threads=99999999999999999999", "compute.threads"),
        ("compute.audit=99999999999999999999", "compute.audit"),
        ("prefetcher.staging=99999999999999999999", "prefetcher.staging"),
        ("cache.slots_per_layer=99999999999999999999", "cache.slots_per_layer"),
        ("cache.window=5\nkeep=false", "cache.window"),  # one key a setting
        (f"predictor.pinned_layers=[{'9' * 5000}]", "predictor.pinned_layers"),
    ],
)
def test_a_value_out_of_range_names_its_key(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^configuration key {words}: .*got") as error:
        Config.load(None, [setting])
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[cache\n", "is not valid TOML"),
        ("window = 3\n", "sets window outside a section"),
        ("[cache]\nwindw = 3\n", "did you mean cache.window"),
        (f"[cache]\nwindow = {'9' * 5000}\n", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Config.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        Config.load(tmp_path / "none.toml")


def test_the_tree_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.cache.window = 3  # type: ignore[misc]
    assert config.replace(cache={"window": 3}).cache.window == 3
    assert config.cache.window == 0


def test_values_that_are_not_toml_are_strings() -> None:
    assert Config.load(None, ["memory.budget=50%"]).memory.budget == "50%"
    assert Config.load(None, ["predictor.pinned_layers=[0, -1]"]).predictor.pinned_layers == (0, -1)


def test_plain_values_come_last_and_none_says_nothing(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[sampling]\ntemperature = 0.3\ntop_k = 5\n[memory]\nbudget = '1GiB'\n")
    values = {
        "memory": {"budget": "50%"},
        "sampling": {"temperature": 0.9, "top_k": None},
        "compute": {"context": None},
    }
    config = Config.load(file, ["sampling.temperature=0.6", "sampling.top_p=0.5"], values=values)
    assert config.memory.budget == "50%"
    assert (config.sampling.temperature, config.sampling.top_k, config.sampling.top_p) == (0.9, 5, 0.5)
    assert config.compute.context == 0
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        Config.load(None, values={"sampling": {"temperature": -1.0}})
