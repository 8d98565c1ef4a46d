"""``python -m zswapfs``."""

from .cli import main

main()
