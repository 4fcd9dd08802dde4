import torch
from pytorch_lightning import Callback
from tiny_training import Tiny, fit

from ldm.callbacks.ema import EmaUpdate
from ldm.common.ema import Ema


class Averaged(Tiny):
    def __init__(self, decay: float | None = 0.5) -> None:
        super().__init__()
        self.model = self.net
        self.ema = None if decay is None else Ema(self.net, decay)


class Path(Callback):
    """The weights after each batch."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.weights.append(module.net[0].weight.detach().clone())


def test_one_update_for_each_step_of_two_batches():
    torch.manual_seed(0)
    module, path = Averaged(), Path()
    average = module.net[0].weight.detach().double()
    trainer, _ = fit([EmaUpdate(), path], 6, module, accumulate_grad_batches=2)
    assert trainer.global_step == module.ema.updates == 6 and module.images_seen == 48
    assert torch.equal(path.weights[1], path.weights[2]) and len(path.weights) == 12
    for n, weight in enumerate(path.weights[1::2], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight.double()
    assert torch.allclose(module.ema.shadow[0].weight.double(), average, atol=1e-6)


def test_a_resumed_run_goes_on_counting(tmp_path):
    trainer, _ = fit([EmaUpdate()], 3, Averaged())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, module = fit([EmaUpdate()], 5, Averaged(), resume=tmp_path / "a.ckpt")
    assert module.ema.updates == 5


def test_no_average_is_asked_for():
    trainer, _ = fit([EmaUpdate()], 2, Averaged(decay=None))
    assert trainer.global_step == 2
