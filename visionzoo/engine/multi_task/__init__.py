"""Several tasks on one backbone whose widths a budget chooses: `visionzoo multi-task`.

After Efficient Controllable Multi-Task Architectures, ICCV 2023, https://arxiv.org/abs/2308.11744, of which there is no
authors' code: encoder and decoders can be slimmed; training keeps the encoder's features alike at every width
(configuration-invariant distillation); preferences among the tasks set the decoders' widths, and the encoder takes what
the budget leaves. Widths here are those of `visionzoo.slimming`, one share for the encoder and one for each decoder;
details that the paper leaves open, and its tables, are not followed: nothing here claims its numbers.
"""
