"""`visionzoo export` from a checkout: python tools/export.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("export")
