"""Hosts of our own: each a service manager in namespaces of its own, and a network cable to the first one.

    box  10.78.255.1   keeps the fleet, has the broker, and is where ssh is called
    far1 10.78.1.2     a `systemd --user` manager that starts an sshd when it is booted
    far2 10.78.2.2     the same

Keys of hosts and of the operator are made for the test. The box has an /etc/ssh/ssh_config of its own in its mount
namespace, as an operator would write it. What is run by ssh is written down by the hosts (`Far.ran`).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.integration.manager import LIMIT_S, Manager
from tests.integration.test_systemd import install

SSHD = "/usr/sbin/sshd"
#: The address of the box, on each of the hosts.
BOX = "10.78.255.1"
UNITS = "/run/rig/etc/systemd/user"
SSH_SERVICE = f"""
[Unit]
Description=ssh
[Service]
Type=notify
ExecStartPre=mkdir -p -m 0755 /run/sshd
ExecStart={SSHD} -D -f /run/rig/ssh/sshd_config
"""
#: SetEnv: on a real machine pam_systemd says the first of them at each login.
SSHD_CONFIG = """
HostKey /run/rig/ssh/host
AuthorizedKeysFile /run/rig/ssh/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
PidFile none
PrintLastLog no
SetEnv XDG_RUNTIME_DIR=/run/manager XDG_CONFIG_HOME=/run/rig/etc
ForceCommand /run/rig/ssh/record
"""
RECORD = """#!/bin/sh
printf '%s\\n' "$SSH_ORIGINAL_COMMAND" >> /run/rig/ssh/ran
exec sh -c "$SSH_ORIGINAL_COMMAND"
"""
SSH_CONFIG = """
Host *
    User root
    IdentityFile /run/rig/ssh/id
    IdentitiesOnly yes
    UserKnownHostsFile /run/rig/ssh/known_hosts
    GlobalKnownHostsFile /dev/null
Host far1
    HostName 10.78.1.2
Host far2
    HostName 10.78.2.2
"""


def make_key(path: Path) -> str:
    """The public one."""
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]
    subprocess.run(words, check=True, capture_output=True, timeout=LIMIT_S)
    return path.with_suffix(".pub").read_text()


class Box:
    def __init__(self, rig: Path) -> None:
        self.rig = rig
        self.ssh = rig / "ssh"
        self.ssh.mkdir(parents=True)
        self.public = make_key(self.ssh / "id")
        (self.ssh / "ssh_config").write_text(SSH_CONFIG)
        self.manager = Manager(rig, UNITS)
        self.manager.run("mount", "--bind", "/run/rig/ssh/ssh_config", "/etc/ssh/ssh_config")
        self.manager.run("ip", "addr", "add", f"{BOX}/32", "dev", "lo")

    def knows(self, far: Far) -> None:
        """Add its host key, as an operator does after comparing the fingerprint."""
        with (self.ssh / "known_hosts").open("a") as known:
            known.write(f"10.78.{far.number}.2 {far.public}")


class Far:
    """Off until it is switched on; its disk, the rig, outlives that."""

    def __init__(self, rig: Path, number: int, box: Box) -> None:
        self.rig, self.number = rig, number
        self._box = box
        ssh = rig / "ssh"
        ssh.mkdir(parents=True)
        self.public = make_key(ssh / "host")
        (ssh / "authorized_keys").write_text(box.public)
        (ssh / "sshd_config").write_text(SSHD_CONFIG)
        (ssh / "record").write_text(RECORD)
        (ssh / "record").chmod(0o755)
        wants = rig / "base/default.target.wants"
        wants.mkdir(parents=True)
        (rig / "base/ssh.service").write_text(SSH_SERVICE)
        (wants / "ssh.service").symlink_to("../ssh.service")
        self.manager: Manager | None = None

    @property
    def on(self) -> Manager:
        assert self.manager is not None, "it is switched off"
        return self.manager

    def install(self) -> None:
        install("--user", HOME=str(self.rig), XDG_CONFIG_HOME=str(self.rig / "etc"))

    def switch_on(self) -> None:
        """When it returns it has booted and its sshd listens, and it has a cable."""
        # Workers that are begun with it wait for the cable.
        self.manager = Manager(self.rig, UNITS, "Started ssh.service")
        near, cable = f"10.78.{self.number}.1", f"far{self.number}"
        on_box = ["nsenter", f"--target={self._box.manager.first}", "--net", "--", "ip"]
        for words in (
            # It is in here as long as the network at either end of it is there.
            f"link add {cable} type veth peer name eth0 netns {self.manager.first}",
            f"addr add {near}/24 dev {cable}",
            f"link set {cable} up",
        ):
            subprocess.run([*on_box, *words.split()], check=True, capture_output=True, timeout=LIMIT_S)
        for words in (f"addr add 10.78.{self.number}.2/24 dev eth0", "link set eth0 up", f"route add {BOX} via {near}"):
            self.manager.run("ip", *words.split())
        self.manager.systemctl("is-active", "ssh.service")

    def switch_off(self) -> None:
        """No goodbye: everything is killed at once, and the cable goes too."""
        manager, self.manager = self.manager, None
        if manager is not None:
            manager.close()

    def ran(self) -> str:
        """Every command that came by ssh."""
        return (self.rig / "ssh/ran").read_text()

    def files(self) -> dict[str, Path]:
        """What the fleet has put there."""
        return {path.name: path for path in (self.rig / "etc/llambo").glob("*worker-tiny-*")}
