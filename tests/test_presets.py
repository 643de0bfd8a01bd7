"""Presets and tables in files, and the flags that read them."""

import json

import pytest

from maskgit.apps.cli.flags import Sampler
from maskgit.errors import ConfigError, OutputError
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.presets import read_preset, read_tables, write_preset


def test_a_preset_goes_to_a_file_and_back(tmp_path):
    settings = {"steps": 12, "policy": "remdm", "policy_options": {"eta": 0.1}, "guidance_scale": 2.5}
    path = write_preset(tmp_path / "quick.json", settings, about={"model": "cifar10"})
    assert read_preset(path) == settings
    assert json.loads(path.read_text())["name"] == "quick"
    with pytest.raises(OutputError, match="is there already"):
        write_preset(path, settings)
    write_preset(path, {"steps": 3}, overwrite=True)
    assert read_preset(path) == {"steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"stepz": 3}', "Did you mean 'steps'"),
        ('{"sampler": {"steps": 0}}', "steps must be between"),
        ("x" * (2**20 + 1), "is larger than"),
    ],
)
def test_a_wrong_preset_is_told(tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_preset(path)


def test_a_missing_preset_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_preset(tmp_path / "none.json")


def test_tables_fix_the_number_of_steps(tmp_path):
    path = tmp_path / "t.json"
    path.write_text('{"mask_ratio": [0.9, 0.5, 0], "temperature": [1, 1, 0.5]}')
    tables = StepTables(mask_ratio=(0.9, 0.5, 0), temperature=(1, 1, 0.5))
    assert read_tables(path) == tables
    assert Sampler(tables=path).given() == {"tables": tables, "steps": 3}
    path.write_text('{"mask_ratio": [0.9, 0.5, 0], "temperature": [1]}')
    with pytest.raises(ConfigError, match="has 1 values, but there are 3 steps"):
        read_tables(path)


def test_flags_win_over_a_preset(tmp_path):
    path = write_preset(
        tmp_path / "p.json",
        {"steps": 12, "policy": "remdm", "policy_options": {"eta": 0.1}, "temperature": 0.9},
    )
    assert Sampler(preset=path, steps=5).given()["steps"] == 5
    other = Sampler(preset=path, policy="halton").given()
    assert other == {"steps": 12, "policy": "halton", "temperature": 0.9}


def test_policy_options_are_read_as_values():
    given = Sampler(policy="remdm", policy_options=("eta=0.2", "form=cap")).given()
    assert given["policy_options"] == {"eta": 0.2, "form": "cap"}
    assert Sampler(policy="halton", policy_options=("roll=false",)).given()["policy_options"] == {
        "roll": False
    }
    for wrong in ("eta", "=1"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            Sampler(policy_options=(wrong,)).given()


def test_zero_is_a_setting():
    assert Sampler(temperature=0.0, guidance_scale=0.0).given() == {"temperature": 0, "guidance_scale": 0}


def test_every_setting_has_a_flag():
    flags = set(Sampler.__dataclass_fields__) - {"preset"}
    assert flags == set(SamplerConfig.__dataclass_fields__)


# Each changes the images of the tiny model, with the settings that it needs beside it.
@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ({"steps": 3}, {}),
        ({"policy": "random"}, {}),
        ({"policy_options": {"roll": False}}, {"policy": "halton"}),
        ({"mask_schedule": "square"}, {}),
        ({"temperature": 0.5}, {}),
        ({"temperature_schedule": "linear"}, {}),
        ({"choice_temperature": 40.0}, {}),
        ({"choice_schedule": "constant"}, {}),
        ({"guidance_scale": 9.0}, {"force_guidance": True}),
        ({"guidance_schedule": "linear"}, {"force_guidance": True, "guidance_scale": 9.0}),
        ({"tables": StepTables(mask_ratio=(0.9, 0.8, 0.7, 0.6, 0.0))}, {}),
    ],
)
def test_every_setting_changes_the_output(tiny, settings, beside):
    common = {"steps": 5, "seed": 1, "num_images": 2} | beside
    before = tiny.generate(3, **common).tokens
    assert not (tiny.generate(3, **(common | settings)).tokens == before).all()


def test_a_policy_brings_its_schedule(tiny):
    assert tiny.sampler_config(policy="halton").mask_schedule == "arccos"
    assert tiny.sampler_config(policy="halton", mask_schedule="cosine").mask_schedule == "cosine"
    assert tiny.sampler_config(policy="random").mask_schedule == "cosine"


def test_guidance_can_be_forced(tiny):
    with pytest.raises(ConfigError, match="never saw a masked class"):
        tiny.sampler_config(guidance_scale=2.0)
    with pytest.raises(ConfigError, match="never saw a masked class"):
        tiny.sampler_config(steps=2, tables=StepTables(guidance_scale=(1.0, 2.0)))
    assert tiny.sampler_config(guidance_scale=2.0, force_guidance=True).guidance_scale == 2


def test_a_file_of_tables_that_is_broken_is_named_once(tmp_path):
    path = tmp_path / "tables.json"
    path.write_text("{nope")
    with pytest.raises(ConfigError) as told:
        read_tables(path)
    assert str(told.value).count("tables.json") == 1


def test_a_policy_of_another_type_is_told(tiny):
    with pytest.raises(ConfigError, match="policy must be of type str"):
        tiny.sampler_config(policy=["halton"])
