"""``python -m vlmix``, and what ``torchrun -m vlmix`` starts on every process."""

from vlmix.cli.main import main

if __name__ == "__main__":
    main()
