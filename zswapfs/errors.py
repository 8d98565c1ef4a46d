"""What can go wrong, for those who call and for those who type."""


class ZswapfsError(Exception):
    """Anything that zswapfs reports in one line."""


class ConfigError(ZswapfsError):
    """An option, size or mountpoint that cannot be used; nothing was changed."""


class SetupError(ZswapfsError):
    """The system refused a step; what had been set up was taken down again."""


class StoreError(ZswapfsError, OSError):
    """The store refused; ``errno`` says why (ENOSPC: memory limit, EUCLEAN: ``check``)."""


class CorruptPageError(StoreError):
    """A page's block does not match its checksum; ``errno`` is EIO."""
