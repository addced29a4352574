"""What a run learns from and is measured on: text, rows of texts, or a task with labels, behind one
protocol.

`datamodule.py` is what the loop sees: `DataModule`, `MicroBatches`, `Evaluator`; `batching.py` is
the one rule that cuts a batch into ranks and micro-batches; `sequences.py` stores sequences of
tokens and pads them, `sampler.py` makes batches of those of similar length; `factory.py` reads a
recipe's section and builds either kind. `text/` goes from documents to packed blocks, `rows/` from
rows of texts to padded batches, `tasks/` from labelled examples to padded batches and scores,
`augmentation/` makes more examples.

`factory.py` and `batching.py` alone read sections of a recipe; all else takes plain arguments, and
asks no loss what it wants.
"""
