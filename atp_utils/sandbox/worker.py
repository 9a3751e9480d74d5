"""What runs inside the sandbox: a warm process that forks once a call (`sandbox.py` is the host's side).

It imports the standard library, numpy and sympy, because nothing else exists in there. The order of steps is
the safety: the worker imports the libraries once; each call is a fork that takes on its limits and its filter
*before* it sees any of the model's code. The worker itself never runs such code, and takes a bounded number
of bytes from the fork that does.
"""

import ast
import contextlib
import ctypes
import errno
import gc
import importlib
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types

# --- The filter: which system calls ---------------------------------------------------------------

# What arithmetic in Python needs: name, x86_64's number, aarch64's number. All else is refused: sockets,
# forks, threads, programs, signals, ptrace, namespaces, changes to files, io_uring and whatever comes next.
CALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
mremap 25 216, madvise 28 233, brk 12 214, pread64 17 67, readv 19 65, writev 20 66, getcwd 79 17,
getdents64 217 61, newfstatat 262 79, statx 332 291, faccessat 269 48, faccessat2 439 439, readlinkat 267 78,
openat 257 56, fcntl 72 25, ioctl 16 29, dup 32 23, dup3 292 24, pipe2 293 59, ppoll 271 73, pselect6 270 72,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
rt_sigtimedwait 128 137, sigaltstack 131 132, restart_syscall 219 128, getitimer 36 102, setitimer 38 103,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
times 100 153, sched_yield 24 124, sched_getaffinity 204 123, futex 202 98, set_robust_list 273 99,
rseq 334 293, membarrier 324 283, getrandom 318 278, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getrusage 98 165,
getrlimit 97 163, prlimit64 302 261, sysinfo 99 179, uname 63 160, exit 60 93, exit_group 231 94,
open 2 -, stat 4 -, lstat 6 -, access 21 -, readlink 89 -, poll 7 -, select 23 -, dup2 33 -, pipe 22 -,
alarm 37 -, pause 34 -, time 201 -, getdents 78 -
"""
# Machine -> (column of CALLS, the kernel's AUDIT_ARCH number).
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}

_TMPFILE = 0o20000000  # the kernel's __O_TMPFILE
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | _TMPFILE
# Which argument, and either bits that must be clear or the only values allowed. fcntl leaves out F_SETOWN and
# F_SETSIG, through which the kernel would send signals to another process on our behalf.
ARGUMENT_RULES = {
    "open": (1, "clear", _WRITING),
    "openat": (2, "clear", _WRITING),
    "fcntl": (1, "among", (0, 1, 2, 3, 4, 1030)),  # duplicate; get and set its flags; F_DUPFD_CLOEXEC
    "ioctl": (1, "among", (0x5401, 0x5450, 0x5451)),  # TCGETS (isatty), FIONCLEX, FIOCLEX
    "prlimit64": (0, "among", (0,)),  # its own limits, never the worker's
}
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def build_filter(machine):
    """The BPF program for `machine` (a key of MACHINES) as bytes, 8 a step; ValueError for another.

    Assembled here, so that no libseccomp is needed.
    """
    if machine not in MACHINES:
        raise ValueError(f"no system-call table for machine {machine!r}, only for {', '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for entry in CALLS.split(","):
        call_row = entry.split()
        if call_row[column] != "-":
            steps += _allow(int(call_row[column]), ARGUMENT_RULES.get(call_row[0]))
    # Calls newer than 2019 (424 and up, on both machines) look missing rather than forbidden, so that the C
    # library falls back on older ones. x32's numbers, far above, get the same answer.
    steps += [(_AT_LEAST, 0, 1, 424), (_RETURN, 0, 0, _ENOSYS), (_RETURN, 0, 0, _EPERM)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _allow(number, rule):
    """Steps that allow call `number` under `rule`; a step is (code, jump if true, jump if false, value)."""
    if rule is None:
        return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    argument, kind, value = rule
    if kind == "clear":
        tests = [(_ANY_BIT, 0, 1, value)]
    else:
        tests = [(_EQUAL, len(value) - i, 0, one) for i, one in enumerate(value)]
    tests += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    # The kernel takes these arguments as 32 bits, so their low half is all there is to look at.
    return [(_EQUAL, 0, len(tests) + 1, number), (_LOAD, 0, 0, 16 + 8 * argument), *tests]


def install_filter(program):
    """Put `program` on this process for good; OSError if the kernel won't take it."""
    loaded = _Program(len(program) // 8, program)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    _c("prctl", no_new_privileges, 1, 0, 0, 0)
    _c("prctl", set_seccomp, filter_mode, ctypes.byref(loaded), 0, 0)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


_libc = ctypes.CDLL(None, use_errno=True)


def _c(function, *arguments):
    """Call a function of the C library; OSError where it answers -1."""
    if getattr(_libc, function)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")


# --- One call, in a fork --------------------------------------------------------------------------

REPORT_FD, REPORT_LINE, REPORT_BYTES = 3, 500, 502
# A report opens with CONFINED, written before the code runs, which therefore can't say that it wasn't.
CONFINED, FINISHED, FAILED, NO_MEMORY = b"C", b"F", b"E", b"M"
STATUS = {FINISHED: "ok", FAILED: "error", NO_MEMORY: "memory"}
PREIMPORTED = {}


def confine(limits):
    """Take on `limits` for good: rlimits, then the filter where there is one."""
    cpu, memory = limits["cpu_seconds"], limits["memory_bytes"]
    wanted = {"AS": memory, "FSIZE": 0, "CORE": 0, "NOFILE": 64, "NPROC": 0, "MEMLOCK": 0, "STACK": 8 << 20}
    for name, most in wanted.items():
        kind = getattr(resource, "RLIMIT_" + name)
        ceiling = resource.getrlimit(kind)[1]
        most = most if ceiling == resource.RLIM_INFINITY else min(most, ceiling)
        resource.setrlimit(kind, (most, most))
    # The soft limit's signal says that it was the CPU limit; the hard one ends who ignores it a second later.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    if limits["filter"]:
        install_filter(limits["filter"])


def run_fork(job, limits, output_fd, report_fd):
    """Body of the fork: become the confined process, do `job`, report, end. Never returns."""
    report = b""
    try:
        os.dup2(output_fd, 1)
        os.dup2(report_fd, REPORT_FD)
        os.closerange(REPORT_FD + 1, 4096)  # above all the worker's pipes to the host
        confine(limits)
        os.write(REPORT_FD, CONFINED)
        job()
        sys.__stdout__.flush()
        report = FINISHED
    except BaseException as error:
        report = _report_on(error)
    with contextlib.suppress(BaseException):
        os.write(REPORT_FD, report)
    os._exit(0)


def _report_on(error):
    """Kind of ending and the traceback's last line, as bytes."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return FINISHED
    kind = NO_MEMORY if isinstance(error, MemoryError) else FAILED
    try:
        line = traceback.format_exception_only(type(error), error)[-1].strip()
        return kind + line.encode("utf-8", "backslashreplace")[:REPORT_LINE]
    except BaseException:  # a hostile __str__, or memory still short
        return kind


def run_code(code, seed):
    """Execute `code` like a script; print the repr of a last expression that isn't None, like a REPL."""
    random.seed(seed)  # numpy's state comes seeded from the worker, but this one is renewed by a fork
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(PREIMPORTED)
    tree = ast.parse(code, "<tool>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<tool>", "exec"), main.__dict__)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<tool>", "eval"), main.__dict__)
        if value is not None:
            print(repr(value))


# --- The worker's side of a call ------------------------------------------------------------------


def call(job, limits, host_fd=None):
    """Run `job` in a confined fork and watch it; a dict with status, output (text) and error (one line)."""
    deadline = time.monotonic() + limits["wall_seconds"]
    output_read, output_write = os.pipe()
    report_read, report_write = os.pipe()
    child = os.fork()
    if child == 0:
        run_fork(job, limits, output_write, report_write)
    os.close(output_write)
    os.close(report_write)
    room = {output_read: limits["output_bytes"], report_read: REPORT_BYTES}
    stop, kept = _watch(room, deadline, host_fd)
    ended = None if stop else _wait(child, deadline)
    if ended is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if stop == "host gone":
        os._exit(1)
    os.close(output_read)
    os.close(report_read)
    output, report = (bytes(kept[fd]) for fd in room)
    status, error = _ending(*ended, report, limits) if ended else _stopped(stop or "timeout", limits)
    return {"status": status, "output": output.decode("utf-8", "replace"), "error": error}


def _watch(room, deadline, host_fd):
    """Read the pipes of `room` (fd -> most bytes to keep) until they close or there is a reason to stop.

    Returns (that reason or "", fd -> bytes).
    """
    kept = {fd: bytearray() for fd in room}
    poller, still_open = select.poll(), set(room)
    for fd in room:
        poller.register(fd, select.POLLIN)
    if host_fd is not None:
        poller.register(host_fd, 0)  # tells of its closing alone
    while still_open:
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout", kept
        for fd, _ in poller.poll(left * 1000 + 1):
            if fd == host_fd:
                return "host gone", kept
            chunk = os.read(fd, 65536)
            if not chunk:
                poller.unregister(fd)
                still_open.discard(fd)
            space = room[fd] - len(kept[fd])
            kept[fd] += chunk[:space]
            if len(chunk) > space:
                return "output_limit", kept
    return "", kept


def _wait(child, deadline):
    """(exit status, usage) of a fork whose pipes closed; None at the deadline (it closed them itself)."""
    while time.monotonic() < deadline:
        pid, code, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return code, usage
        time.sleep(0.0002)
    return None


def _stopped(status, limits):
    """(status, error) of a fork that the worker had to end."""
    if status == "timeout":
        return status, f"stopped after {limits['wall_seconds']:g} s"
    return status, f"more than {limits['output_bytes']} bytes of output"


def _ending(code, usage, report, limits):
    """(status, error) of a fork that ended; the report is its word on itself alone."""
    if os.WIFSIGNALED(code):
        number, spent = os.WTERMSIG(code), usage.ru_utime + usage.ru_stime
        if number == signal.SIGXCPU or number == signal.SIGKILL and spent >= limits["cpu_seconds"]:
            return "timeout", f"more than {limits['cpu_seconds']} s of CPU time"
        return "killed", f"killed by {signal.Signals(number).name}"
    kind, line = report[1:2], report[2:].decode("utf-8", "replace")
    if not report.startswith(CONFINED):
        return "not confined", report.decode("utf-8", "replace")
    if kind not in STATUS:
        return "killed", f"the process ended itself, exit code {os.WEXITSTATUS(code)}"
    return STATUS[kind], line


# --- Probes: is the isolation real? ---------------------------------------------------------------


def probe(limits, hidden):
    """What the isolation failed to stop, as a list of names: the namespaces tried alone, then the filter."""

    def in_fork(attempts, program, refusal):
        reply = call(lambda: print("\n".join(_breaches(attempts, refusal))), {**limits, "filter": program})
        failed = [f"the probe itself ({reply['status']}: {reply['error']})"] * (reply["status"] != "ok")
        return [name for name in reply["output"].splitlines() if name] + failed

    return in_fork(_namespace_attempts(limits, hidden), b"", None) + in_fork(
        _filter_attempts(), limits["filter"], errno.EPERM
    )


def _breaches(attempts, refusal):
    """Names of the attempts that no OSError stopped (none with the number `refusal`, where one is given)."""
    found = []
    for name, attempt in attempts.items():
        try:
            attempt()
            found.append(name)
        except OSError as error:
            if refusal not in (None, error.errno):
                found.append(f"{name} ({error})")
    return found


def _namespace_attempts(limits, hidden):
    """What bubblewrap's view and the rlimits must stop without the filter's help."""
    secret, writable = ["/etc/passwd", "/proc/self", *hidden], ["/", "/box", "/tmp"]
    return {
        **{f"reading {path}": lambda path=path: os.stat(path) for path in secret},
        **{f"writing in {path}": lambda path=path: os.mkdir(path + "/probe") for path in writable},
        "reaching the network": lambda: socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 9)),
        "sharing the host's processes": _parent_is_not_first,
        "privileges": lambda: os.chroot("/"),
        "memory beyond the limit": lambda: mmap.mmap(-1, limits["memory_bytes"]),
    }


def _parent_is_not_first():
    if os.getppid() == 1:  # the worker is the first process of a world of its own
        raise ProcessLookupError


def _filter_attempts():
    """What the filter must refuse, whatever the namespaces say."""
    return {
        "opening a socket": socket.socket,
        "forking": lambda: os.fork() or os._exit(0),
        "running a program": lambda: os.execv("/nothing", ["nothing"]),
        "opening a file to write": lambda: os.open("/probe", os.O_CREAT | os.O_WRONLY),
        "signalling the worker": lambda: os.kill(os.getppid(), 0),
        "tracing the worker": lambda: _c("ptrace", 0x4206, os.getppid(), 0, 0),  # PTRACE_SEIZE: stops nobody
        "making a namespace": lambda: _c("unshare", 0x10000000),  # CLONE_NEWUSER
    }


# --- Serving --------------------------------------------------------------------------------------


def serve(null_fd):
    """Answer the host's requests until it closes the pipe; `null_fd` is /dev/null, as there is no /dev."""
    requests, replies = os.dup(0), os.dup(1)
    start = _receive(requests)
    limits = start["limits"]
    import_libraries(start["paths"])
    PREIMPORTED["np"].random.seed(limits["seed"])
    limits["filter"] = build_filter(os.uname().machine)
    breaches = probe(limits, start["hidden"])
    for fd in (0, 2):  # nothing to read, and what is written to stderr goes nowhere
        os.dup2(null_fd, fd)
    os.close(null_fd)
    _send(replies, {"id": start["id"], "breaches": breaches})
    while True:
        request = _receive(requests)
        reply = call(lambda code=request["code"]: run_code(code, limits["seed"]), limits, requests)
        _send(replies, {"id": request["id"], **reply})


def import_libraries(paths):
    """Import once what calls may use, from `paths` and the standard library."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here] + paths
    for name, short in (("math", 0), ("itertools", 0), ("fractions", 0), ("numpy", "np"), ("sympy", "sp")):
        PREIMPORTED[name] = PREIMPORTED[short or name] = importlib.import_module(name)
    sympy = PREIMPORTED["sympy"]
    sympy.solve(sympy.Symbol("x") ** 2 - 2)  # brings in what sympy imports late
    sys.argv[:] = [""]
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a time-out is kept
    gc.collect()
    gc.freeze()  # a fork's collector then doesn't touch, and so copy, the worker's pages


def _receive(fd):
    """The next message (4 bytes of length, JSON); ends the worker when the host has closed the pipe."""
    size = int.from_bytes(_read(fd, 4), "big")
    return json.loads(_read(fd, size))


def _read(fd, size):
    data = b""
    while len(data) < size:
        chunk = os.read(fd, size - len(data))
        if not chunk:
            os._exit(0)
        data += chunk
    return data


def _send(fd, message):
    data = json.dumps(message).encode()
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(fd, data) :]


if __name__ == "__main__":
    serve(int(sys.argv[1]))
