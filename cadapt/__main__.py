"""``python -m cadapt`` is ``cadapt``."""

from cadapt.cli.main import main

if __name__ == "__main__":
    main()
