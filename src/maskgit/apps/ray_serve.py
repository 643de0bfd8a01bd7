"""`maskgit serve` on a cluster: every replica of a Ray Serve deployment runs the same application.

serve run maskgit.apps.ray_serve:build model=cifar10 num_replicas=2

A request is answered by one replica with the code of the single process, so that it gets the same bytes.
"""

import asyncio
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from maskgit.apps.cli.flags import Marking, Model, Speed
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.middleware import read_keys
from maskgit.apps.serving.options import Limits, Network
from maskgit.apps.serving.service import Service
from maskgit.errors import ConfigError

# Beyond a request's own time, for its answer to reach the proxy.
_SHUTDOWN_GRACE = 10.0
# What a client refused by the proxy is told to wait; a replica tells what it expects itself.
_RETRY_AFTER = 1.0


# Not a `Config` of ours: Ray turns the words of its command line into what a pydantic model says.
class Options(BaseModel):
    """What is deployed; a replica's settings are those of `maskgit serve`.

    Attributes:
        model: a model's name, its folder, or a Hugging Face id.
        device: cuda, mps or cpu; auto takes the first that a replica is given.
        adapter: merged into the model: a folder that is on every node, or a Hugging Face id.
        guide: a weaker model of the same tokens; see `MaskGIT.guided_by`.
        mode, dtype: how fast, and how exactly; auto is fast on a GPU and exact elsewhere. See docs/serving.md.
        queue_size: images that a replica accepts and has not answered yet.
        max_batch: images that it makes together.
        max_images: images that one request may ask for.
        max_per_client: images of one client that a replica accepts and has not answered yet; None is all.
        root_path, trusted_proxies, allowed_hosts, cors_origins: as for `maskgit serve`.
        timeout: seconds in which a request must be answered.
        api_key_file: keys, one a line; the file must be on every node.
        num_replicas: how many there are; with max_replicas, how many at least.
        max_replicas: how many there may be while there is much to do, or None.
        num_cpus, num_gpus: what each replica needs; it computes in num_cpus threads.
        max_queued_requests: requests that wait at a proxy while all replicas are full; further ones are told
            to come again later.
        mark: whether pictures say that a model made them. For C2PA, the variables MASKGIT_C2PA_CERT and
            MASKGIT_C2PA_KEY name files that must be on every node.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "cifar10"
    adapter: str | None = None
    guide: str | None = None
    device: str = "auto"
    mode: Literal["auto", "exact", "fast", "int8"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    queue_size: int = Limits.queue_size
    max_batch: int = Limits.max_batch
    max_images: int = Limits.max_images
    max_per_client: int | None = None
    root_path: str = ""
    trusted_proxies: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    timeout: float = Limits.timeout
    api_key_file: Path | None = None
    num_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    num_cpus: float = Field(1.0, gt=0)
    num_gpus: float = Field(0.0, ge=0)
    max_queued_requests: int = Field(64, ge=1)
    mark: bool = True

    def limits(self) -> Limits:
        """Return what a replica takes.

        Raises:
            ConfigError: a number is out of range.
        """
        return Limits(
            queue_size=self.queue_size,
            max_batch=self.max_batch,
            max_images=self.max_images,
            max_per_client=self.max_per_client,
            timeout=self.timeout,
        )

    def network(self) -> Network:
        """Return what stands in front of the cluster.

        Raises:
            ConfigError: something cannot be meant.
        """
        network = Network(self.root_path, self.trusted_proxies, self.allowed_hosts, self.cors_origins)
        network.check()
        return network


class Replica:
    """One copy of the service, in a process of its own."""

    def __init__(self, options: Options) -> None:
        speed = Speed() if options.mode == "auto" else Speed(**{options.mode: True})
        model = Model(
            options.model, options.device, options.dtype, speed, options.adapter, guide=options.guide
        )
        self._network = options.network()
        self._keys = read_keys(options.api_key_file) if options.api_key_file else ()
        self._service = Service(
            model.load(),
            options.model,
            options.limits(),
            recorded=model.recorded("serve"),
            marking=Marking(options.mark),
        )

    # Ray's name for what makes the application, once the constructor has run.
    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._keys, network=self._network)

    async def check_health(self) -> None:
        """Wait until the model is warmed up, or raise what went wrong; Ray asks before it sends requests."""
        await asyncio.to_thread(self._service.wait_ready)


def build(options: Options) -> Application:
    """Return the application that `serve run` and `ray.serve.run` deploy.

    Args:
        options: what is deployed; on Ray's command line, NAME=VALUE each.

    Raises:
        ConfigError: a number is out of range.
    """
    limits = options.limits()
    options.network()
    deployed = serve.deployment(
        name="maskgit",
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        # A replica that is sent fewer requests than fill its batch would pad it.
        max_ongoing_requests=limits.queue_size,
        max_queued_requests=options.max_queued_requests,
        backpressure_config={"status_code": 429, "retry_after_s": _RETRY_AFTER},
        graceful_shutdown_timeout_s=limits.timeout + _SHUTDOWN_GRACE,
        **_scaling(options),
    )
    return deployed(serve.ingress()(Replica)).bind(options)


def _scaling(options: Options) -> dict[str, Any]:
    """Return how many replicas there are, as Ray is told."""
    if options.max_replicas is None:
        return {"num_replicas": options.num_replicas}
    if options.max_replicas < options.num_replicas:
        raise ConfigError(
            f"max_replicas must be at least num_replicas, {options.num_replicas}, "
            f"but is {options.max_replicas}."
        )
    return {
        "autoscaling_config": {
            "min_replicas": options.num_replicas,
            "max_replicas": options.max_replicas,
            # One batch is worked on while the next one waits.
            "target_ongoing_requests": 2 * options.max_batch,
        }
    }
