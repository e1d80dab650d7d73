"""Measure operations, models and memory against other implementations; `visionzoo benchmark` is the command over it.

`cases` says what a measurement is, `operations`, `models` and `memory` list them, `baselines` finds what they are
compared with, `implementations` compares those of an operation on one problem, `timing` holds the clocks, `runner` runs
and `results` keeps the rows, `targets` judges them and `report` draws. `comparison`, behind `visionzoo compare`, trains
models alike.
"""
