"""Models as files that run without visionzoo: exported programs of torch, ONNX and AOTInductor packages.

`exporting` writes a file and checks it against the model: `formats` has how it is written and read, `checking` what it
is checked on. `files` does so in several formats and describes them, `command` is `visionzoo export` for classifiers,
`tasks` for networks of several tasks, `sweep` exports every model and makes a table of it, `flags` has their words.
Detectors and segmentors: `visionzoo.openmmlab.export`.
"""

from visionzoo.deploy.checking import Reference, Shape
from visionzoo.deploy.exporting import Exported, export
from visionzoo.deploy.formats import FORMATS

__all__ = ["FORMATS", "Exported", "Reference", "Shape", "export"]
