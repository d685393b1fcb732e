"""The `pagehold` command: picks a subcommand, reads its settings, runs it. Modules are loaded only when used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Final, TypeVar

from pydantic import ValidationError
from pydantic_settings import SettingsError

import pagehold
from pagehold.runtime.settings import (
    ClientSettings,
    ComponentSettings,
    ExecutorSettings,
    FailpointArmSettings,
    FailpointListSettings,
    FrontendSettings,
    FsckSettings,
    GenerateSettings,
    HealthSettings,
    KvManagerSettings,
    PoolsSettings,
    PrefixListSettings,
    PrefixPinSettings,
    PrefixUnpinSettings,
    RestartSettings,
    RunExecutorSettings,
    RunFrontendSettings,
    RunKvManagerSettings,
    Settings,
    StatusSettings,
    SupervisorSettings,
    TopSettings,
    TortureSettings,
    UpSettings,
)

Found = TypeVar("Found", bound=Settings)
EXIT_USAGE: Final = 2


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: a function of its module takes the settings and returns the exit code."""

    help: str
    settings: type[Settings]
    module: str
    function: str = "main"

    def run(self, found: Settings) -> int:
        return int(getattr(import_module(self.module), self.function)(found))


COMMANDS: Final = {
    "up": Command("all components on this machine, under one supervisor", UpSettings, "services.supervisor.up"),
    "restart": Command("replace a component while streams go on", RestartSettings, "services.cli.restart"),
    "generate": Command("stream one answer to the terminal", GenerateSettings, "services.cli.generate"),
    "chat": Command("talk to the model", ClientSettings, "services.cli.chat"),
    "status": Command("what runs here, and what it holds", StatusSettings, "services.cli.status"),
    "top": Command("the same, live, and how fast it goes", TopSettings, "services.cli.top"),
    "health": Command("whether one component does its work", HealthSettings, "services.cli.health"),
    "fsck": Command("check a state folder, live or dead; mend a dead one", FsckSettings, "services.cli.fsck"),
    "pools": Command("state folders, and what dead owners left", PoolsSettings, "services.cli.pools"),
    "prefix list": Command("prefixes that stay cached", PrefixListSettings, "services.cli.prefix", "list_pins"),
    "prefix pin": Command("keep a prefix cached", PrefixPinSettings, "services.cli.prefix", "pin"),
    "prefix unpin": Command("give one back to the cache", PrefixUnpinSettings, "services.cli.prefix", "unpin"),
    "torture": Command("faults without end, every stream checked", TortureSettings, "services.torture.main"),
    "failpoint list": Command(
        "where a fault can be put", FailpointListSettings, "services.cli.failpoint", "list_points"
    ),
    "failpoint arm": Command("put faults into a process", FailpointArmSettings, "services.cli.failpoint", "arm"),
    "kvmanager": Command("the owner of the pages, in the foreground", KvManagerSettings, "kvmanager.main"),
    "executor": Command("what runs the model, in the foreground", ExecutorSettings, "services.executor.main"),
    "frontend": Command("the public gRPC server, in the foreground", FrontendSettings, "services.frontend.main"),
}
# What each component is set up with under `run`.
COMPONENTS: Final[dict[str, type[SupervisorSettings]]] = {
    "kvmanager": RunKvManagerSettings,
    "executor": RunExecutorSettings,
    "frontend": RunFrontendSettings,
}


def main() -> int:
    """Returns the exit code: 0 done, 1 failed, 2 wrong usage, 78 wrong set-up."""
    arguments = sys.argv[1:]
    match arguments:
        case [] | ["-h" | "--help", *_]:
            print(_overview())
            return 0 if arguments else EXIT_USAGE
        case ["-V" | "--version", *_]:
            print(f"pagehold {pagehold.__version__}")
            return 0
        case ["run", name, *rest] if name in COMPONENTS:
            from pagehold.runtime import descriptors
            from services.supervisor import run

            descriptors.prepare()
            component = _read(COMPONENTS[name], rest, f"run {name}")
            return run.main(name, component)
        case ["run", *rest]:
            print(f"usage: pagehold run {{{','.join(COMPONENTS)}}} [FLAGS OF THE COMPONENT]")
            return 0 if rest[:1] in (["-h"], ["--help"]) else EXIT_USAGE
        case [("prefix" | "failpoint") as group, action, *rest] if f"{group} {action}" in COMMANDS:
            return _run(f"{group} {action}", rest)
        case [("prefix" | "failpoint") as group, *rest]:
            actions = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
            print(f"usage: pagehold {group} {{{','.join(actions)}}} [FLAGS]")
            return 0 if rest[:1] in (["-h"], ["--help"]) else EXIT_USAGE
        case [name, *rest] if name in COMMANDS:
            return _run(name, rest)
        case _:
            print(f"pagehold: no command {arguments[0]!r}; see pagehold --help", file=sys.stderr)
            return EXIT_USAGE


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    found = _read(command.settings, arguments, name)
    if isinstance(found, ComponentSettings):
        from pagehold.runtime import descriptors

        descriptors.prepare()
    if isinstance(found, ComponentSettings) and found.parent_pid:
        from pagehold.runtime.process import die_with_parent

        die_with_parent(found.parent_pid)
    return command.run(found)


def _overview() -> str:
    lines = ["usage: pagehold COMMAND [FLAGS]", "", "LLM serving whose streams survive the death of any component.", ""]
    rows = {name: command.help for name, command in COMMANDS.items()}
    rows["run COMPONENT"] = "one component under a supervisor of its own"
    lines += [f"  {name:<14} {text}" for name, text in rows.items()]
    lines += ["", "Each flag can be set as PAGEHOLD_FLAG in the environment, or in the TOML file that PAGEHOLD_CONFIG"]
    lines += ["names. `pagehold COMMAND --help` lists them."]
    return "\n".join(lines)


def _read(kind: type[Found], arguments: list[str], name: str) -> Found:
    """The command's settings. Exits with one line for each thing that is wrong."""
    try:
        return kind(_cli_parse_args=arguments, _cli_prog_name=f"pagehold {name}")
    except ValidationError as error:
        for wrong in error.errors():
            flag = "--" + str(wrong["loc"][0]).replace("_", "-") if wrong["loc"] else "flags"
            message = wrong["msg"].removeprefix("Value error, ")
            print(f"pagehold {name}: {flag}: {message[:1].lower()}{message[1:]}", file=sys.stderr)
    except (SettingsError, OSError, ValueError) as error:
        print(f"pagehold {name}: {error}", file=sys.stderr)
    sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    sys.exit(main())
