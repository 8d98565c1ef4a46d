"""Compressed swap in user space that gives freed memory back."""

from importlib.metadata import version

from .errors import ConfigError, CorruptPageError, StoreError, ZswapfsError

__version__ = version("zswapfs")
__all__ = ["ConfigError", "CorruptPageError", "StoreError", "ZswapfsError", "__version__"]
