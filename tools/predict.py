"""`visionzoo predict` from a checkout: python tools/predict.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("predict")
