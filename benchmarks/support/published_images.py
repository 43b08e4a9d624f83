"""Cases of MONAI and diffusers: a U-Net that segments, a GAN with two optimizers, a diffusion model."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_f1_score
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_ppdl.data import MNIST
from support.published import Case, loaders

_PEOPLE = 3


def _discs(count: int, site: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and masks (count, 1, 32, 32): discs in noise, as bright as the site's scanner makes them."""
    stream = torch.Generator().manual_seed(seed)
    centres = 8 + 16 * torch.rand(count, 2, 1, 1, generator=stream)
    radii = 3 + 5 * torch.rand(count, 1, 1, generator=stream)
    grid = torch.arange(32.0)
    distances = (grid[:, None] - centres[:, 0]) ** 2 + (grid - centres[:, 1]) ** 2
    masks = (distances < radii**2).float()[:, None]
    noise = torch.randn(count, 1, 32, 32, generator=stream)
    return (1 + site) * masks + 0.8 * noise + site, masks


class _Segmenter(pl.LightningModule):
    def __init__(self, network: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(self.network(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-3)


def segmentation(data: Any, share_buffers: str | None = "*.running_*") -> Case:
    """MONAI's UNet with batch normalisation; each site has few images, of a scanner of its own."""
    from monai.losses import DiceCELoss  # type: ignore[import-not-found]
    from monai.networks.nets import UNet  # type: ignore[import-not-found]

    def make() -> _Segmenter:
        network = UNet(2, 1, 1, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="BATCH")
        return _Segmenter(network, DiceCELoss(sigmoid=True))

    unseen = [torch.cat(both) for both in zip(*(_discs(60, site, 90 + site) for site in range(_PEOPLE)))]

    def measure(module: _Segmenter) -> float:
        return float(binary_f1_score(module.network(unseen[0]).sigmoid(), unseen[1].int()))

    parts = [_discs(24, site, site) for site in range(_PEOPLE)]
    settings = {"initial": 0, "share_buffers": share_buffers}
    return Case(make, loaders(parts, 4), measure, "Dice", epochs=20, strategy=settings)


def segmentation_with_local_buffers(data: Any) -> Case:
    """The same, with the statistics of batch normalisation left at home."""
    return segmentation(data, share_buffers=None)


def _digits(data: Any) -> Tensor:
    """Images (count, 1, 16, 16) in [-1, 1]: scikit-learn's digits, or MNIST's where there are any."""
    if data is None:
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
        return F.interpolate(images, (16, 16), mode="bilinear")
    shares = MNIST(root=data, normalize=False).load().train
    return F.avg_pool2d(shares.__getitems__(range(2000))[0], 2) * 2 - 1


def _parts(images: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    """Shares of 200 images, and 600 that nobody holds."""
    return [[images[200 * n : 200 * n + 200]] for n in range(_PEOPLE)], images[600:1200]


class _Gan(pl.LightningModule):
    """Both networks take a step with every batch, one optimizer after the other."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, optimizers = batch[0], self.optimizers()
        assert isinstance(optimizers, list)
        for_generator, for_discriminator = optimizers
        fake = self.generator(torch.randn(len(real), 16)).tanh()
        self._step(for_discriminator, self._loss(real, 1.0) + self._loss(fake.detach(), 0.0))
        self._step(for_generator, self._loss(fake, 1.0))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def _loss(self, images: Tensor, label: float) -> Tensor:
        logits = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        both = self.generator, self.discriminator
        return [torch.optim.Adam(network.parameters(), 1e-3, betas=(0.5, 0.9)) for network in both]


class _Components(nn.Module):
    """An image's principal components: the features between whose distributions the distance is taken."""

    axes: Tensor

    def __init__(self, images: Tensor, count: int = 24) -> None:
        super().__init__()
        self.num_features = count
        flat = images.flatten(1)
        self.register_buffer("axes", torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:count].T)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.axes


def gan(data: Any) -> Case:
    """MONAI's Generator and Discriminator, manual optimisation."""
    from monai.networks.nets import Discriminator, Generator

    def make() -> _Gan:
        generator = Generator(16, (32, 4, 4), (16, 8, 1), (2, 2, 1), num_res_units=0, norm="BATCH")
        judge = Discriminator((1, 16, 16), (8, 16, 32), (2, 2, 2), num_res_units=0, norm=None, last_act=None)
        return _Gan(generator, judge)

    parts, unseen = _parts(_digits(data))
    components = _Components(unseen)

    def measure(module: _Gan) -> float:
        distance = FrechetInceptionDistance(feature=components, normalize=True)
        drawn = torch.randn(600, 16, generator=torch.Generator().manual_seed(9))
        distance.update(unseen, real=True)
        distance.update(module.generator(drawn).tanh(), real=False)
        return float(distance.compute())

    settings = {"initial": 0, "share_buffers": "*.running_*"}
    return Case(make, loaders(parts, 20), measure, "Frechet", epochs=30, strategy=settings)


class _Denoiser(pl.LightningModule):
    def __init__(self, network: nn.Module, schedule: Any) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0], torch.default_generator)

    def loss(self, images: Tensor, stream: torch.Generator) -> Tensor:
        noise = torch.randn(images.shape, generator=stream)
        times = torch.randint(len(self.schedule.betas), (len(images),), generator=stream)
        noisy = self.schedule.add_noise(images, noise, times)
        return F.mse_loss(self.network(noisy, times).sample, noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def diffusion(data: Any) -> Case:
    """diffusers' UNet2DModel under a DDPM schedule."""
    from diffusers import DDPMScheduler, UNet2DModel  # type: ignore[import-not-found]

    def make() -> _Denoiser:
        network = UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        )
        return _Denoiser(network, DDPMScheduler(100))

    parts, unseen = _parts(_digits(data))

    def measure(module: _Denoiser) -> float:
        return float(module.loss(unseen, torch.Generator().manual_seed(9)))

    return Case(make, loaders(parts, 20), measure, "loss", epochs=10, strategy={"initial": 0})
