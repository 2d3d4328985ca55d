"""Where the paths that settings name are."""

from pathlib import Path

from spd.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The repository: relative paths in conf/ start here (or in the working directory, which is looked at first)."""


def find_path(path: str) -> Path | None:
    """The file or folder that `path` means: absolute, in the working directory, or in the repository; else None."""
    given = Path(path).expanduser()
    for candidate in (Path.cwd() / given, ROOT / given):
        if candidate.exists():
            return candidate.resolve()
    return None


def need_path(path: str, setting: str) -> Path:
    """`find_path`, or a UserError that names the setting."""
    found = find_path(path) if path else None
    if found is None:
        where = " or ".join(dict.fromkeys([str(Path.cwd()), str(ROOT)]))
        raise UserError(f"{setting}={path!r} does not exist (looked for in {where}); give one that does.")
    return found
