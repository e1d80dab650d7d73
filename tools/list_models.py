"""`visionzoo models` from a checkout: python tools/list_models.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("models")
