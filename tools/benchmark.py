"""`visionzoo benchmark` from a checkout: python tools/benchmark.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("benchmark")
