"""Names from outside as paths: none leads out of the folder that it belongs to."""

from pathlib import Path


def inside(folder: Path, key: str) -> Path:
    """Where below a local folder something of this key goes.

    Raises:
        ValueError: that might be elsewhere: ``../x``, ``/tmp/x``, or ``a//tmp/x``, whose rest is absolute once it is
            joined.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{key!r} leads out of its folder")
    return folder.joinpath(*parts)
