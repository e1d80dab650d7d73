"""`visionzoo eval` from a checkout: python tools/eval.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("eval")
