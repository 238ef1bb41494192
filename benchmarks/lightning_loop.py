"""The tutorial's recipe as PyTorch Lightning's users write it, on the same network and DataLoaders.

Logging, checkpoints, progress bar and summaries are off, so that nothing is timed but training.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.tutorial import Pictures

Batch = tuple[Tensor, Tensor]


class Classifier(lightning.LightningModule):
    """Sums up an epoch's losses and right answers, as the tutorial's loop does."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.totals: dict[str, Tensor] = {}  # by part: sum of losses, number right, number seen

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, _: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def _step(self, batch: Batch, part: str) -> Tensor:
        x, y = batch
        outputs = self.net(x)
        loss = F.cross_entropy(outputs, y)
        seen = torch.tensor(float(len(y)), device=y.device)
        new = torch.stack([loss.detach() * len(y), (outputs.argmax(1) == y).sum(), seen])
        self.totals[part] = self.totals.get(part, 0) + new
        return loss


class Clock(lightning.Callback):
    """Times an epoch from its start to its end; Lightning validates before the end."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, Classifier)
        self.totals = {part: sums.tolist() for part, sums in module.totals.items()}  # waits for the device
        module.totals.clear()
        self.seconds = time.perf_counter() - self._started


def epochs(
    net: nn.Module, root: Path, lr: float, workers: int, device: torch.device
) -> Iterator[tuple[float, float, float, float]]:
    """Train without end; yield an epoch's train loss, train accuracy, test accuracy and seconds.

    The trainer is asked for one epoch more each time. What it sets up for that is outside of the
    seconds, as a user who asks for all epochs at once pays it once.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it tells what it found, and gives tips
    train = DataLoader(Pictures(root, "train"), 256, shuffle=True, num_workers=workers)
    test = DataLoader(Pictures(root, "t10k"), 256, shuffle=False, num_workers=workers)
    module, clock = Classifier(net, lr), Clock()
    trainer = lightning.Trainer(
        accelerator=device.type,
        devices=[device.index or 0] if device.type != "cpu" else 1,
        max_epochs=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    while True:
        trainer.fit_loop.max_epochs += 1
        trainer.fit(module, train, test)
        (loss, right, seen), (_, test_right, test_seen) = clock.totals["train"], clock.totals["test"]
        yield loss / seen, right / seen, test_right / test_seen, clock.seconds
