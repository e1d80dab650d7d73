"""`visionzoo multi-task` from a checkout: python tools/multi_task.py."""

from visionzoo_cli import run

if __name__ == "__main__":
    run("multi-task")
