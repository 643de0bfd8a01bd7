"""How tokens are decoded, as typed settings validated when made."""

import dataclasses
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_range
from maskgit.sampler.policies import make_policy
from maskgit.sampler.schedules import check_mask_schedule, curve

# As the networks' configs have it.
MAX_CODES = 2**18
# Settings that came later, with their defaults: what was written before, and is compared with it, does not have them.
LATER = {"top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class StepTables(Config):
    """Values for each step in place of curves; each is None or as long as there are steps.

    Attributes:
        mask_ratio: the share of tokens still masked after the step, never rising, in [0, 1].
        temperature, choice_temperature, guidance_scale: of the step.

    Source: AutoNAT (arXiv 2406.01994), which tunes them.
    """

    mask_ratio: tuple[float, ...] | None = None
    temperature: tuple[float, ...] | None = None
    choice_temperature: tuple[float, ...] | None = None
    guidance_scale: tuple[float, ...] | None = None

    def validate(self) -> None:
        highest = {"mask_ratio": 1.0, "temperature": 1e6, "choice_temperature": 1e6, "guidance_scale": 1e3}
        for name, high in highest.items():
            for value in getattr(self, name) or ():
                check_range(f"tables.{name}", value, 0, high)
        ratios = self.mask_ratio or ()
        if any(after > before for before, after in pairwise(ratios)):
            raise ConfigError(f"tables.mask_ratio must never rise, but is {list(ratios)}.")

    @property
    def num_steps(self) -> int:
        """The length of the longest table."""
        return max(len(getattr(self, f.name) or ()) for f in dataclasses.fields(self))

    def check_length(self, steps: int) -> None:
        """Raise a `ConfigError` unless every table has a value for each step."""
        for f in dataclasses.fields(self):
            table = getattr(self, f.name)
            if table is not None and len(table) != steps:
                raise ConfigError(f"tables.{f.name} has {len(table)} values, but there are {steps} steps.")


@dataclass(frozen=True)
class SamplerConfig(Config):
    """How tokens are decoded; the defaults are the official ones.

    A schedule is the name of a curve (see `schedules.curve`) that a setting is multiplied by.

    Attributes:
        steps: forward passes of the decoding loop; policies that adapt take no more than these.
        policy: which tokens stay after a step: a name in `policies.POLICIES`.
        policy_options: the policy's own parameters by name, where they are not its defaults.
        choice_temperature: scales the Gumbel noise on confidence.
        choice_schedule: its curve, falling: "linear" ends at 0.
        temperature: divides the logits before a token is sampled.
        temperature_schedule: its curve, falling.
        mask_schedule: name of the curve that gives the share of tokens still masked (see `schedules`).
        guidance_scale: classifier-free guidance s in u + s·(c − u), c the logits with the class and u without;
            1 is none. A model with a guide (`Model.guided_by`) takes the guide's logits for u.
        guidance_schedule: its curve w, rising: the scale of a step is 1 + (s − 1)·w.
        top_k: sample tokens from this many of the likeliest codes only; 0 keeps all.
        top_p: sample tokens from the smallest set of likeliest codes with this total probability (nucleus
            sampling, arXiv 1904.09751); 1 keeps all. Both apply after the temperature; confidence ignores them.
        force_guidance: guide a model that was never trained without its class, too.
        tables: values for each step in place of the curves.

    Source: paper §3.2; official configs/maskgit_class_cond_config.py and libml/parallel_decode.py.
    """

    steps: int = 8
    policy: str = "confidence"
    policy_options: dict[str, Any] = field(default_factory=dict)
    choice_temperature: float = 4.5
    choice_schedule: str = "linear"
    temperature: float = 1.0
    temperature_schedule: str = "constant"
    mask_schedule: str = "cosine"
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    top_k: int = 0
    top_p: float = 1.0
    force_guidance: bool = False
    tables: StepTables = field(default_factory=StepTables)

    def validate(self) -> None:
        check_range("steps", self.steps, 1, 10_000)
        check_range("choice_temperature", self.choice_temperature, 0, 1e6)
        check_range("temperature", self.temperature, 0, 1e6)
        check_range("guidance_scale", self.guidance_scale, 0, 1000)
        check_range("top_k", self.top_k, 0, MAX_CODES)
        check_range("top_p", self.top_p, 0, 1)
        check_mask_schedule(self.mask_schedule)
        for spec in (self.choice_schedule, self.temperature_schedule, self.guidance_schedule):
            curve(spec, start=0, end=1)
        make_policy(self.policy, self.policy_options)
        self.tables.check_length(self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values, without settings that came later and were not made."""
        return {
            name: value for name, value in super().to_dict().items() if (name, value) not in LATER.items()
        }

    def guides(self) -> bool:
        """Return whether any step needs a prediction without the class."""
        scales = self.tables.guidance_scale
        return self.guidance_scale != 1 if scales is None else any(scale != 1 for scale in scales)
