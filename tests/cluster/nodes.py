"""Machines made of namespaces: a network, processes, a host name and a disk each; sshd is all that runs on them."""

import os
import signal
import subprocess
import time
from pathlib import Path

NET = "10.77.0"
ALONE = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
SSHD = """Port 22
HostKey /root/.ssh/host_key
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
Subsystem sftp internal-sftp
AcceptEnv LANG
"""


def bridge() -> None:
    """The network that the machines are on; this one is .1 in it."""
    for command in ("link set lo up", "link add br0 type bridge", f"addr add {NET}.1/24 dev br0", "link set br0 up",
                    "route add default dev br0"):  # fmt: skip
        subprocess.run(["ip", *command.split()], check=True)


def key_pair(path: Path) -> str:
    """A new ssh key at `path`; returns its public half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text()


class Node:
    """A machine that answers to ssh by `public_key`. keep: folders that it sees; hide: those that it does not."""

    def __init__(self, number: int, name: str, base: Path, public_key: str, keep: list[Path], hide: list[Path]) -> None:
        self.name, self.address, folder = name, f"{NET}.{number}", base / name
        home = base / f"{name}.home"
        key_pair(home / ".ssh" / "host_key")
        (home / ".ssh" / "authorized_keys").write_text(public_key)
        (home / ".ssh" / "sshd_config").write_text(SSHD)
        (home / ".bashrc").touch()
        folder.mkdir()
        script = Path(__file__).with_name("node.sh")
        words = [self.name, self.address, str(folder), ":".join(map(str, keep)), ":".join(map(str, hide))]
        self.log = (base / f"{name}.log").open("w")
        self.process = subprocess.Popen([*ALONE, "bash", script, *words], stdout=self.log, stderr=self.log)
        time.sleep(0.5)  # until the namespaces are there
        cable = f"link add {name} type veth peer name eth0 netns {self.process.pid}"
        for command in (cable, f"link set {name} master br0", f"link set {name} up"):
            subprocess.run(["ip", *command.split()], check=True)

    def lose(self) -> None:
        """As if its power was cut: every process is gone at once, and nobody says goodbye."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def processes(self) -> list[str]:
        """The command lines of what runs on it."""
        mine = os.readlink(f"/proc/{self.init()}/ns/pid") if self.process.poll() is None else ""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mine and os.readlink(folder / "ns" / "pid") == mine:
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
            except OSError:
                continue
        return [line for line in found if line]

    def init(self) -> int:
        """The process id, here, of the machine's first process."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])
