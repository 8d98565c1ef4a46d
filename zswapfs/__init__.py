"""Compressed swap in user space that gives freed memory back."""

from .errors import ConfigError, CorruptPageError, StoreError, ZswapfsError

__version__: str
__all__ = ["ConfigError", "CorruptPageError", "StoreError", "ZswapfsError", "__version__"]


def __getattr__(name: str) -> str:
    # Asked for, or not imported: importlib.metadata is 5 MB, which a daemon would carry.
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("zswapfs")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
