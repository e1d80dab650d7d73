"""`visionzoo view` from a checkout: python tools/view.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("view")
