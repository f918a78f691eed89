"""Imports of the packages that DVC and the stages load, so that forks of the importing process do not repeat them."""

import importlib

PACKAGES = (
    "PIL.PngImagePlugin",
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.schedulers.scheduling_ddpm",
    "dvc.api",
    "dvc.cli",
    "dvc.commands.repro",
    "dvc.repo.reproduce",
    "great_expectations",
    "hydra",
    "matplotlib.figure",
    "mlflow.models.model",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "numpy",
    "onnxruntime",
    "pandas",
    "pyarrow.parquet",
    "safetensors.torch",
    "scipy.linalg",
    "sklearn.datasets",
    "tokenizers",
    "torch.onnx",
    "torch.utils.flop_counter",
    "torchmetrics.image.kid",
    "transformers.models.clip.modeling_clip",
)

for name in PACKAGES:
    importlib.import_module(name)
