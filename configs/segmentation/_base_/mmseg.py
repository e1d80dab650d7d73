"""What mmengine must know before it reads the bases that follow this one in a list: where mmseg's configs are."""

_base_ = []  # or mmengine would take this file for one of its lazy configs
import visionzoo.openmmlab  # noqa: F401
