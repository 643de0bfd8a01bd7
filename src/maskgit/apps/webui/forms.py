"""The fields of the page's forms that set how tokens are decoded, and those that say what is made."""

import dataclasses
import inspect
import json
import secrets
from typing import Any

import gradio as gr

from maskgit.apps.cli.flags import Sampler
from maskgit.apps.settings import SETTINGS
from maskgit.apps.webui.session import GUESS, MAX_IMAGES, PRIVATE, Label, Studio, Values, whole
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.policies import POLICIES
from maskgit.sampler.schedules import MASK_SCHEDULES

MAX_SEED, MAX_INDEX = SETTINGS["seed"].high, SETTINGS["first_index"].high
# Where sliders end; a larger value in an image's settings extends them.
MAX_STEPS, MAX_GUIDANCE, MAX_TEMPERATURE, MAX_CHOICE = 64, 10.0, 2.0, 20.0


class SamplerForm:
    """Fields for the sampler's settings; those that have no field are kept as they are."""

    def __init__(self, studio: Studio, *, name: str = "", config: SamplerConfig | None = None) -> None:
        """Make the fields in the present place of the page.

        Args:
            studio: whose model is set.
            name: tells several forms apart.
            config: what the fields begin with; None is the model's own.
        """
        self.studio = studio
        own = studio.pipe.config.sampler
        said = f"{name}: " if name else ""
        begun = _fields(config or own)
        self.kept = gr.State(**begun["kept"])
        self.steps = gr.Slider(step=1, label=f"{said}Steps", **begun["steps"])
        self.guidance = gr.Slider(step=0.1, label=f"{said}Guidance scale", **begun["guidance"])
        self.policy = gr.Dropdown(list(POLICIES), label=f"{said}Policy", filterable=False, **begun["policy"])
        self.options = gr.Textbox(
            label=f"{said}Policy parameters", placeholder="name=value name=value", **begun["options"]
        )
        with gr.Accordion(f"{said}Temperatures and schedule", open=False):
            self.temperature = gr.Slider(step=0.05, label=f"{said}Temperature", **begun["temperature"])
            self.choice = gr.Slider(step=0.1, label=f"{said}Choice temperature", **begun["choice"])
            self.schedule = gr.Dropdown(
                list(MASK_SCHEDULES),
                label=f"{said}Mask schedule",
                allow_custom_value=True,
                **begun["schedule"],
            )
            reset = gr.Button("Reset to the model's defaults", size="sm")
        self.fields: list[Any] = [getattr(self, field) for field in begun]
        self.policy.input(self._changed, self.policy, self.fields, queue=False, **PRIVATE)
        reset.click(lambda: self.fill(own), None, self.fields, queue=False, **PRIVATE)

    def _changed(self, policy: str) -> Values:
        """Return what another policy brings."""
        return self.fill(self.studio.pipe.sampler_config(policy=policy))

    def read(self, values: Values) -> SamplerConfig:
        """Return the settings in the fields.

        Raises:
            ConfigError: one is not allowed.
        """
        options = Sampler(policy_options=tuple(str(values[self.options] or "").split())).given()
        shown = {
            "steps": values[self.steps],
            "guidance_scale": values[self.guidance],
            "policy": values[self.policy],
            "policy_options": options.get("policy_options", {}),
            "temperature": values[self.temperature],
            "choice_temperature": values[self.choice],
            "mask_schedule": values[self.schedule],
        }
        return self.studio.pipe.sampler_config(**values[self.kept] | shown)

    def config(self, settings: dict[str, Any]) -> SamplerConfig:
        """Return the sampler's part of a picture's settings, the model's own where they say nothing.

        Raises:
            ConfigError: one is not allowed.
        """
        names = {field.name for field in dataclasses.fields(SamplerConfig)}
        return self.studio.pipe.sampler_config(**{k: v for k, v in settings.items() if k in names})

    def fill(self, config: SamplerConfig) -> Values:
        """Return what puts settings into the fields."""
        return {
            getattr(self, field): properties["value"] if field == "kept" else gr.update(**properties)
            for field, properties in _fields(config).items()
        }


def _fields(config: SamplerConfig) -> dict[str, dict[str, Any]]:
    """Return the properties of a sampler form's fields, by the form's names for them."""
    values = config.to_dict()
    policy = POLICIES[config.policy]
    parameters = [f"{f.name}={_text(f.default)}" for f in dataclasses.fields(policy)]
    given = values.pop("policy_options")
    about = (inspect.getdoc(policy) or "").splitlines()[0]

    def slider(name: str, high: float) -> dict[str, Any]:
        value, setting = values.pop(name), SETTINGS[name]
        return {"value": value, "minimum": setting.low, "maximum": max(value, high), "info": setting.help}

    return {
        "steps": slider("steps", MAX_STEPS),
        "guidance": slider("guidance_scale", MAX_GUIDANCE),
        "policy": {"value": values.pop("policy"), "info": about},
        "options": {
            "value": " ".join(f"{name}={_text(value)}" for name, value in given.items()),
            "info": f"Defaults: {' '.join(parameters)}",
            "visible": bool(parameters),
        },
        "temperature": slider("temperature", MAX_TEMPERATURE),
        "choice": slider("choice_temperature", MAX_CHOICE),
        "schedule": {"value": values.pop("mask_schedule"), "info": SETTINGS["mask_schedule"].help},
        # What has no field of its own.
        "kept": {"value": values},
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


class SubjectForm:
    """Fields for what is made: the class, how many, and which."""

    def __init__(self, studio: Studio, *, count: int, guess: bool = False) -> None:
        """Make the fields in the present place of the page.

        Args:
            count: pictures to begin with; 0 leaves the field out, and one is made.
            guess: whether the class may be guessed.
        """
        self.studio = studio
        classes = studio.classes(guess=guess)
        first = GUESS if guess else next(value for _, value in classes if value.isdigit())
        self.label = gr.Dropdown(
            classes, value=first, label="Class", info="Type to search", elem_classes="class"
        )
        self.count = gr.Slider(1, MAX_IMAGES, value=count or 1, step=1, label="Images", visible=count > 0)
        with gr.Row(elem_classes="seed"):
            self.seed = gr.Textbox("0", label="Seed", scale=3, min_width=90)
            self.index = gr.Textbox("0", label="Index", scale=3, min_width=90)
            another = gr.Button("New seed", size="sm", scale=2, min_width=84)
        self.fields: list[Any] = [self.label, self.count, self.seed, self.index]
        another.click(lambda: str(secrets.randbelow(10**6)), None, self.seed, queue=False, **PRIVATE)

    def read(self, values: Values) -> tuple[Label, dict[str, Any]]:
        """Return the label, and the arguments that the pipeline's functions share.

        Raises:
            ConfigError: a field holds something that is not allowed.
        """
        return self.studio.label(values[self.label]), {
            "num_images": int(values[self.count]),
            "seed": whole("The seed", values[self.seed], MAX_SEED),
            "first_index": whole("The index", values[self.index], MAX_INDEX),
            "batch_size": MAX_IMAGES,
        }

    def fill(self, settings: dict[str, Any]) -> Values:
        """Return what puts a picture's settings into the fields.

        Raises:
            ConfigError: one is not allowed.
        """
        return {
            self.label: self.studio.choice(settings.get("class")),
            self.count: 1,
            self.seed: str(whole("The image's seed", settings.get("seed"), MAX_SEED)),
            self.index: str(whole("The image's index", settings.get("index"), MAX_INDEX)),
        }
