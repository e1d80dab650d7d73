"""`visionzoo sparse-rate` from a checkout: python tools/sparse_rate.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("sparse-rate")
