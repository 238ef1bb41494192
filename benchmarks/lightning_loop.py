"""The tutorial's recipe as users of PyTorch Lightning write it, with the same network and DataLoaders.

Logging, checkpoints, progress bar and summaries are off, so that only training is timed.
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
    """Sums the losses and correct predictions of an epoch, like the tutorial's loop."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.totals: dict[str, Tensor] = {}  # by part: sum of losses, number correct, number seen

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
    """Times an epoch from start to end, including validation."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, Classifier)
        self.totals = {part: sums.tolist() for part, sums in module.totals.items()}  # host-device sync
        module.totals.clear()
        self.seconds = time.perf_counter() - self._started


def epochs(
    net: nn.Module, root: Path, lr: float, workers: int, device: torch.device
) -> Iterator[tuple[float, float, float, float]]:
    """Train without end; yield an epoch's train loss, train accuracy, test accuracy and seconds.

    The trainer runs one more epoch each time. Its set-up is not timed, because a user who trains all
    epochs at once pays for it only once.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hides device information and tips
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
