"""`visionzoo registers` from a checkout: python tools/registers.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("registers")
