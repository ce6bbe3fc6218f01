"""The VoCo token's row in a model that trains without PEFT: it alone moves, or everything but it.

An embedding matrix is one parameter. Masking its gradient is not enough: weight decay moves rows that have
none. So held rows are put back after each step, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback


class HoldRows(TrainerCallback):
    """Keeps rows of the input embeddings as they were when training began.

    Args:
        model: a transformers model, whole (neither DeepSpeed nor FSDP has cut it up). Tied embeddings share
            one matrix with the LM head, which is held with them.
        token_id: the VoCo token.
        only: hold every row but the token's; false holds the token's alone.
    """

    def __init__(self, model: PreTrainedModel, token_id: int, only: bool) -> None:
        self.weight = model.get_input_embeddings().get_parameter("weight")
        self.token_id, self.only = token_id, only
        self._held: torch.Tensor | None = None
        self.weight.requires_grad_(True)
        # before the gradients are clipped: what a held row would get counts for no norm and no moment
        self.weight.register_hook(self._mask)

    def _mask(self, grad: torch.Tensor) -> torch.Tensor:
        masked = torch.zeros_like(grad) if self.only else grad.clone()
        masked[self.token_id] = grad[self.token_id] if self.only else 0
        return masked

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the rows; a resumed run has loaded its checkpoint by now."""
        weight = self.weight.detach()
        self._held = (weight if self.only else weight[self.token_id]).clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the held rows back."""
        assert self._held is not None, "on_train_begin comes first"
        with torch.no_grad():
            if self.only:
                row = self.weight[self.token_id].clone()
                self.weight.copy_(self._held)
                self.weight[self.token_id] = row
            else:
                self.weight[self.token_id] = self._held

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the copy go."""
        self._held = None
