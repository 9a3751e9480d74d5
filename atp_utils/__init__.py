"""Logic behind the notebooks: scenarios, engines, the evolution loop, alignment, statistics and figures."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resolve(path: str | Path) -> Path:
    """Absolute form of ``path``; relative paths start at the repository root.

    papermill runs a notebook in the caller's folder, nbval and JupyterLab in the notebook's own: only the
    repository root means the same place to all of them.
    """
    return ROOT / Path(path).expanduser()


def shown(path: str | Path) -> str:
    """``path`` as a reader should see it: relative to the repository root where it lies below it."""
    path = resolve(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
