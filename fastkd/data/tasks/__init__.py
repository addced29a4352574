"""Tasks with labels: read, tokenised once, and cut into batches of similar length.

read_examples -> (augmentation.augment) -> encode_examples -> data.sampler
"""

from fastkd.data.tasks.glue import GLUE, glue_task
from fastkd.data.tasks.labels import (
    described,
    is_generic,
    order_of,
    same_name,
)
from fastkd.data.tasks.padding import (
    hand_on_padding,
    padding_id,
    reads_padding,
)
from fastkd.data.tasks.read import Examples, read_examples
from fastkd.data.tasks.task import Columns, Task
from fastkd.data.tasks.tokenized import (
    EncodedExamples,
    encode_examples,
)

__all__ = [
    "GLUE",
    "Columns",
    "EncodedExamples",
    "Examples",
    "Task",
    "described",
    "encode_examples",
    "glue_task",
    "hand_on_padding",
    "is_generic",
    "order_of",
    "padding_id",
    "read_examples",
    "reads_padding",
    "same_name",
]
