"""`visionzoo fit-hashes` from a checkout: python tools/fit_hashes.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("fit-hashes")
