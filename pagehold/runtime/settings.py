"""Settings of every process: from flags, then `PAGEHOLD_…` in the environment, then a file.

The file is TOML and named by `PAGEHOLD_CONFIG`. Each default is stated once, here. A component's
settings name only what it reads.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSuppress,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pagehold.runtime.statedir import default_state_dir

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(value: object) -> object:
    """`4GiB`, `512M`, `65536`: binary units. Anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError("want a size such as 4GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Dtype = Literal["bfloat16", "float16", "float32"]
KvDtype = Literal["bfloat16", "float16", "float32", "fp8_e4m3", "int8"]


class Settings(BaseSettings):
    """Where every command's settings come from."""

    model_config = SettingsConfigDict(
        env_prefix="PAGEHOLD_",
        extra="ignore",
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
        file = TomlConfigSettingsSource(settings_cls, os.environ.get("PAGEHOLD_CONFIG"))
        return init_settings, env_settings, file


class StateDirSettings(Settings):
    """Names the state folder."""

    state_dir: Path = Field(default_factory=default_state_dir, description="folder of the shared files and sockets")


class ComponentSettings(StateDirSettings):
    """What all components share."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    failpoints: str = Field("", description="faults to arm, for tests; see docs/failpoints.md")
    hang_seconds: float = Field(10.0, gt=0, description="beyond what a turn should take, until it counts as hung")
    parent_pid: CliSuppress[int] = Field(0, description="the supervisor, with which this process dies; 0: none")


class DevicePoolSettings(ComponentSettings):
    """What both ends of a pool in device memory must agree on."""

    pool: Literal["ipc", "vmm"] = Field("ipc", description="CUDA: how GPU pages are handed over")
    cuda_driver: CliSuppress[str] = Field("", description="module that stands in for CUDA's memory, for tests")


class KvManagerSettings(DevicePoolSettings):
    """The owner of the page pool."""

    discard: bool = Field(False, description="drop shared state that cannot be adopted and start afresh")
    record_ttl: float = Field(600.0, gt=0, description="seconds that an ended request can still be resumed")
    record_quota: Bytes = Field(1 << 30, gt=0, description="bytes that request records and logs may take")


class ExecutorSettings(DevicePoolSettings):
    """The process that runs the model."""

    model: str | None = Field(None, description="folder, .gguf file or hub id; default: the model of the demo extra")
    served_model_name: str | None = Field(None, description="name that clients use; default: the model's own")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    runner: Literal["auto", "reference"] = Field("auto", description="reference: torch, slow, for tests")
    dtype: Dtype = Field("bfloat16", description="arithmetic of the model; float16 on CUDA, float32 on CPUs only")
    weights: Literal["auto", "bfloat16", "file", "int8", "int4"] = Field(
        "auto",
        description="auto: the file's own 4- or 8-bit blocks where they are fast, which changes no token; file: these "
        "alone, which is least memory; int8: the fastest on a CPU for many sequences; int4: without AMX the fastest "
        "for few; both may change tokens",
    )
    kv_dtype: KvDtype | None = Field(
        None, description="element type of the pages; default: the dtype; fp8_e4m3: CUDA; int8: CPUs"
    )
    deterministic: bool = Field(False, description="CUDA: tokens do not depend on what else runs; CPUs always are")
    page_size: int = Field(16, ge=8, le=128, multiple_of=8, description="tokens in a page, a multiple of 8")
    kv_memory: Bytes | None = Field(None, gt=0, description="size of the page pool, such as 2GiB")
    memory_fraction: float = Field(0.90, gt=0, le=1, description="of the free memory that --kv-memory may take")
    max_model_len: int | None = Field(None, gt=0, description="tokens, prompt and answer; default: the model's")
    max_num_seqs: int = Field(128, ge=1, le=4096, description="sequences that run at once")
    max_batch_tokens: int | None = Field(None, ge=16, description="tokens in one step; default: CPUs 512, GPUs 2048")
    speculation: Literal["ngram", "off"] = Field("ngram", description="CPU: guess tokens from what came before them")
    prefix_cache: bool = Field(True, description="share pages of equal prefixes")
    fork: bool = Field(True, description="outputs of one request share the pages of their prompt; off for debugging")
    threads: int | None = Field(None, ge=1, description="compute threads; default: the processors of this process")
    cpu_isa: Literal["portable", "avx2", "avx512bf16", "amx"] | None = Field(
        None, description="forces an instruction set"
    )
    stream_interval_ms: int = Field(
        20,
        ge=0,
        le=1000,
        description="least time between two messages to a stream; first and last tokens do not wait; 0: one each step",
    )
    step_trace: Path | None = Field(None, description="file that gets one line of JSON a step, for benchmarks")
    executor_listen: str | None = Field(
        None, description="HOST:PORT where frontends elsewhere reach it; default: only the socket in the state folder"
    )


class FrontendSettings(ComponentSettings):
    """The public gRPC server."""

    listen: str = Field("127.0.0.1:50051", description="HOST:PORT of the public services")
    executor: str | None = Field(None, description="unix:PATH or HOST:PORT; default: the socket in the state folder")
    max_streams: int = Field(1024, ge=1, description="client streams open at once")
    max_message_bytes: Bytes = Field(16 << 20, description="largest message accepted from a client")
    max_stream_buffer: int = Field(4096, ge=64, description="tokens held for a client that does not read")
    reflection: bool = Field(True, description="answer gRPC server reflection")
    drain_delay: float = Field(0.0, ge=0, description="seconds from unready to closed on shutdown, for balancers")
    drain_grace: float = Field(25.0, ge=0, description="seconds that open streams get on shutdown")
    instance: int = Field(1, ge=1, le=64, description="number of this frontend, where several use one state folder")
    share_port: CliSuppress[bool] = Field(False, description="other frontends listen on the same port")
    connection_age: float = Field(15.0, gt=0, description="shared port: seconds until a client's connection is renewed")

    @property
    def handover_seconds(self) -> float:
        """Until every connection that may go over to another frontend has done so: gRPC varies the age by a tenth."""
        return 1.1 * self.connection_age + 0.5

    @property
    def drain_seconds(self) -> float:
        """The longest time from the signal to the end of the last stream."""
        return self.drain_delay + max(self.drain_grace, self.handover_seconds)


class SupervisorSettings(ComponentSettings):
    """What watches over components."""

    metrics_listen: str | None = Field(
        None, description="HOST:PORT of /metrics, in Prometheus' format, /ready and /live, over HTTP; default: none"
    )


class RunKvManagerSettings(KvManagerSettings, SupervisorSettings):
    """A manager under a supervisor of its own."""


class RunFrontendSettings(FrontendSettings, SupervisorSettings):
    """Frontends under a supervisor of their own."""

    frontends: int = Field(1, ge=1, le=16, description="frontends that share the port")


class RunExecutorSettings(ExecutorSettings, SupervisorSettings):
    """An executor under a supervisor of its own."""

    standby: bool = Field(False, description="keep a second executor loaded, which takes over at once")


class UpSettings(KvManagerSettings, ExecutorSettings, FrontendSettings, SupervisorSettings):
    """All three components under one supervisor. `--executor` is for frontends on their own."""

    standby: bool = Field(False, description="keep a second executor loaded, which takes over at once")
    frontends: int = Field(1, ge=1, le=16, description="frontends that share the port")


class TortureSettings(UpSettings):
    """Faults without end in a stack of its own, and every stream checked. Flags of `up` are handed to it."""

    hang_seconds: float = Field(2.0, gt=0, description="beyond what a turn should take, until it counts as hung")
    record_ttl: float = Field(20.0, gt=0, description="seconds that an ended request can still be resumed")
    kv_memory: Bytes | None = Field(512 << 20, gt=0, description="size of the page pool; small: rows are taken away")
    standby: bool = Field(True, description="keep a second executor loaded, which takes over at once")
    frontends: int = Field(2, ge=1, le=16, description="frontends that share the port")
    seconds: float = Field(120.0, gt=0, description="how long faults go on")
    kills: int | None = Field(None, ge=1, description="stop after this many kills instead")
    seed: int | None = Field(None, ge=0, description="of all that is drawn; default: a new one")
    streams: int = Field(16, ge=1, le=256, description="client streams under way at any time")
    only: str = Field("", description="COMPONENT[:POINT[:ACTION]]: no other faults than these")
    results: Path | None = Field(None, description="JSON file that the run is added to")
    matrix: Path | None = Field(None, description="write the page of --results there, and do nothing else")


class StatusSettings(StateDirSettings):
    """What runs, read from the state folder."""

    json_: bool = Field(False, validation_alias="json", description="print JSON")


class TopSettings(StateDirSettings):
    """What runs and what it does, once and again: like top. Where standard output is no terminal, frame by frame."""

    interval: float = Field(1.0, ge=0.1, le=3600, description="seconds from one look to the next")
    count: int | None = Field(None, ge=1, description="end after so many frames; default: until q or Ctrl-C")
    once: bool = Field(False, description="one frame, after one interval")
    json_: bool = Field(False, validation_alias="json", description="print JSON, one object a line")

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.once and self.count is not None:
            raise ValueError("--once is --count 1: give one of them")
        return self

    @property
    def frames(self) -> int | None:
        """How many; None: until somebody ends it."""
        return 1 if self.once else self.count


class HealthSettings(StateDirSettings):
    """Whether a component of this machine or container does its work, for health checks."""

    component: CliPositionalArg[Literal["frontend", "kvmanager", "executor"]] = Field(description="which")


class RestartSettings(StateDirSettings):
    """Replaces a component while streams go on."""

    component: CliPositionalArg[Literal["frontend", "kvmanager", "executor"]] = Field(description="what is replaced")


class FsckSettings(StateDirSettings):
    """Checks tables, rows, prefix index, records and logs against each other. K/V has no checksum and is not seen."""

    repair: bool = Field(False, description="mend a folder that nobody uses; no token is lost by it")
    json_: bool = Field(False, validation_alias="json", description="print JSON")


class PoolsSettings(StateDirSettings):
    """Lists state folders: those named, or all of this user's beside --state-dir."""

    folders: CliPositionalArg[list[Path]] = Field([], description="state folders; default: all beside --state-dir")
    reclaim: bool = Field(False, description="remove those whose owners are dead")
    force: bool = Field(False, description="also with requests that have not ended")
    json_: bool = Field(False, validation_alias="json", description="print JSON")


class FailpointListSettings(Settings):
    """The places where a fault can be put."""

    markdown: bool = Field(False, description="print the page of the documentation")


class FailpointArmSettings(StateDirSettings):
    """Puts faults into a process that runs, in place of those that are there."""

    instance: CliPositionalArg[str] = Field(description="frontend, frontend-2, ..., kvmanager or executor")
    specification: CliPositionalArg[str] = Field(description="NAME=kill|stop|delay:MS|error[@COUNT];... or nothing")


class PrefixListSettings(StateDirSettings):
    """The pinned prefixes of a running manager."""

    json_: bool = Field(False, validation_alias="json", description="print JSON")


class PrefixUnpinSettings(StateDirSettings):
    """Gives a pinned prefix back to the cache."""

    name: CliPositionalArg[str] = Field(description="the name it was pinned under")
    tenant: str = Field("default", description="whose it is")


class PrefixPinSettings(Settings):
    """Computes a prefix once and keeps its whole pages until it is unpinned."""

    name: CliPositionalArg[str] = Field(description="a name for it; a prefix under the same name is replaced")
    text: str = Field("", description="the prefix as it is; with --system, the first message of a user")
    system: str = Field("", description="the system message of chats that begin with it")
    salt: str = Field("", description="cache_salt of the requests that are to share it")
    address: str = Field("127.0.0.1:50051", description="HOST:PORT of a frontend")
    model: str = Field("", description="name of the model; default: the one that is served")


class ClientSettings(Settings):
    """Where a client finds a frontend."""

    address: str = Field("127.0.0.1:50051", description="HOST:PORT of a frontend")
    model: str = Field("", description="name of the model; default: the one that is served")
    max_tokens: int | None = Field(None, description="tokens of the answer at most; default: what fits the context")
    temperature: float | None = Field(None, description="0 is greedy; default: 1.0")
    top_p: float | None = Field(None, description="share of the probability that is kept; default: all")
    top_k: int | None = Field(None, description="tokens that are kept; default: all")
    seed: int | None = Field(None, description="makes sampling repeatable; default: drawn")
    stop: list[str] = Field([], description="the answer ends before this text; may be repeated")
    system: str = Field("", description="the chat's system message")


class GenerateSettings(ClientSettings):
    """One question, one answer."""

    prompt: CliPositionalArg[str] = Field(description="the question; - reads it from standard input")
    raw: bool = Field(False, description="send the prompt as it is, without the chat template")
    stats: bool = Field(False, description="end with a line of figures on standard error")
