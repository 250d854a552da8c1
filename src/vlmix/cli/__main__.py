"""``python -m vlmix.cli`` is ``vlmix``."""

from vlmix.cli.main import main

main()
