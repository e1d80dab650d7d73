"""`python -m visionzoo`, the same as the command `visionzoo`."""

from visionzoo_cli import main

if __name__ == "__main__":
    main()
