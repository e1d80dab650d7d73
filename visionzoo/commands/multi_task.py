"""Train one backbone for two tasks, or evaluate it under budgets: visionzoo multi-task CONFIG [flags].

With --checkpoint FILE a trained network is evaluated at the widths that --budget allows.
"""

import sys


def main() -> None:
    """Parse, then train or evaluate."""
    from visionzoo.engine.multi_task.flags import budget_parser, multi_task_parser

    if any(word == "--checkpoint" or word.startswith("--checkpoint=") for word in sys.argv[1:]):
        budgets = budget_parser().parse()
        from visionzoo.engine.multi_task.budgets import evaluate_budgets

        evaluate_budgets(budgets)
        return
    config = multi_task_parser().parse_with_config()
    from visionzoo.engine.multi_task.training import train  # after parsing: --help and typing errors come at once

    train(config)
