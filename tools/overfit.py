"""`visionzoo overfit` from a checkout: python tools/overfit.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("overfit")
