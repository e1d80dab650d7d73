"""`visionzoo check-data` from a checkout: python tools/check_data.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("check-data")
