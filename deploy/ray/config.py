"""The settings of the deployment: what `serve run` takes as arguments, and a Serve config file under `args`."""

from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from server.settings import ServerSettings, read_mapping

# Settings of one server on its own socket, and what to use instead.
ELSEWHERE = {
    "model": "model belongs beside `server`, not into it",
    "config": "write its settings here",
    "policies_dir": "the replicas share one view, which the deployment holds",
    "insecure_admin": "set admin_key",
    "tensor_parallel_size": "a replica is one process",
    **dict.fromkeys(
        ("host", "port", "trusted_proxies", "header_timeout", "send_timeout", "keep_alive_timeout"),
        "Ray Serve's HTTP options set it",
    ),
}


class DeploymentConfig(BaseModel):
    """One model, served by replicas. Every machine must find the model at the same path.

    `server`: settings of `ladimo-server` by name, for each replica. `autoscaling`: fields of Ray Serve's AutoscalingConfig; the
    number of replicas then follows the load. `balance`: a replica that has a prompt's prefix is preferred while its queue is at
    most so many requests longer than the shortest one. `gateways`: processes that take HTTP requests.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    replicas: PositiveInt = 1
    autoscaling: dict[str, Any] | None = None
    num_cpus: NonNegativeFloat = 1
    num_gpus: NonNegativeFloat = 0
    balance: NonNegativeInt = 4
    gateways: PositiveInt = 1
    server: dict[str, Any] = Field(default_factory=dict)

    @field_validator("model")
    @classmethod
    def _absolute(cls, model: str) -> str:
        """Replicas run in another working directory."""
        return str(Path(model).absolute()) if Path(model).is_dir() else model

    @model_validator(mode="after")
    def _consistent(self) -> "DeploymentConfig":
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("replicas and autoscaling exclude each other; set min_replicas and max_replicas in autoscaling")
        for name in self.server:
            reason = ELSEWHERE.get(name.replace("-", "_"))
            if reason is not None:
                raise ValueError(f"server.{name} cannot be set here: {reason}")
        self.settings()
        return self

    def settings(self) -> ServerSettings:
        """The settings of each replica's server. Raises ValueError."""
        return read_mapping({**self.server, "model": self.model}, "server")
