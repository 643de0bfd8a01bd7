"""The one description of settings against what they describe: the sampler's config, requests, commands, the client."""

import dataclasses
import inspect

import pytest

from maskgit.apps.cli.flags import Sampler
from maskgit.apps.client import calls
from maskgit.apps.client.calls import Making
from maskgit.apps.serving import schemas
from maskgit.apps.serving.schemas import Generate, Sampled
from maskgit.apps.settings import SETTINGS
from maskgit.errors import ConfigError
from maskgit.sampler.config import SamplerConfig

NAMES = [field.name for field in dataclasses.fields(SamplerConfig)]


def test_everybody_has_all_settings_of_the_sampler():
    assert set(NAMES) <= SETTINGS.keys()
    assert set(NAMES) <= {field.name for field in dataclasses.fields(Sampler)}
    assert set(NAMES) <= Sampled.model_fields.keys()
    assert set(NAMES) <= Making.__annotations__.keys()


@pytest.mark.parametrize("name", [name for name in NAMES if SETTINGS[name].low is not None])
def test_ranges_are_the_samplers_own(name):
    low, high = SETTINGS[name].low, SETTINGS[name].high
    for value in (low, high):
        SamplerConfig(**{name: value})
        Generate.model_validate({"class": 1, name: value})
    for value in (low - 1, 2 * high):
        with pytest.raises(ConfigError, match=name):
            SamplerConfig(**{name: value})
        with pytest.raises(ValueError, match=name):
            Generate.model_validate({"class": 1, name: value})


def test_requests_say_what_the_settings_do():
    described = Generate.model_json_schema()["properties"]
    for name in (*NAMES, "num_images", "seed", "first_index", "priority"):
        assert described[name]["description"] == SETTINGS[name].help


@pytest.mark.parametrize("name", ["edit", "inpaint", "outpaint", "reconstruct", "detokenize"])
def test_the_client_has_the_server_s_defaults(name):
    fields = getattr(schemas, name.capitalize()).model_fields
    for argument, parameter in inspect.signature(getattr(calls, name)).parameters.items():
        if parameter.default is not parameter.empty:
            assert parameter.default == fields[{"label": "class_"}.get(argument, argument)].default, argument
