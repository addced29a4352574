"""The job of matching next-token distributions: the generalised Jensen-Shannon divergence of GKD
(arXiv 2306.13649) at beta 0.5, between two decoders with one vocabulary, and an update."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastkd_kernels import LogitsHead, logits_divergence
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.rows import LEARNING_RATE, Case, Step
from benchmarks.training_step import Inputs, dtype_on, make_inputs, update

LOSS = "js"
# words, then layers and width of teacher and student
SIZES = {
    "32,000 words": (32_000, (4, 512), (2, 256)),
    "128,000 words": (128_000, (4, 512), (2, 256)),
    "tiny words": (512, (2, 32), (1, 16)),
}
IGNORED = -100
# of a call of Liger's; its default of 1024 is the whole batch of these cases
CHUNK = 128


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both decoders with the weights that every row starts from."""

    inputs: Inputs
    teacher: LlamaForCausalLM
    student: LlamaForCausalLM
    optimizer: torch.optim.Optimizer

    @property
    def counted(self) -> Tensor:
        """Bool [batch, tokens - 1]: where the next token is no padding."""
        return self.inputs["attention_mask"][:, 1:].bool()

    @property
    def labels(self) -> Tensor:
        """The next tokens, as libraries for decoders want them, [batch, tokens - 1]."""
        return self.inputs["input_ids"][:, 1:].masked_fill(~self.counted, IGNORED)

    def states(self) -> tuple[Tensor, Tensor]:
        """What stands before the heads where a next token is told, [batch, tokens - 1, width]."""
        with torch.no_grad():
            taught = self.teacher.model(**self.inputs).last_hidden_state[:, :-1]
        return self.student.model(**self.inputs).last_hidden_state[:, :-1], taught

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            taught = self.teacher(**self.inputs).logits[:, :-1]
        return self.student(**self.inputs).logits[:, :-1], taught

    def step(self, loss: Callable[[], Tensor]) -> Step:
        return Step(
            run=lambda: update(loss(), self.optimizer),
            optimizer=self.optimizer,
            modules=(self.teacher, self.student),
        )


def make_pair(case: Case) -> Pair:
    """Llamas that share the table of words with their heads, as small ones do."""
    words, *shapes = SIZES[case.size]
    torch.manual_seed(0)
    models = []
    for layers, width in shapes:
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            tie_word_embeddings=True,
            # logits of random weights are near each other; of these they are not
            initializer_range=0.05,
        )
        models.append(LlamaForCausalLM(config).to(case.device, dtype_on(case.device)))
    teacher, student = models
    return Pair(
        inputs=make_inputs(case.batch, case.tokens, case.device, padded=True, words=words),
        teacher=teacher.eval().requires_grad_(False),
        student=student,
        optimizer=torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, fused=True),
    )


def fastkd_row(case: Case) -> Step:
    pair = make_pair(case)

    def loss() -> Tensor:
        own, taught = pair.states()
        heads = pair.student.lm_head.weight, pair.teacher.lm_head.weight
        made = logits_divergence(
            LogitsHead(own, heads[0]), LogitsHead(taught, heads[1]), kind="js", mask=pair.counted
        )
        assert isinstance(made, Tensor)
        return made

    return pair.step(loss)


def plain_row(case: Case) -> Step:
    """Logits of both models, and the formula."""
    pair = make_pair(case)

    def logarithms() -> tuple[Tensor, Tensor, Tensor]:
        own, taught = (log_softmax(of.float(), dim=-1) for of in pair.logits())
        return own, taught, torch.logaddexp(own, taught) - math.log(2.0)

    def mean(terms: Tensor) -> Tensor:
        return terms.sum(dim=-1)[pair.counted].mean()

    def loss() -> Tensor:
        own, taught, mixed = logarithms()
        return mean(0.5 * (own.exp() * (own - mixed) + taught.exp() * (taught - mixed)))

    @torch.no_grad()
    def condition() -> float:
        own, taught, mixed = logarithms()
        sizes = own.exp() * (own + mixed).abs() + taught.exp() * (taught + mixed).abs()
        return float(mean(0.5 * sizes) / loss())

    return replace(pair.step(loss), condition=condition)


def gkd_row(case: Case) -> Step:
    """TRL's `GKDTrainer`: its loss on logits."""
    from trl.experimental.gkd import GKDTrainer

    pair = make_pair(case)
    return pair.step(
        lambda: GKDTrainer.generalized_jsd_loss(*pair.logits(), labels=pair.labels, beta=0.5)
    )


def distillation_trainer_row(case: Case) -> Step:
    """TRL's `DistillationTrainer`: the loss that it computes of completions that are there."""
    from datasets import Dataset
    from tiny_models import tiny_tokenizer
    from trl import DistillationConfig, DistillationTrainer

    # beside the inputs of the benchmarks
    import benchmarks.inputs  # noqa: F401

    pair = make_pair(case)
    tokenizer = tiny_tokenizer(SIZES[case.size][0])
    tokenizer.padding_side = "left"
    options: dict[str, Any] = {"beta": 0.5, "temperature": 1.0, "report_to": "none"}
    options |= {"use_cpu": case.device == "cpu", "bf16": False, "gradient_checkpointing": False}
    trainer = DistillationTrainer(
        model=pair.student,
        teacher_model=pair.teacher,
        args=DistillationConfig(output_dir=tempfile.mkdtemp(), **options),
        # it wants one, and reads none of it here
        train_dataset=Dataset.from_dict({"prompt": ["w1"]}),
        processing_class=tokenizer,
    )
    names = {"ids": "input_ids", "mask": "attention_mask"}
    # the first token is the prompt, the others are what is completed
    parts = {"prompt": slice(0, 1), "completion": slice(1, None)}
    given = {
        f"{part}_{kind}": pair.inputs[name][:, where]
        for part, where in parts.items()
        for kind, name in names.items()
    }
    return pair.step(lambda: trainer.compute_loss(pair.student, given))


def liger_row(case: Case, chunk: int) -> Step:
    """Liger-Kernel's chunked loss, compiled as it is by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    pair = make_pair(case)
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, chunk_size=chunk)

    def loss() -> Tensor:
        own, taught = (of.flatten(0, 1) for of in pair.states())
        heads = pair.student.lm_head.weight, pair.teacher.lm_head.weight
        made: Tensor = module(own, heads[0], taught, heads[1], pair.labels.flatten())
        return made

    return pair.step(loss)
