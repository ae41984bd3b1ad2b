"""``python -m matent_callbacks``: the ``matent`` command line."""

from matent_callbacks.cli import main

if __name__ == "__main__":
    main()
