"""The policies of decoding: which tokens stay after a step. One table row is one policy."""

import dataclasses
from typing import Any

from maskgit.errors import ConfigError, unknown_name
from maskgit.sampler.policies.adaptive import EntropyBounded, Stable
from maskgit.sampler.policies.base import Memory, Policy, Start, Step
from maskgit.sampler.policies.confidence import Confidence, Moment, Redraw
from maskgit.sampler.policies.critic import Critic, SelfCritic
from maskgit.sampler.policies.diffusion import MDLM, ReMDM
from maskgit.sampler.policies.ordered import Halton, Random

__all__ = ["POLICIES", "Critic", "Memory", "Policy", "Start", "Step", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    "confidence": Confidence,
    "redraw": Redraw,
    "random": Random,
    "halton": Halton,
    "mdlm": MDLM,
    "remdm": ReMDM,
    "entropy_bounded": EntropyBounded,
    "stable": Stable,
    "moment": Moment,
    "self_critic": SelfCritic,
}


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """Return a policy by name, with some of its parameters set.

    Raises:
        ConfigError: the name or a parameter is unknown, or a value is not allowed.
    """
    if name not in POLICIES:
        raise unknown_name("policy", name, POLICIES)
    options = options or {}
    known = [f.name for f in dataclasses.fields(POLICIES[name])]
    for option in options:
        if option not in known:
            if not known:
                raise ConfigError(f"The policy {name} has no parameters, but {option!r} was given.")
            raise unknown_name(f"parameter of the policy {name}", option, known)
    return POLICIES[name].from_dict(options)
