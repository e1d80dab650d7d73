from visionzoo.openmmlab import ops

ops.install()
