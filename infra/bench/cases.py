"""What the parts measure: presets, batch sizes and parameters. Imports nothing, because `--help` lists them."""

from __future__ import annotations

AS_THEY_COME = "default"
"""In place of a batch size: the defaults of both sides."""
THROUGHPUT_ON_CPU = ("digits:32", "cifar10_tiny:16", "cifar10_tiny:64", "cifar10_tiny:default", "cifar10_ddpm:16")
THROUGHPUT_ON_GPU = ("cifar10_ddpm:128", "cifar10_ddpm:256", "cifar10_ddpm:512", "cifar10_ddpm:default")

ENCODING = {
    "tiny": (
        "image.resolution=64",
        "model.block_out_channels=[32,64,128]",
        "model.attention=[false,true,true]",
    ),
    "stable_diffusion_8th": (
        "image.resolution=128",
        "codec.autoencoder.widths=[16,32,64,64]",
        "codec.autoencoder.layers_per_block=2",
        "codec.text.width=96",
        "codec.text.layers=12",
        "codec.text.length=77",
        "model.block_out_channels=[40,80,160,160]",
        "model.attention=[true,true,true,false]",
        "model.layers_per_block=2",
        "model.attention_head_dim=null",
        "model.heads=1",
        "train.batch_size=64",
        "train.gradient_accumulation=4",
    ),
}
"""`tiny` is what the small presets train at 64x64, with the default autoencoder and text encoder. The other is Stable
Diffusion 1.5 with an eighth of its widths and heads and a quarter of its resolution, which keeps the proportions of its
parts. The batch sizes are those of the presets `laion_sd_tiny` and `laion_sd`."""
