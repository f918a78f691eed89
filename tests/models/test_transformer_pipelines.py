"""Class-conditional transformers on disk: diffusers' `DiTPipeline` draws our images, and ONNX Runtime does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.networks.dit import DiT, DiTConfig
from models.networks.network import build
from models.noise import schedules
from models.noise.samplers import Sampling, SeededNoise
from models.pipeline import PipelineInfo, load_pipeline, save_pipeline
from tests.support.networks import randomised

T, STEPS = 30, 5
SHARED = {"size": 8, "channels": 2, "patch_size": 2, "width": 16, "depth": 2, "heads": 2}
IMAGENET = DiTConfig(**SHARED, conditions=1001)
FEW_CLASSES = DiTConfig(**SHARED, conditions=4)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A folder with a tiny autoencoder, which halves the side."""
    from models.autoencoder_training import AutoencoderConfig
    from models.autoencoder_training import build as build_autoencoder
    from models.networks.autoencoder import save_autoencoder

    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=3, latent_channels=2, widths=(8, 16), layers_per_block=1)
    save_autoencoder(folder / "vae", build_autoencoder(config))
    return folder


def save(folder, config, codec=None, **info):
    """Save a pipeline with random weights."""
    network = randomised(build(config))
    latent = [2, 8] if codec else None
    channels, size = (3, 16) if codec else (config.channels, config.size)
    described = PipelineInfo(
        **{"conditioning": "label", "classes": [], "channels": channels, "size": size, "latent": latent, **info},
        schedule="cosine",
        timesteps=T,
        prediction="v_prediction",
        train_key="",
    )
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    save_pipeline(folder, network, weights, schedules.betas("cosine", T), described, codec)


def names(count: int) -> list[str]:
    return [f"thing {number}" for number in range(count)]


def with_our_sampler(pipeline):
    from diffusers import DDIMScheduler

    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    return pipeline


def to_unit(images: np.ndarray) -> np.ndarray:
    return np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


def test_a_thousand_classes_of_latents_are_a_dit_pipeline(tmp_path, codec, monkeypatch):
    from diffusers import DiffusionPipeline

    save(tmp_path, IMAGENET, codec, classes=names(1000), null_label=1000)
    theirs = with_our_sampler(DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True))
    assert type(theirs).__name__ == "DiTPipeline"
    labels = theirs.get_label_ids(["thing 3", "thing 700"])
    assert labels == [3, 700]
    noise = torch.from_numpy(SeededNoise([5, 6], (2, 8, 8))())
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise)
    expected = theirs(labels, guidance_scale=2.0, num_inference_steps=STEPS, output_type="np").images
    ours = load_pipeline(tmp_path).sample([5, 6], labels, Sampling("ddim", STEPS, guidance_scale=2.0))
    assert expected.std() > 0.01
    assert np.abs(to_unit(ours) - expected).max() < 1e-4


def test_other_classes_have_no_pipeline_in_diffusers_and_load_by_component(tmp_path, codec):
    from diffusers import DiTTransformer2DModel

    save(tmp_path, FEW_CLASSES, codec, classes=names(3), null_label=3)
    assert not (tmp_path / "model_index.json").exists()
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
    x, t, labels = torch.randn(4, 2, 8, 8), torch.tensor([0, 9, 20, 29]), torch.arange(4)
    with torch.inference_mode():
        expected = theirs(x, t, class_labels=labels).sample
        assert (load_pipeline(tmp_path).network(x, t, labels) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("extras", [{}, {"qk_norm": True, "rope": True, "mlp_ratio": 2.0}], ids=["plain", "extras"])
@pytest.mark.parametrize("conditioning", ["none", "label"])
def test_pixels_are_drawn_by_the_saved_network_and_by_onnx(tmp_path, conditioning, extras):
    """With positions or rotations as constants of the graph, and any batch size.

    An export takes seconds: of the four networks two are exported, which have each condition and each kind of position.
    """
    classes = names(3) if conditioning == "label" else []
    config = replace(FEW_CLASSES, conditions=4 if classes else 0, **extras)
    save(tmp_path, config, conditioning=conditioning, classes=classes, null_label=3 if classes else None)
    pipeline = load_pipeline(tmp_path)
    assert pipeline.network.config == config and not (tmp_path / "model_index.json").exists()
    session = onnx_session(pipeline) if bool(classes) == bool(extras) else None
    for batch in (1, 3):
        x, t, labels = torch.randn(batch, 2, 8, 8), torch.arange(batch) * 9, torch.arange(batch) + 1
        inputs = {"sample": x.numpy(), "timestep": t.numpy()} | ({"label": labels.numpy()} if classes else {})
        with torch.inference_mode():
            expected = pipeline.network(x, t, labels if classes else None)
            original = randomised(DiT(config))(x, t, labels if classes else None)
        assert torch.equal(expected, original)
        if session:
            assert np.abs(session.run(None, inputs)[0] - expected.numpy()).max() < 1e-4


def onnx_session(pipeline):
    import onnxruntime

    from models import onnx_graph

    graph = onnx_graph.to_onnx(pipeline, 20)
    return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def test_damaged_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, FEW_CLASSES, classes=names(3), null_label=3)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    save_file(weights | {name: weights[name] + 1}, file)
    with pytest.raises(ValueError, match="blocks of the network embed timestep and class differently"):
        load_pipeline(tmp_path)
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"are not those of the network in its config\.json"):
        load_pipeline(tmp_path)
