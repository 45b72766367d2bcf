"""What is needed beyond Python packages: looked for, and installed or named with the command that installs it.

    python3 -m tools.needs run llama          for the demo
    python3 -m tools.needs test               for the tests
    python3 -m tools.needs test --strict      for CI: anything that is missing is an error

As root on Debian, what is missing is installed; elsewhere, and with --show, the command is printed. What only tests
need may be missing: a test that needs it is skipped, and tests/conftest.py counts those by the names used here.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tools.steps import Step

#: Programs for administrators are not in the PATH of other users everywhere.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
INSTALLERS = {"apt-get": "apt-get install -y", "dnf": "dnf install -y", "pacman": "pacman -S --needed"}
#: A service manager runs on this machine.
BOOTED = Path("/run/systemd/system")


@dataclass(frozen=True)
class Need:
    name: str
    #: "run", "test", or the extra of llama.cpp that needs it.
    group: str
    reason: str
    is_there: Callable[[], bool]
    #: What to install, for each of INSTALLERS.
    packages: tuple[str, str, str]


def program(*names: str) -> Callable[[], bool]:
    """All of them are there."""
    return lambda: all(shutil.which(name, path=PATH) for name in names)


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def browser() -> str | None:
    """The variable CHROMIUM names another one than those of the system."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def compiler() -> bool:
    return any(shutil.which(name) for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))


VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
NEEDS = (
    Need("venv", "run", "Python's virtual environments", lambda: find_spec("ensurepip") is not None,
         (f"{VERSION}-venv", "python3", "python")),
    Need("libgomp", "llama", "the prebuilt llama.cpp", lambda: has_library("libgomp.so.1"),
         ("libgomp1", "libgomp", "gcc-libs")),
    Need("c++", "llama-native", "compiling llama.cpp", compiler, ("g++", "gcc-c++", "gcc")),
    Need("systemd", "test", "tests of the units, under a manager of their own",
         program("systemctl", "systemd-analyze", "systemd-sysusers", "systemd-tmpfiles"),
         ("systemd", "systemd", "systemd")),
    Need("ip", "test", "tests in networks of their own", program("unshare", "nsenter", "mount", "ip"),
         ("util-linux iproute2", "util-linux iproute", "util-linux iproute2")),
    Need("sshd", "test", "tests of fleets over ssh", program("sshd", "ssh", "ssh-keygen"),
         ("openssh-server openssh-client", "openssh-server openssh-clients", "openssh")),
    Need("openssl", "test", "certificates for tests", program("openssl"), ("openssl", "openssl", "openssl")),
    Need("nc", "test", "the test of the bridge with netcat", program("nc"),
         ("netcat-openbsd", "netcat", "openbsd-netcat")),
    Need("chromium", "test", "tests of the dashboard", lambda: browser() is not None,
         ("chromium fonts-dejavu-core", "chromium dejavu-sans-fonts", "chromium ttf-dejavu")),
    Need("libatomic", "test", "the driver of that browser", lambda: has_library("libatomic.so.1"),
         ("libatomic1", "libatomic", "gcc-libs")),
)  # fmt: skip
BY_NAME = {need.name: need for need in NEEDS}


def install_command(needs: Iterable[Need]) -> str:
    """For a person: as root, for the package manager that is here."""
    number, installer = next(
        ((number, name) for number, name in enumerate(INSTALLERS) if shutil.which(name)), (0, "apt-get")
    )
    packages = " ".join(dict.fromkeys(package for need in needs for package in need.packages[number].split()))
    return f"{'' if os.geteuid() == 0 else 'sudo '}{INSTALLERS[installer]} {packages}"


def install(needs: list[Need]) -> None:
    """Debian's packages, as root. SystemExit with the words of apt-get if that fails."""
    if BOOTED.is_dir() and any(need.name == "sshd" for need in needs):
        # The package would start a server that listens to all the world. The tests start their own.
        subprocess.run(["systemctl", "--quiet", "mask", "ssh.service", "ssh.socket"], check=False)
        print("needs: ssh.service is masked, so that no ssh server runs on this machine; systemctl unmask allows it")
    packages = [package for need in needs for package in need.packages[0].split()]
    words = ["install", "-y", "--no-install-recommends", "-o", "APT::Status-Fd=3", *packages]
    with Step(f"needs: installs {' '.join(packages)}") as step:
        if apt(words, step):
            # The lists are missing, or name versions that are gone.
            why = apt(["update"], step) or apt(words, step)
            if why:
                raise SystemExit(f"{why}\nneeds: apt-get failed; try: {install_command(needs)}")


def apt(words: list[str], step: Step) -> str:
    """What it wrote if it failed, and otherwise nothing."""
    reading, writing = os.pipe()
    shell = ["sh", "-c", f'exec 3>&{writing} && exec apt-get -q "$@"', "sh", *words]
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(
            shell, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[writing], env=environ
        ) as running:
            os.close(writing)
            with os.fdopen(reading) as states:
                for state in states:
                    # kind:package:percent:text
                    kind, _, rest = state.partition(":")
                    if kind in ("dlstatus", "pmstatus"):
                        percent = rest.partition(":")[2].partition(":")[0]
                        step.at("downloads" if kind == "dlstatus" else "unpacks", float(percent) / 100)
        output.seek(0)
        return output.read().strip() if running.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", help="run, test, and the extras of llama.cpp that are wanted")
    parser.add_argument("--show", action="store_true", help="install nothing, print the command")
    parser.add_argument("--strict", action="store_true", help="what tests need is an error if it is missing")
    given = parser.parse_args()
    groups = {group for words in given.groups for group in words.split(",")}
    missing = [need for need in NEEDS if need.group in groups and not need.is_there()]
    if missing and not given.show and os.geteuid() == 0 and shutil.which("apt-get"):
        for group in dict.fromkeys(need.group for need in missing):
            try:
                install([need for need in missing if need.group == group])
            except SystemExit as refused:
                print(refused.code, file=sys.stderr)
        missing = [need for need in missing if not need.is_there()]
    if not missing:
        return 0
    for need in missing:
        print(f"needs: there is no {need.name}, for {need.reason}", file=sys.stderr)
    print(f"needs: install it: {install_command(missing)}", file=sys.stderr)
    if {need.group for need in missing} == {"test"} and not given.strict:
        print("needs: tests that need them are skipped", file=sys.stderr)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
