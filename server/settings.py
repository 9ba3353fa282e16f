"""The server's settings: flags, LADIMO_<FLAG> environment variables and a TOML file. Only this file reads the environment."""

import ipaddress
import json
import os
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from server.help import HelpFormatter
from server.policies.targets import AtAccuracy, Named, Target
from server.policies.tiers import Tier, parse_tiers


def _split(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def _read_tiers(value: object) -> dict[str, Tier] | None:
    """Read tiers from JSON text or from a table of the settings file. Raises ValueError."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"is not valid JSON: {error}") from error
    return parse_tiers(value)


def _check_proxies(proxies: list[str]) -> list[str]:
    """Raises ValueError for a text that is neither an IP address nor a network."""
    for proxy in proxies:
        ipaddress.ip_network(proxy)
    return proxies


def _is_service_link(name: str, text: str | None) -> bool:
    """Whether Kubernetes set the variable. For a Service called `ladimo`, it sets LADIMO_PORT in the namespace's pods, to an
    address such as tcp://10.0.0.1:80. The names of its other variables are no settings."""
    return name.lower() == "ladimo_port" and (text or "").startswith(("tcp://", "udp://", "sctp://"))


def _read_keys(path: Path) -> list[SecretStr]:
    """The keys of a file, one per line. Raises ValueError if the file cannot be read or has no key."""
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not any(lines):
        raise ValueError(f"{path}: holds no key")
    return [SecretStr(line) for line in lines if line]


class ServerSettings(BaseSettings):
    """Serve a LLaMA, dense or converted, over an OpenAI-style HTTP API. Each flag is also read from LADIMO_<FLAG>."""

    model_config = SettingsConfigDict(
        env_prefix="LADIMO_",
        env_ignore_empty=True,
        extra="ignore",
        cli_prog_name="ladimo-server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        assert isinstance(env_settings, EnvSettingsSource)
        env_settings.env_vars = {name: text for name, text in env_settings.env_vars.items() if not _is_service_link(name, text)}
        return env_settings, init_settings

    model: CliPositionalArg[str | None] = Field(None, description="Directory in Hugging Face layout, or a hub id.")
    config: Path | None = Field(None, description="TOML file with any of these settings. Flags and environment win over it.")
    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(8000, ge=0, le=65535, description="Port to bind. 0 takes a free one.")
    api_key: Annotated[list[SecretStr], NoDecode, BeforeValidator(_split)] = Field(
        [], description="Key that clients must send. May be repeated, or separated by commas. Without a key the API is open."
    )
    api_key_file: Path | None = Field(None, description="File of further keys, one per line. # begins a comment.")
    admin_key: SecretStr | None = Field(None, description="Key for the /admin routes. Without one they are closed.")
    admin_key_file: Path | None = Field(None, description="File with the admin key.")
    insecure_admin: bool = Field(False, description="Open the /admin routes without a key. Needs a loopback address.")
    allow_origin: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(
        [],
        description="Site whose pages may call the server from a browser (CORS), such as https://a.example. May be repeated.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: str = Field("auto", description="auto, float32, float16 or bfloat16.")
    quantize: str | None = Field(
        None,
        description="int8 or int4: round the weights to integers while they are loaded. As stored if not given.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="Processes that compute the model together, each on a GPU of its own, or all on the CPU."
    )
    served_model_name: str | None = Field(None, description="Name in /v1/models. The directory's name if not given.")
    max_num_seqs: int = Field(32, ge=1, le=4096, description="Sequences that run at once.")
    max_model_len: int | None = Field(None, ge=2, description="Longest context in tokens. The model's own if not given.")
    max_step_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Largest number of tokens in one engine step. auto: learned from how long steps take, by --max-step-ms.",
    )
    max_step_ms: float = Field(
        250.0,
        gt=0,
        allow_inf_nan=False,
        description="With --max-step-tokens auto: milliseconds that a step with a chunk of a prompt may take while other "
        "requests decode. A step in which none decodes may take four times as long.",
    )
    kv_cache_blocks: int | None = Field(
        None, ge=2, description="Blocks of the KV cache. If not given: 85% of the GPU's free memory, or 2 GiB on a CPU."
    )
    block_size: int = Field(16, ge=1, le=1024, description="Tokens per KV cache block.")
    max_policies: int = Field(
        64, ge=1, le=4096, description="Policy versions that can run at once. Requests under further versions wait."
    )
    prefix_caching: bool = Field(True, description="Keep computed prefixes of prompts, and reuse them under the same policy.")
    cuda_graphs: bool = Field(
        True, description="On a CUDA device, replay decode steps as graphs that are captured at the start."
    )
    batch_budgets: bool = Field(
        False,
        description="Accept policies with batch_experts. Steps then read fewer experts, and an answer depends on its batch.",
    )
    fair_queueing: Literal["key", "user", "none"] = Field(
        "key",
        description="Who takes turns while requests wait. key: API keys. user: values of the field user, within each key. "
        "none: nobody, the oldest request goes first.",
    )
    max_queue: int = Field(256, ge=0, description="Sequences that may wait. More are answered with 429.")
    max_queue_tokens: int | None = Field(
        None, ge=1, description="Prompt tokens that may wait. More are answered with 429. No limit if not given."
    )
    request_timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a request may take. Then it is answered with 504. No limit if not given.",
    )
    allow_special_tokens: bool = Field(
        False, description="Read names of special tokens in chat messages as these tokens. By default they are text."
    )
    tool_parser: Literal["auto", "hermes", "llama3", "json"] = Field(
        "auto",
        description="Form of the model's tool calls: hermes (Qwen2.5, Hermes), llama3 or json. auto detects it from the chat "
        "template.",
    )
    strict_fields: bool = Field(False, description="Refuse unknown fields in requests. By default they are ignored.")
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Largest request body in bytes.")
    header_timeout: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds that a client has to send the headers. Then it gets 408."
    )
    body_timeout: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="Seconds that a client has to send the body. Then it gets 408."
    )
    send_timeout: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a client may leave an answer unread. Then the connection is closed.",
    )
    keep_alive_timeout: float = Field(
        120.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that a connection may be idle between requests. The default is longer than in most proxies.",
    )
    trusted_proxies: Annotated[list[str], NoDecode, BeforeValidator(_split), AfterValidator(_check_proxies)] = Field(
        [],
        description="Address or network of a proxy whose X-Forwarded-For header is believed. Logs then show that client. May "
        "be repeated.",
    )
    stall_timeout: float = Field(
        120.0, gt=0, allow_inf_nan=False, description="Seconds that one engine step may take. Then /health/live fails."
    )
    policy: str | None = Field(None, description="Default policy by name. full if --policy and --accuracy are not given.")
    accuracy: float | None = Field(None, ge=0, le=1, description="Default accuracy, from 0 (cheapest) to 1 (most accurate).")
    service_tiers: Annotated[InstanceOf[Mapping[str, Tier]] | None, NoDecode, BeforeValidator(_read_tiers)] = Field(
        None,
        description="Meaning of service_tier in requests, as JSON or a table in the settings file. A tier has a policy or an "
        "accuracy, and a priority (lower runs earlier). auto and default mean the server's default. Others are refused. "
        'If not given: {"flex": {"policy": "fast", "priority": 10}, "priority": {"policy": "full", "priority": -10}}.',
    )
    shadow_share: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the finished answers that are computed again under accuracy 1 while the server is idle. This "
        "measures how far the policies agree with it.",
    )
    frontier_batch: Annotated[int, Field(ge=1)] | Literal["prefill"] = Field(
        1,
        description="Batch size of the frontier from which an accuracy chooses. prefill: the frontier for prompts, by their "
        "time on this processor.",
    )
    policies_dir: Path | None = Field(
        None, description="Directory for the policies and defaults set over /admin. In memory only if not given."
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="Seconds that running requests have to finish after SIGTERM or SIGINT."
    )
    expert_metrics: Literal["auto", "full", "aggregate"] = Field(
        "auto",
        description="full: a counter per layer, expert and policy. aggregate: figures per layer only. auto: full if the "
        "model's experts times its policies are at most 5000 series.",
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="OpenTelemetry collector for traces of requests, over HTTP, such as http://localhost:4318. "
        "OTEL_EXPORTER_OTLP_ENDPOINT works, too. No traces if neither is given.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe log lines to show.")

    @model_validator(mode="after")
    def _consistent(self) -> "ServerSettings":
        if self.model is None:
            raise ValueError("MODEL is missing: name a directory or a hub id")
        if self.policy is not None and self.accuracy is not None:
            raise ValueError("--policy and --accuracy exclude each other")
        if self.api_key_file is not None:
            self.api_key = [*self.api_key, *_read_keys(self.api_key_file)]
        if self.admin_key_file is not None:
            keys = _read_keys(self.admin_key_file)
            if self.admin_key is not None or len(keys) != 1:
                raise ValueError("there must be one admin key: either --admin-key, or one line in --admin-key-file")
            self.admin_key = keys[0]
        if any(not key.get_secret_value() for key in [*self.api_key, *([self.admin_key] if self.admin_key else [])]):
            raise ValueError("a key must not be empty")
        for key in [*self.api_key, *([self.admin_key] if self.admin_key else [])]:
            text = key.get_secret_value()
            if not (text.isascii() and text.isprintable() and text == text.strip()):
                raise ValueError("a key must be of printable ASCII characters, with no space at its ends: no other can be sent")
        return self

    @property
    def default_target(self) -> Target | None:
        """The default that --policy or --accuracy sets; None if neither is given."""
        if self.policy is not None:
            return Named(self.policy)
        return None if self.accuracy is None else AtAccuracy(self.accuracy)

    @property
    def exports_traces(self) -> bool:
        """Whether a collector for traces is configured, by --otlp-endpoint or by OpenTelemetry's own variables."""
        names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        return self.otlp_endpoint is not None or any(os.environ.get(name) for name in names)

    @property
    def is_loopback(self) -> bool:
        """Whether --host is a loopback address."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_settings(arguments: Sequence[str]) -> ServerSettings:
    """Read the settings. Flags win over the environment, and the environment wins over the file that --config names.

    Raises SystemExit for --help and wrong flags, and ValueError with a message of one line for wrong values.
    """
    flags: CliSettingsSource[ArgumentParser] = CliSettingsSource(ServerSettings, formatter_class=HelpFormatter)
    with _one_line():
        source = flags(args=list(arguments))
        path = source().get("config") or os.environ.get("LADIMO_CONFIG")
        file = {} if not path else _read_file(Path(path))
        return ServerSettings(_cli_settings_source=source, **file)  # type: ignore[call-arg]


def read_mapping(raw: Mapping[str, Any], where: str) -> ServerSettings:
    """Read the settings from a mapping by name, as a settings file has them. The environment wins over it. `where`: names it in
    errors. Raises ValueError with a message of one line."""
    with _one_line():
        return ServerSettings(**_known(raw, where))


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn errors of wrong values into ValueError with a message of one line that names the flag."""
    try:
        yield
    except ValidationError as error:
        first, *rest = error.errors()
        name = ".".join(str(part) for part in first["loc"][:1])
        # A setting of several kinds has an error for each of them.
        others = [each for each in rest if len(each["loc"]) > 1 and each["loc"][:1] == first["loc"][:1]]
        flag = f"--{name.replace('_', '-')} (or LADIMO_{name.upper()}): " if name else ""
        said = "; or: ".join(each["msg"].removeprefix("Value error, ") for each in (first, *others))
        raise ValueError(flag + said) from error
    except SettingsError as error:
        raise ValueError(str(error)) from error


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file by field name. Names may be spelled with - or _. Raises ValueError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    return _known(raw, str(path))


def _known(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings by field name. Raises ValueError for a name that is none."""
    settings = {name.replace("-", "_"): value for name, value in raw.items()}
    unknown = sorted(settings.keys() - (ServerSettings.model_fields.keys() - {"config"}))
    if unknown:
        raise ValueError(f"{where}: there is no setting {unknown[0]!r}")
    return settings
