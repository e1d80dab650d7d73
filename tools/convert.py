"""`visionzoo convert` from a checkout: python tools/convert.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("convert")
