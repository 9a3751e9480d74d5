"""Running one notebook: what it may overwrite, where its sockets and its progress go."""

import os
import signal
import socket
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from atp_utils import ROOT, resolve, run

BOOK = "notebooks/01_generate_data.ipynb"


def notebook(path, *cells, **metadata):
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata |= {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A notebook of one cell without parameters."""
    monkeypatch.setattr(run.parameters, "check", lambda _, values: values)
    return notebook(tmp_path / "book.ipynb", "print(6 * 7)")


def executed(path):
    return nbformat.read(path, as_version=4).cells[-1].outputs[0].text


def test_an_executed_notebook_is_replaced(book, tmp_path):
    out = tmp_path / "out.ipynb"
    run.run(book, out, {})
    assert executed(out) == "42\n"
    notebook(book, "print(6 * 8)")
    run.run(book, out, {})
    assert executed(out) == "48\n"
    # A job that was killed in the middle of writing must not keep the next one from starting.
    for left in out.read_text()[: out.stat().st_size // 2], "":
        out.write_text(left)
        run.run(book, out, {})
        assert executed(out) == "48\n"


def test_nothing_else_is_replaced(book, tmp_path, monkeypatch):
    monkeypatch.setattr(run.papermill, "execute_notebook", lambda *_, **__: pytest.fail("work began"))
    other = notebook(tmp_path / "other.ipynb", "print(1)")
    text = tmp_path / "README.md"
    text.write_text("# Mine\n")
    itself = notebook(tmp_path / "itself.ipynb", "print(1)", papermill={"version": "2"})
    link = tmp_path / "link.ipynb"
    link.symlink_to(itself)
    for source, out in (book, other), (book, text), (book, book), (itself, itself), (itself, link), (book, tmp_path):
        before = out.read_bytes() if out.is_file() else None
        with pytest.raises(FileExistsError, match=out.name):
            run.run(source, out, {})
        assert before is None or out.read_bytes() == before


def test_the_command_line_names_what_it_will_not_replace(tmp_path, capsys):
    before = resolve(BOOK).read_bytes()
    for out in ("README.md", "notebooks/02_align_dpo.ipynb", BOOK):
        assert run.main([BOOK, out]) == 2
        assert capsys.readouterr().err == (
            f"error: {out} is no executed notebook and stays: name another file, or remove it\n"
        )
    assert resolve(BOOK).read_bytes() == before


def test_a_long_temporary_folder_is_no_obstacle(book, tmp_path):
    """Sockets of a kernel stand in a file system, and the system limits their paths."""
    long = tmp_path / ("t" * 98)
    long.mkdir()
    code = "import sys; from atp_utils import run; run.parameters.check = lambda _, v: v; run.run(*sys.argv[1:], {})"
    done = subprocess.run(
        [sys.executable, "-c", code, str(book), str(tmp_path / "out.ipynb")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(long)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert executed(tmp_path / "out.ipynb") == "42\n" and not list(long.iterdir())


def test_progress_goes_to_a_log_and_not_to_a_socket(tmp_path):
    """A cluster's job writes to a pipe or a file; ssh without a terminal gives a socket, which can't be opened."""
    command = [sys.executable, "-c", "from atp_utils import run; print(run.progress_file())"]
    ours, theirs = socket.socketpair()
    with ours, theirs, (tmp_path / "log").open("w") as log:
        for stderr, expected in (theirs, os.devnull), (log, "/fd/2"), (subprocess.PIPE, "/fd/2"):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, check=True)
            assert done.stdout.strip().endswith(expected)


HOLDS = """import sys
from atp_utils import run
held = run.one_of(2)
print(held.__enter__(), flush=True)
sys.stdin.read()"""


def test_runs_side_by_side_have_a_gpu_each_and_one_too_many_waits(monkeypatch):
    """Numbers alone: no GPU is asked."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{os.getpid()}a,{os.getpid()}b,{os.getpid()}c")
    names = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    with run.one_of(2) as first:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == first == names[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
        other = subprocess.Popen([sys.executable, "-c", HOLDS], cwd=ROOT, stdin=-1, stdout=-1, text=True)
        assert other.stdout.readline().strip() == names[1]
        waiting = subprocess.Popen([sys.executable, "-c", HOLDS], cwd=ROOT, stdin=-1, stdout=-1, text=True)
        other.kill()  # what it held is free again
        assert waiting.stdout.readline().strip() == names[1]
        waiting.communicate("")
    other.communicate()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(names)
    for name in names[:2]:
        os.unlink(f"/tmp/atp-{os.getuid()}-gpu-{name}")


# --- Profiles ----------------------------------------------------------------------------------------------


@pytest.fixture
def values(monkeypatch):
    """``values(book, profile, *words)``: what a call of the command line would run the notebook with."""
    given = []
    monkeypatch.setattr(run, "run", lambda _, out, values: given.append(values))

    def of(book, profile, *words):
        return run.main([f"notebooks/{book}.ipynb", "out.ipynb", "--profile", str(profile), *words]) or given.pop()

    return of


def test_a_profile_counts_for_the_notebooks_own_scenario_and_the_profiles_one_model(values):
    """Values of profiles/quick.yaml and profiles/large.yaml."""
    own = values("02_align_dpo", "quick")
    assert (own["max_steps"], own["lora_rank"], own["model"]) == (40, 4, "smollm2-135m") and "scenario" not in own
    games = values("02_align_dpo", "quick", "-p", "scenario", "collusion", "-p", "max_steps", "2")
    assert (games["max_steps"], games["learning_rate"]) == (2, 2e-4)
    assert values("04_evolve_role_play", "large")["model"] == "qwen2.5-coder-1.5b"
    assert values("04_evolve_role_play", "large", "-p", "model", "smollm2-135m")["model"] == "smollm2-135m"
    assert "model" not in values("01_generate_data", "large") and "model" not in values("08_figures", "large")


def test_a_profile_counts_for_the_notebooks_own_condition(values, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        "{models: {a/b: {}}, arms: [base], scenarios: [role_play], conditions: {role_play: [standard, caught]},"
        " notebooks: {04_evolve_role_play/standard: {rounds: 7}, 04_evolve_role_play/caught: {rounds: 3}}}"
    )
    assert values("04_evolve_role_play", profile) == {"rounds": 7, "model": "a/b"}
    assert values("04_evolve_role_play", profile, "-p", "condition", "caught")["rounds"] == 3


def test_of_several_models_one_must_be_named(values, capsys):
    assert values("04_evolve_role_play", "paper") == 2
    assert capsys.readouterr().err == (
        "error: the profile paper has several models, name one by -p model: "
        "Qwen/Qwen3-8B, meta-llama/Llama-3.1-8B-Instruct\n"
    )
    assert values("04_evolve_role_play", "paper", "-p", "model", "Qwen/Qwen3-8B")["temperature"] == 0.6
    assert "model" not in values("01_generate_data", "paper")


# --- Faults --------------------------------------------------------------------------------------------------

WAITS = "import os, pathlib, time\npathlib.Path('{}').write_text(str(os.getpid()))\ntime.sleep(600)"


def started(book, out):
    code = (
        "import signal, sys; from atp_utils import run; run.parameters.check = lambda _, v: v; "
        "signal.signal(signal.SIGTERM, signal.default_int_handler); "
        # Who runs tests in the background has it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(run.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(book), str(out)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def gone(pid):
    """Whether a process ends; a kernel looks once a second whether its parent is there."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


LATE = [pytest.param(name, marks=pytest.mark.soak) for name in ("SIGTERM", "SIGKILL")]


@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL to the kernel", *LATE])
def test_a_notebook_that_is_ended_says_where_and_leaves_no_kernel(tmp_path, sent):
    told, out = tmp_path / "pid", tmp_path / "out.ipynb"
    book = notebook(tmp_path / "book.ipynb", "print(6 * 7)", WAITS.format(told), "print(1)")
    process = started(book, out)
    while not told.is_file() or not told.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    kernel = int(told.read_text())
    os.kill(kernel if "kernel" in sent else process.pid, signal.Signals[sent.split()[0]])
    error = process.communicate()[1]
    assert gone(kernel)
    if sent == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    elif "kernel" in sent:
        assert process.returncode == 1
        assert "book.ipynb failed in cell 1 (import os, pathlib, time): its kernel died: it crashed, or was" in error
    else:
        assert process.returncode == 130
        assert "book.ipynb was interrupted in cell 1 (import os, pathlib, time): the next call goes on" in error
    # What was printed is there to read, and the next call takes its place.
    assert nbformat.read(out, as_version=4).cells[0].outputs[0].text == "42\n"
    run.check_target(book, out)


def test_a_full_disk_is_told_with_both_names(book, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.papermill, "execute_notebook", full)
    assert run.main([str(book), str(tmp_path / "out.ipynb")]) == 1
    assert "error: book.ipynb, written to out.ipynb: [Errno 28] No space left" in capsys.readouterr().err
