"""What runs inside the sandbox: a warm process that forks once a call (`sandbox/__init__.py` is the host's side).

It imports the standard library, numpy and sympy, because nothing else exists in there. The order of steps is
the safety: the worker imports the libraries once, and never reads a request. For each it forks a keeper, which reads
this one and writes the reply; the code runs in a fork of the keeper, which takes on its limits and its filter *before*
it sees any of the model's code. So no memory that the code can search ever held another call. The keeper itself never
runs such code, and takes a bounded number of bytes from the fork that does.
"""

import ast
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import traceback
import types

# --- The filter: which system calls ---------------------------------------------------------------

# What arithmetic in Python needs: name, x86_64's number, aarch64's number. All else is refused: sockets, forks,
# threads, programs, signals, ptrace, namespaces, others' limits, changes to files, io_uring and whatever comes next.
# `open` may ask to write, but there is nothing that can be written.
CALLS = """
read 0 63, write 1 64, close 3 57, fstat 5 80, lseek 8 62, mmap 9 222, mprotect 10 226, munmap 11 215,
mremap 25 216, madvise 28 233, brk 12 214, pread64 17 67, readv 19 65, writev 20 66, getcwd 79 17,
getdents64 217 61, newfstatat 262 79, statx 332 291, faccessat 269 48, faccessat2 439 439, readlinkat 267 78,
openat 257 56, dup 32 23, dup3 292 24, pipe2 293 59, ppoll 271 73, pselect6 270 72, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128, getitimer 36 102,
setitimer 38 103, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114,
gettimeofday 96 169, times 100 153, sched_yield 24 124, sched_getaffinity 204 123, futex 202 98,
set_robust_list 273 99, rseq 334 293, membarrier 324 283, getrandom 318 278, getpid 39 172, gettid 186 178,
getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getrusage 98 165,
sysinfo 99 179, uname 63 160, exit 60 93, exit_group 231 94,
open 2 -, stat 4 -, lstat 6 -, access 21 -, readlink 89 -, poll 7 -, select 23 -, dup2 33 -, pipe 22 -,
alarm 37 -, pause 34 -, time 201 -, getdents 78 -
"""
# Machine -> (column of CALLS, the kernel's AUDIT_ARCH number).
MACHINES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050001


def build_filter(machine):
    """The BPF program for `machine` (a key of MACHINES) as bytes, 8 a step; ValueError for another.

    Assembled here, so that no libseccomp is needed. A step is (code, jump if true, jump if false, value).
    """
    if machine not in MACHINES:
        raise ValueError(f"no system-call table for machine {machine!r}, only for {', '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for entry in CALLS.split(","):
        number = entry.split()[column]
        if number != "-":
            steps += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (_RETURN, 0, 0, _EPERM)])


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
    answer = getattr(_libc, function)(*arguments)
    if answer == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return answer


# --- One call, in a fork --------------------------------------------------------------------------

REPORT_FD, REPORT_BYTES = 3, 500
FINISHED, FAILED, NO_MEMORY = b"F", b"E", b"M"
STATUS = {FINISHED: "ok", FAILED: "error", NO_MEMORY: "memory"}
PREIMPORTED = {}


def confine(memory_bytes, output_bytes):
    """Take on the limits for good: rlimits, then the filter. OSError, and no more, where one can't be had."""
    # One byte more than may be printed tells that there was more, and ends the call.
    for name, most in (("AS", memory_bytes), ("FSIZE", output_bytes + 1), ("NOFILE", 64), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    install_filter(build_filter(os.uname().machine))


def run_fork(code, memory_bytes, output_bytes, output_fd, report_fd):
    """Body of the fork: become the confined process, run `code`, report, end. Never returns."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would go on after too much output
        # 0 is the worker's socket to the host, which goes first; 1 is /dev/null.
        for fd, own in ((1, 0), (1, 2), (output_fd, 1), (report_fd, REPORT_FD)):
            os.dup2(fd, own)
        os.closerange(REPORT_FD + 1, 1024)
        confine(memory_bytes, output_bytes)
        run_code(code)
        os.write(REPORT_FD, FINISHED)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            os.write(REPORT_FD, _report_on(error))
    finally:
        os._exit(0)


def _report_on(error):
    """Kind of ending and the last of the traceback's lines that says something, as bytes."""
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return FINISHED
    kind = NO_MEMORY if isinstance(error, MemoryError) else FAILED
    try:
        lines = map(str.strip, traceback.format_exception_only(type(error), error))
        line = list(filter(None, lines))[-1]
        return kind + line.encode("utf-8", "backslashreplace")[:REPORT_BYTES]
    except BaseException:  # a hostile __str__, or memory still short
        return kind


def run_code(code):
    """Execute `code` like a script; print the repr of a last expression that isn't None, like a REPL."""
    random.seed(0)  # numpy's state comes seeded from the worker, but this one is renewed by a fork
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(PREIMPORTED)
    tree = ast.parse(code, "<tool>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<tool>", "exec"), main.__dict__)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<tool>", "eval"), main.__dict__)
        if value is not None:
            print(repr(value))


# --- The keeper's side of a call ------------------------------------------------------------------

LISTENING = 0.2  # seconds between two looks at whether the host still is


def call(code, wall_seconds, memory_bytes, output_bytes):
    """Run `code` in a confined fork and watch it; a dict with status, output (text) and error (one line)."""
    # Files in memory: a pipe would have to be emptied meanwhile, and rlimits bound what a file takes.
    output_fd, report_fd = (_c("memfd_create", name, 0) for name in (b"output", b"report"))
    deadline = time.monotonic() + wall_seconds
    child = os.fork()
    if child == 0:
        run_fork(code, memory_bytes, output_bytes, output_fd, report_fd)
    ended = _wait(child, deadline)
    output, report = os.pread(output_fd, output_bytes + 1, 0), os.pread(report_fd, REPORT_BYTES + 1, 0)
    os.close(output_fd)
    os.close(report_fd)
    text = output[:output_bytes].decode("utf-8", "replace")
    if len(output) > output_bytes:
        text += f"\n[output cut at {output_bytes} bytes]"
        status, error = "output_limit", f"more than {output_bytes} bytes of output"
    elif ended is None:
        status, error = "timeout", f"stopped after {wall_seconds:g} s"
    else:
        status, error = _ending(ended, report)
    return {"status": status, "output": text, "error": error}


def _wait(child, deadline):
    """Exit status of the fork; None where it was ended at the deadline, or because the host is gone."""
    host = select.poll()
    host.register(0, 0)  # tells of a closed socket, and of nothing else
    while True:
        pid, ended = os.waitpid(child, os.WNOHANG)
        if pid:
            return ended
        left = deadline - time.monotonic()
        if left <= 0 or host.poll(0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        signal.sigtimedwait({signal.SIGCHLD}, min(left, LISTENING))


def _ending(ended, report):
    """(status, error) of a fork that ended by itself; the report is its word on itself alone."""
    if os.WIFSIGNALED(ended):
        return "killed", f"killed by {signal.Signals(os.WTERMSIG(ended)).name}"
    kind, line = report[:1], report[1:].decode("utf-8", "replace")
    if kind not in STATUS:
        return "killed", f"the process ended itself, exit code {os.WEXITSTATUS(ended)}"
    return STATUS[kind], line


def answer():
    """Answer one request of the host (a line of JSON with the arguments of `call`); false where it closed the socket.

    The reply says who forked this process, which is the first of a world of its own.
    """
    with open(0, "rb", closefd=False) as requests:
        line = requests.readline()
    if line:
        reply = call(**json.loads(line)) | {"worker": os.getppid()}
        with open(0, "wb", closefd=False) as replies:
            replies.write(json.dumps(reply).encode() + b"\n")
    return bool(line)


def serve():
    """Fork a keeper for one request after the other, each before the request is there, until one doesn't answer."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # `_wait` takes it up
    import_libraries()
    answered = True
    while answered:
        keeper = os.fork()
        if keeper == 0:
            os._exit(0 if answer() else 1)
        answered = os.waitpid(keeper, 0)[1] == 0


def import_libraries():
    """Import once what calls may use."""
    for name, short in (("math", 0), ("itertools", 0), ("fractions", 0), ("numpy", "np"), ("sympy", "sp")):
        PREIMPORTED[name] = PREIMPORTED[short or name] = importlib.import_module(name)
    PREIMPORTED["np"].random.seed(0)
    PREIMPORTED["sp"].solve(PREIMPORTED["sp"].Symbol("x") ** 2 - 2)  # brings in what sympy imports late
    gc.collect()
    gc.freeze()  # a fork's collector then doesn't touch, and so copy, the worker's pages


if __name__ == "__main__":
    serve()
