"""The losses of both stages. Every one is a mean over tokens, so none grows with the sequence length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(student, teacher) over the last dimension, mean over tokens. Both (B, L, D) -> scalar float32."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy in nats. logits (B, L, V) at positions whose next tokens are labels (B, L) -> scalar."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of the next-token distributions, in nats. Both (B, L, V) -> scalar."""
    student = F.log_softmax(student_logits.flatten(0, 1).float(), dim=-1)
    teacher = F.log_softmax(teacher_logits.flatten(0, 1).float(), dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
