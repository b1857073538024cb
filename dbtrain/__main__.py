"""``python -m dbtrain``."""

from dbtrain.cli import main

if __name__ == "__main__":
    main()
