"""Hosts on one machine: network namespaces with their own names, addresses, sshd and SLURM.

Every host has two interfaces: ``docker0`` with the same address everywhere, listed first, as on
hosts with containers; and ``eth0``, on which the hosts reach each other. Names are unique to each
cluster, so that several test runs on a machine do not meet; what a killed test run left behind is
removed by the next one. Needs root.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

TRAP_ADDRESS = "172.17.0.1/16"
NETWORK = "10.77.0"
NETNS = Path("/etc/netns")
"""``ip netns exec NAME`` mounts the files of NAME's directory here over those of /etc."""


def need(*programs: str, root: bool = True) -> None:
    """Skip the test where a program is missing; fail where DIST_PEFT_LAUNCHERS=required."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    missing = [f"no {p}" for p in programs if shutil.which(p) is None]
    if root and os.geteuid() != 0:
        missing.append("not root (network namespaces)")
    if missing:
        stop = pytest.fail if os.environ.get("DIST_PEFT_LAUNCHERS") == "required" else pytest.skip
        stop(f"cannot start a cluster: {', '.join(missing)}")


def wait_until(check: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


class Hosts:
    """``count`` hosts, and a switch between them that has an address itself."""

    own_name_is_loopback = True
    """As Debian installs it: a host's own name leads to 127.0.1.1."""

    def __init__(self, directory: Path, count: int = 2) -> None:
        self.directory = directory
        prefix = "d" + secrets.token_hex(2)
        self.names = [f"{prefix}n{i}" for i in range(1, count + 1)]
        self.switch = f"{prefix}c"
        self.addresses = {name: f"{NETWORK}.{i}" for i, name in enumerate(self.names, 1)}
        self.addresses[self.switch] = f"{NETWORK}.254"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        _remove_leftovers()
        for name in self.addresses:
            self._add_namespace(name)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "addr", "add", f"{NETWORK}.254/24", "dev", "br0")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names, 1):
            _ip("-n", name, "link", "add", "docker0", "type", "bridge")
            _ip("-n", name, "addr", "add", TRAP_ADDRESS, "dev", "docker0")
            _ip("-n", name, "link", "set", "docker0", "up")
            port = f"port{i}"
            ends = ("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self.switch, *ends)
            _ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _add_namespace(self, name: str) -> None:
        etc = NETNS / name
        etc.mkdir(parents=True)
        (etc / "owner").write_text(str(os.getpid()))
        addresses = dict(self.addresses)
        if self.own_name_is_loopback:
            addresses[name] = "127.0.1.1"
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in addresses.items())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")

    def close(self) -> None:
        for name in self.addresses:
            _remove(name)

    def kill(self, name: str) -> bool:
        """Kill all that runs on a host, as a power cut would; was there anything?"""
        return _kill(name)

    def has_process(self, name: str, word: str) -> bool:
        """Does a process with ``word`` in its command line run on a host?"""
        return bool(self.find_processes(name, word))

    def find_processes(self, name: str, word: str, program: str = "") -> list[int]:
        """The processes of ``program`` on a host that have ``word`` in their command line."""
        found = []
        for pid in _list_pids(name):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if program in words[0] and any(word in w for w in words):
                    found.append(pid)
        return found

    def command(self, name: str, *command: str) -> list[str]:
        """``command``, to be run on a host: its network, its /etc/hosts, its host name."""
        rename = 'hostname "$0" && exec "$@"'
        return [
            *("ip", "netns", "exec", name, "unshare", "--uts"),
            *("sh", "-c", rename, name, *command),
        ]

    def popen(
        self, name: str, *command: str, log: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(name, *command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def start_sshd(self) -> Path:
        """An sshd on each host; gives a directory with an ``ssh`` that has the key."""
        box = self.directory / "ssh"
        box.mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
        key = box / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(key.with_suffix(".pub"), box / "authorized_keys")
        sshd = [str(shutil.which("sshd")), "-D", "-f", "/dev/null", "-h", str(key)]
        for option in ("StrictModes no", "PermitRootLogin yes", "UsePAM no", "PidFile none"):
            sshd += ["-o", option.replace(" ", "=", 1)]
        sshd += ["-o", f"AuthorizedKeysFile={box / 'authorized_keys'}"]
        for name in self.names:
            self.popen(name, *sshd, log=box / f"sshd-{name}.log")
        (box / "bin").mkdir()
        client = box / "bin" / "ssh"
        options = f"-F /dev/null -i {key} -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        options += " -o UserKnownHostsFile=/dev/null"
        client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
        client.chmod(0o755)
        for name in self.names:
            reach = self.command(self.names[0], str(client), name, "true")
            wait_until(lambda r=reach: _succeeds(r), 60, f"sshd on {name}")
        return box / "bin"


class Slurm(Hosts):
    """Hosts with slurmd, and slurmctld on the switch."""

    own_name_is_loopback = False  # SLURM's own daemons need the real address

    def start(self) -> None:
        super().start()
        box = self.directory
        for part in ("state", "log", "spool"):
            (box / part).mkdir(parents=True)
        (box / "slurm.conf").write_text(self._configuration())
        # slurmd insists on a cgroup plugin; version 1 comes up without any mount
        (box / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for i in range(8):  # the devices need only exist: nothing opens them
            (box / f"gpu{i}").touch()
        (box / "gres.conf").write_text(f"Name=gpu File={box}/gpu[0-7]\n")
        env = {"SLURM_CONF": str(box / "slurm.conf")}
        self.popen(self.switch, "slurmctld", "-D", log=box / "log" / "slurmctld.out", env=env)
        for name in self.names:
            (box / "spool" / name).mkdir()
            self.popen(name, "slurmd", "-D", log=box / "log" / f"{name}.out", env=env)
        ready = len(self.names)
        wait_until(
            lambda: len(self.call("sinfo", "-hN", "-t", "idle", check=False).split("\n")) > ready,
            90,
            f"nodes idle; see {box / 'log'}",
        )

    def _configuration(self) -> str:
        box = self.directory
        settings = {
            "ClusterName": self.switch,
            "SlurmctldHost": self.switch,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/none",
            "CredType": "cred/none",
            "StateSaveLocation": box / "state",
            "SlurmdSpoolDir": box / "spool" / "%n",
            "SlurmctldPidFile": box / "state" / "slurmctld.pid",
            "SlurmdPidFile": box / "spool" / "%n" / "pid",
            "SlurmctldLogFile": box / "log" / "slurmctld.log",
            "SlurmdLogFile": box / "log" / "%n.log",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "SlurmdTimeout": 8,
            "KillWait": 3,
            "GresTypes": "gpu",
        }
        nodes = f"NodeName={','.join(self.names)} CPUs=64 RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
        lines = [f"{key}={value}" for key, value in settings.items()]
        return "\n".join([*lines, nodes, "PartitionName=all Nodes=ALL Default=YES State=UP", ""])

    def call(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Run a SLURM client on the switch; gives its output."""
        done = subprocess.run(
            self.command(self.switch, *command),
            capture_output=True,
            text=True,
            env={**os.environ, "SLURM_CONF": str(self.directory / "slurm.conf"), **(env or {})},
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """JobState of a job, such as RUNNING or COMPLETED."""
        words = self.call("scontrol", "show", "job", job).split()
        return next(w.partition("=")[2] for w in words if w.startswith("JobState="))

    def start_requeued(self, job: str) -> None:
        """Start a job that was requeued, which would wait two minutes."""
        time.sleep(2)  # slurmd refuses a job that comes back within the second of its end
        self.call("scontrol", "update", f"job={job}", "StartTime=now")

    def wait(self, job: str, seconds: float = 300) -> str:
        """Wait for a job's end; gives its state."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        wait_until(lambda: self.state(job) not in going, seconds, f"end of job {job}")
        return self.state(job)


def _list_pids(name: str) -> list[int]:
    found = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def _kill(name: str) -> bool:
    """Kill the processes of a namespace; was there any?"""
    pids = _list_pids(name)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def _remove(name: str) -> None:
    for _ in range(20):
        if not _kill(name):
            break
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    shutil.rmtree(NETNS / name, ignore_errors=True)


def _remove_leftovers() -> None:
    """Namespaces of test runs that are no more."""
    for owner in NETNS.glob("d*/owner"):
        with contextlib.suppress(FileNotFoundError):  # another run removes the same one
            if not Path("/proc", owner.read_text()).exists():
                _remove(owner.parent.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
