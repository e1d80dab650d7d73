"""The terminal names the pages of OpenMMLab's log, the file has them."""

import logging

import pytest

pytest.importorskip("mmdet", reason='needs pip install "visionzoo[openmmlab]"')

from mmengine.logging import MMLogger

from visionzoo.openmmlab.console import results_unseen, shorten


def made(tmp_path):
    """mmengine's logger, which prints to the standard output of now and writes into a file."""
    return MMLogger.get_instance("console", log_file=str(tmp_path / "x.log"))


def test_a_page_is_a_line_on_the_terminal_and_whole_in_the_file(tmp_path, capsys):
    logger = made(tmp_path)
    shorten(logger, "x.log")
    shorten(logger, "x.log")  # twice is once
    logger.info("Config:\na = 1\nb = 2")
    logger.info("Config: one line of %s stays", "another")
    logger.info("\n+---+\n| table of results |\n+---+")
    logger.warning('"FileClient" will be deprecated in future. Please use io')
    said, log = capsys.readouterr().out, (tmp_path / "x.log").read_text()
    assert "Config, whole: 3 lines in x.log\n" in said and "a = 1" not in said
    assert "Config: one line of another stays" in said and "| table of results |" in said
    assert "FileClient" not in said
    assert "a = 1\nb = 2" in log and "FileClient" in log and "whole" not in log


def test_results_that_are_none_are_not_shown_unless_they_fail(tmp_path, capsys):
    logger = made(tmp_path)
    with results_unseen(logger):
        print("AP 0")
        logger.info("AP 0")
        logger.warning("trouble")
    said = capsys.readouterr().out
    assert "AP" not in said and "trouble" in said and logger.level != logging.WARNING
    with pytest.raises(ZeroDivisionError), results_unseen(logger):
        print("on the way")
        raise ZeroDivisionError
    assert capsys.readouterr().out == "on the way\n"
    logger.info("after")
    assert "after" in capsys.readouterr().out
