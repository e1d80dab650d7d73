"""`visionzoo train` from a checkout: python tools/train.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("train")
