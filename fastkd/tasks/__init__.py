"""Tasks with labels: read, augmented, tokenised once, and cut into batches of similar length.

read_examples -> (augment) -> encode_examples -> ExampleStream -> cut
                                              -> evaluation_batches
"""

from fastkd.tasks.augmentation import Augmentation, augment
from fastkd.tasks.batches import ExampleStream, cut, evaluation_batches
from fastkd.tasks.encoded import EncodedExamples, encode_examples, uses_token_types
from fastkd.tasks.examples import Examples, read_examples
from fastkd.tasks.glue import GLUE, glue_task
from fastkd.tasks.labels import described, is_generic, order_of
from fastkd.tasks.padding import hand_on_padding, padding_id, reads_padding
from fastkd.tasks.task import Columns, Task

__all__ = [
    "GLUE",
    "Augmentation",
    "Columns",
    "EncodedExamples",
    "ExampleStream",
    "Examples",
    "Task",
    "augment",
    "cut",
    "described",
    "encode_examples",
    "evaluation_batches",
    "glue_task",
    "hand_on_padding",
    "is_generic",
    "order_of",
    "padding_id",
    "read_examples",
    "reads_padding",
    "uses_token_types",
]
