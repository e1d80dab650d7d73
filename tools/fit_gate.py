"""`visionzoo fit-gate` from a checkout: python tools/fit_gate.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("fit-gate")
