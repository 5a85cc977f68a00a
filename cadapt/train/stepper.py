"""One optimizer step, and the state that belongs to it: optimizer, loss scale, moving average, skipped steps."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional

from cadapt.data.mixup import Mixing, mix_batch
from cadapt.errors import CadaptError
from cadapt.evaluation import autocast
from cadapt.train.config import TrainConfig
from cadapt.train.meter import Meter
from cadapt.train.weights import Average, Learnt

if TYPE_CHECKING:
    from cadapt.train.protocols import Batch


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, without weight decay on biases, norms and per-channel scales.

    A scale may be shaped to broadcast, [1, C, 1, 1]: whatever has all its elements along one axis counts as one.
    """
    vectors = [name for name, tensor in model.named_parameters() if tensor.numel() == max(tensor.shape, default=1)]
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=vectors)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)


class Stepper:
    """Takes optimizer steps of a model.

    Args:
        model: on ``device`` already, in training mode.
        learnt: its trainable tensors.
        config: the run's settings.
        class_count: number of classes, for mixup's soft targets.
        device, precision: resolved ones.
        forward: what is run in the model's place, if it is not the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        learnt: Learnt,
        config: TrainConfig,
        *,
        class_count: int,
        device: torch.device,
        precision: str,
        forward: nn.Module | None = None,
    ) -> None:
        run = model if forward is None else forward
        self._forward: Any = torch.compile(run) if config.compile else run
        self._learnt = learnt
        self._config = config
        self._device = device
        self._precision = precision
        self._optimizer = make_optimizer(model, config)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._average = None if config.ema is None else Average(learnt.parameters, config.ema)
        # the loss smooths the labels, with and without mixing
        self._mixing = Mixing(mixup_alpha=config.mixup, cutmix_alpha=config.cutmix)
        self._class_count = class_count
        self.skipped = 0

    def step(
        self, batches: Sequence[Batch], *, lr: float, epoch: int, step: int, steps_done: int, meters: Sequence[Meter]
    ) -> None:
        """Take one step on ``batches`` as if they were one batch, and add their loss and accuracy to the meters.

        Args:
            batches: images and labels, on the CPU or the device.
            lr: learning rate of this step.
            epoch, step: its position, from 0; with the seed, what mixup's shares come from.
            steps_done: optimizer steps of the run, this one included.
            meters: sums over an epoch, over an interval.

        Raises:
            CadaptError: a loss is not finite (on a CPU at once; elsewhere the caller looks at the meters).
        """
        total = sum(len(labels) for _, labels in batches)
        self._optimizer.zero_grad(set_to_none=True)
        for place, (images, labels) in enumerate(batches):
            images, labels = self.to_device(images, labels)
            images, targets = self._mixed(images, labels, epoch, step * self._config.accumulate + place)
            loss_sum, correct = self._losses(images, targets)
            if self._device.type == "cpu" and not torch.isfinite(loss_sum):
                raise not_finite("the loss", steps_done, lr)
            self._scaler.scale(loss_sum / total).backward()  # type: ignore[no-untyped-call]
            for meter in meters:
                meter.add(loss_sum.detach(), correct, len(labels))
        self._update(lr)
        if self._average is not None:
            self._average.update(steps_done)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model holds the weights to validate and to keep: the average's, if any."""
        return nullcontext() if self._average is None else self._average.swapped_in()

    def to_device(self, images: Tensor, labels: Tensor) -> Batch:
        """Return a batch on the device, in the run's memory format; to CUDA the copies do not wait."""
        last = self._config.channels_last and images.ndim == 4
        layout = torch.channels_last if last else torch.contiguous_format
        # MPS would go on reading from memory that the loader meanwhile gives to the next batch (pytorch issue 189690)
        hurry = self._device.type == "cuda"
        images = images.to(self._device, non_blocking=hurry, memory_format=layout)
        return images, labels.to(self._device, non_blocking=hurry)

    def logits(self, images: Tensor) -> Tensor:
        """Return the model's logits [B, classes] in the run's precision, at least float32."""
        with autocast(self._precision, self._device):
            logits: Tensor = self._forward(images)
        return logits if logits.dtype == torch.float64 else logits.float()

    def state(self) -> dict[str, Any]:
        """Return everything a later run needs to go on from here, but the model's own tensors."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state(),
            "skipped": self.skipped,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state(state["average"])
        self.skipped = state["skipped"]

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> Batch:
        if not self._mixing.active:
            return images, labels
        seed = self._config.seed
        return mix_batch(images, labels, self._mixing, self._class_count, seed=seed, epoch=epoch, step=batch)

    def _losses(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(images)
        smoothing = self._config.label_smoothing
        loss_sum = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        # of a mixed image, the label with the larger share is the right answer
        right = targets if targets.ndim == 1 else targets.argmax(1)
        return loss_sum, (logits.detach().argmax(1) == right).sum()

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._config.clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._learnt.parameters.values(), self._config.clip_grad)
        # get_scale waits for the device, which step does anyway in fp16, the only precision that scales
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.skipped += int(self._scaler.get_scale() < scale)


def not_finite(what: str, steps_done: int, lr: float) -> CadaptError:
    """Return the error for a number that ruins the run."""
    return CadaptError(
        f"{what} is not finite at step {steps_done}, where the learning rate was {lr:.3g}",
        hint="begin anew with a lower --lr or with --precision fp32; what was saved before is sound",
    )


def grouped(batches: Iterator[Batch], size: int) -> Generator[list[Batch], None, None]:
    """Yield lists of ``size`` batches; the last may be shorter."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
