"""The commands of `visionzoo`, one file each: parse, build, run. visionzoo_cli.py lists them with a line on each."""
