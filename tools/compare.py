"""`visionzoo compare` from a checkout: python tools/compare.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("compare")
