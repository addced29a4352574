"""One step of a recipe with `losses.rkd` alone, and the same written out on the whole batch.

Used as `python gathered_step.py recipe.yaml '[["train.zero_stage=1", ...], ...]'`, also under
torchrun. Prints a line of JSON for each variant: the loss and the norm of the gradient of the run,
and those of the definition: every micro-batch keeps its graph, and distances are taken by loops
over all sentences of all ranks, in fp64.
"""

import json
import sys

import torch
import torch.distributed as dist

from fastkd.distributed import Ranks, start_ranks, stop_ranks
from fastkd.recipe import load_recipe
from fastkd.training.loop import read_step, train_step
from fastkd.training.setup import set_up, set_up_trial


def distances(points: list[torch.Tensor]) -> torch.Tensor:
    number = range(len(points))
    apart = torch.stack([(points[i] - points[j]).norm() for i in number for j in number if i != j])
    return apart / apart.mean()


def defined(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    gaps = (distances(student) - distances(teacher)).abs()
    return torch.where(gaps <= 1, gaps**2 / 2, gaps - 0.5).mean()


def of_all(points: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
    """The points of all ranks, this one's with their graph."""
    found = ranks.gather(points.detach().tolist())
    others = [torch.tensor(values, dtype=torch.float64) for values in found]
    others[ranks.rank] = points
    return list(torch.cat(others))


def step(overrides: list[str], ranks: Ranks) -> list[float]:
    recipe = load_recipe(sys.argv[1], overrides)
    plain = set_up_trial(recipe, ranks)
    run = set_up(recipe, ranks, progress=False)
    batches = read_step(run, run.micro_batches(), 0)
    update, norms = run.engine.step, []

    def noting_norm() -> None:
        grads = [p.grad.flatten() for p in run.module.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm().item() if grads else 0.0)
        update()

    run.engine.step = noting_norm
    torch.manual_seed(7 + ranks.rank)
    loss = ranks.sum(train_step(run, batches)[0]).item()
    # stage 0 of DeepSpeed makes none, others keep no gradients of parameters
    norm = run.engine.get_global_grad_norm() or norms[-1]
    torch.manual_seed(7 + ranks.rank)
    student, teacher = plain.module.student.train().double(), plain.teacher_model
    assert teacher is not None
    inputs = [run.move(batch) for batch in batches]
    points = torch.cat([student(**one).last_hidden_state.mean(1) for one in inputs])
    with torch.no_grad():
        targets = torch.cat([teacher(**one).last_hidden_state.mean(1) for one in inputs]).double()
    expected = defined(of_all(points, ranks), of_all(targets, ranks))
    expected.backward()
    # a rank's rows have a gradient of their own, and the whole is the sum over ranks
    flat = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    dist.all_reduce(flat)
    return [loss, float(norm), expected.item(), flat.norm().item()]


if __name__ == "__main__":
    ranks = start_ranks()
    for overrides in json.loads(sys.argv[2]):
        found = step(overrides, ranks)
        if ranks.is_main:
            print(json.dumps(found))
    stop_ranks()
