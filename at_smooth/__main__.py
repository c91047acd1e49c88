"""``python -m at_smooth`` is the command ``at-smooth``."""

from at_smooth.cli import main

if __name__ == "__main__":
    main()
