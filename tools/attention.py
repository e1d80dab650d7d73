"""`visionzoo attention` from a checkout: python tools/attention.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("attention")
