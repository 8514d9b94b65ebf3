"""Distillation: a query's own candidates are to be scored as a teacher, such as a reranker, scored them.

Shapes: Q queries, P passages, D dimensions, R queries at a time, K candidates of a query, its positive first.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llara.losses.rows import full_precision

Kind = Literal["kl", "margin-mse"]


@dataclass(frozen=True)
class Distillation:
    """What both kinds share: the candidates, the teacher's scores, and how the student's are compared with them.

    Attributes:
        candidates: int64 [Q, K], numbers of the passages; below 0 where a query has fewer.
        teacher: float [Q, K], the teacher's scores of them.
        temperature: The student's scores are divided by it.
    """

    candidates: Tensor
    teacher: Tensor
    temperature: float

    def scores(self, queries: Tensor, passages: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the student's scores, the teacher's, and which of them there are, each [R, K]."""
        numbers = self.candidates[rows]
        own = full_precision(passages[numbers.clamp(min=0)])
        student = torch.einsum("rd,rkd->rk", full_precision(queries), own) / self.temperature
        return student, self.teacher[rows].to(student.dtype), numbers >= 0


@dataclass(frozen=True)
class KLDivergence(Distillation):
    """`KL( softmax(teacher / T) || softmax(q.p / t) )` over a query's own candidates (Hinton et al. 2015, section 2).

    `teacher_temperature` T: the teacher's scores are divided by it.
    """

    teacher_temperature: float = 1.0

    def __call__(self, queries: Tensor, passages: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        student, teacher, there = self.scores(queries, passages, rows)
        student = student.masked_fill(~there, float("-inf")).log_softmax(dim=1)
        teacher = (teacher / self.teacher_temperature).masked_fill(~there, float("-inf")).log_softmax(dim=1)
        # Where nothing stands, both are -inf, and their difference is not a number.
        difference = (teacher - student).masked_fill(~there, 0.0)
        return (teacher.exp() * difference).sum()


@dataclass(frozen=True)
class MarginMSE(Distillation):
    """Mean over a query's negatives of `((q.p+ - q.p-) / t - (teacher+ - teacher-))**2`.

    Source: Hofstätter et al. 2020 (arXiv 2010.02666, section 3.1), who take dot products of any length, that is t = 1;
    those of unit vectors need a temperature to reach a teacher's margins. A query without negatives adds nothing.
    """

    def __call__(self, queries: Tensor, passages: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        student, teacher, there = self.scores(queries, passages, rows)
        difference = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
        negatives = there[:, 1:]
        squares = difference.masked_fill(~negatives, 0.0) ** 2
        return (squares.sum(dim=1) / negatives.sum(dim=1).clamp(min=1)).sum()
