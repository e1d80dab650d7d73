"""Models as files that run without visionzoo: exported programs of torch, ONNX and AOTInductor packages.

`exporting` writes a format and checks the file against the model, `files` does so for several and describes them,
`command` is `visionzoo export` for classifiers, `sweep` exports every model and makes a table of it, `flags` has their
words. Detectors and segmentors: `visionzoo.openmmlab.export`.
"""

from visionzoo.deploy.exporting import FORMATS, Exported, Reference, Shape, export

__all__ = ["FORMATS", "Exported", "Reference", "Shape", "export"]
