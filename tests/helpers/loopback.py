"""A board that is this machine: a real ssh server on 127.0.0.1, with keys of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


def missing() -> str | None:
    """Returns why there can be no such server here."""
    if os.geteuid() != 0:
        return "an ssh server that lets its own user in needs root here"
    tools = [tool for tool in ("sshd", "ssh", "ssh-keygen") if shutil.which(tool, path=_PATH) is None]
    return f"{', '.join(tools)} not installed" if tools else None


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"


@dataclass
class Loopback:
    """A running server, and how to reach it.

    Args:
        folder: keys, configuration, and the board's cache.
        process: the server.
        ssh_command: what reaches it.
    """

    folder: Path
    process: subprocess.Popen
    ssh_command: str

    def url(self, python: str = sys.executable, runtime: str = "onnxruntime", timeout: float = 600) -> str:
        return f"ssh://board?runtime={runtime}&python={python}&timeout={timeout}"

    def cut(self) -> None:
        """Cuts every connection, as a pulled cable would."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Leaves every connection open and every worker silent, as a board that hangs would."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for child in _descendants(self.process.pid):
            try:
                os.kill(child, number)
            except ProcessLookupError:
                continue

    def stop(self) -> None:
        self.cut()
        self.process.kill()
        self.process.wait()


def _descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = [tuple(map(int, line.split())) for line in found.splitlines()]
    children = [child for child, parent in parents if parent == pid]
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def start(folder: Path) -> Loopback:
    """Returns a server on a free port, which lets in one key and is known by its own."""
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "cache").mkdir()
    shutil.copyfile(folder / "user.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv XDG_CACHE_HOME={folder}/cache\n"
    )
    host_key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "ssh_config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  IdentityFile {folder}/user\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = shutil.which("sshd", path=_PATH)
    assert server is not None
    process = subprocess.Popen([server, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Loopback(folder, process, f"ssh -F {folder}/ssh_config")
        time.sleep(0.05)
    process.kill()
    raise RuntimeError("the ssh server did not start")
