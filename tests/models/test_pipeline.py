"""A pipeline on disk: what diffusers reads of ours and we of theirs, and images that depend on their seed alone."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.networks.unet import UNet, UNetConfig
from models.noise import schedules
from models.noise.samplers import OF_DIFFUSION, Sampling
from models.pipeline import PipelineInfo, load_pipeline, save_pipeline
from tests.support import model_outputs

CONFIG = UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8)
T = 30


def random_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Small random numbers everywhere, so that every layer has a say in the output."""
    torch.manual_seed(0)
    return {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}


def fed_to_diffusers(monkeypatch, draws: np.ndarray) -> None:
    """Let diffusers draw these noises, in this order: x_T first."""
    fed = iter(torch.from_numpy(draws))
    for module in ("diffusers.pipelines.ddpm.pipeline_ddpm", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(fed))


@pytest.mark.parametrize(("sampler", "offset"), [("ddim", 0), ("ddim", 1), ("dpm_solver_pp_2m", 1)])
def test_a_published_model_is_sampled_at_the_timesteps_of_its_scheduler(tmp_path, monkeypatch, sampler, offset):
    """The default spacing of diffusers is "leading"; our own pipelines set "trailing"."""
    from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler

    publish(tmp_path, steps_offset=offset, prediction_type="v_prediction")
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["timestep_spacing"] == "leading"
    ours, theirs = load_pipeline(tmp_path), DDPMPipeline.from_pretrained(str(tmp_path))
    config = theirs.scheduler.config
    if sampler == "ddim":
        scheduler = DDIMScheduler.from_config(config)
    else:  # which clips under this name
        scheduler = DPMSolverMultistepScheduler.from_config(config, thresholding=True, sample_max_value=1.0)
    scheduler.set_timesteps(7)
    x = torch.from_numpy(noises([3, 4], ours, 1)[0])
    options = {"use_clipped_model_output": True} if sampler == "ddim" else {}
    seen = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs.unet(x, t).sample, t, x, **options).prev_sample
    drawn = ours.sample([3, 4], sampling=Sampling(sampler, 7), callback=lambda i, t, x, x0: seen.append(t))
    assert seen == scheduler.timesteps.tolist() and seen[0] < T - 1
    assert np.abs(drawn - x.numpy()).max() < 1e-4


def noises(seeds: list[int], pipeline, count: int) -> np.ndarray:
    from models.noise.samplers import SeededNoise

    draw = SeededNoise(seeds, (pipeline.info.channels, pipeline.info.size, pipeline.info.size))
    return np.stack([draw() for _ in range(count)])


def difference_from_diffusers(folder, monkeypatch) -> float:
    """Largest difference of the pixels, 0 to 1, that all timesteps of both make of the same noise."""
    from diffusers import DDPMPipeline

    ours = load_pipeline(folder)
    theirs = DDPMPipeline.from_pretrained(str(folder))
    theirs.set_progress_bar_config(disable=True)
    fed_to_diffusers(monkeypatch, noises([3, 4], ours, ours.info.timesteps + 1))
    expected = theirs(batch_size=2, num_inference_steps=ours.info.timesteps, output_type="np").images
    drawn = ours.sample([3, 4], sampling=Sampling("ddpm", ours.info.timesteps))
    assert expected.std() > 0.05, "the comparison needs pictures with something in them"
    return float(np.abs((drawn / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1) - expected).max())


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("schedule", "to_zero"), [("linear", False), ("cosine", False), ("sigmoid", False), ("linear", True)]
)
def test_saved_pipeline_gives_the_same_images_in_diffusers(tmp_path, monkeypatch, schedule, to_zero, prediction):
    if to_zero and prediction == "epsilon":
        pytest.skip("refused at load: the noise in pure noise says nothing of an image")
    unet = UNet(CONFIG)
    info = PipelineInfo("none", 1, 8, schedule, T, prediction, train_key="", classes=[])
    betas = schedules.betas(schedule, T, to_zero)
    save_pipeline(tmp_path, unet, random_weights(unet), betas, info)
    assert difference_from_diffusers(tmp_path, monkeypatch) < 1e-4


# As google/ddpm-cifar10-32 has it.
PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
OTHER = {
    **PUBLISHED,
    "attention_head_dim": 8,
    "block_out_channels": [8, 8, 16],
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
}


def publish(folder, unet: dict | None = None, **scheduler) -> None:
    """A folder as diffusers itself writes it, with random weights."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(**(unet or PUBLISHED))
    network.load_state_dict(random_weights(network))
    DDPMPipeline(network, DDPMScheduler(T, **scheduler)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("unet", "scheduler"),
    [
        (PUBLISHED, {"variance_type": "fixed_large"}),
        (PUBLISHED, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        (OTHER, {"beta_schedule": "sigmoid", "beta_start": 1e-3, "beta_end": 0.05, "prediction_type": "sample"}),
        (
            OTHER,
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "variance_type": "fixed_small_log"},
        ),
    ],
)
def test_published_weights_give_the_same_images_as_in_diffusers(tmp_path, monkeypatch, unet, scheduler):
    publish(tmp_path, unet, **scheduler)
    assert difference_from_diffusers(tmp_path, monkeypatch) < 1e-4


def test_a_repository_of_the_first_days(tmp_path, monkeypatch):
    """All files in one folder, few keys in them, attention layers under other names: as google/ddpm-cifar10-32."""
    from safetensors.torch import load_file, save_file

    publish(tmp_path / "today")
    folder = tmp_path / "then"
    folder.mkdir()
    shutil.copy(tmp_path / "today" / "model_index.json", folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **PUBLISHED}))
    scheduler = {"_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001}
    scheduler |= {"clip_sample": True, "num_train_timesteps": T, "trained_betas": None, "variance_type": "fixed_large"}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    weights = load_file(tmp_path / "today" / "unet" / "diffusion_pytorch_model.safetensors")
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    assert difference_from_diffusers(folder, monkeypatch) < 1e-4
    assert load_pipeline(folder).info.schedule == "linear"


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("unet/config.json", {"out_channels": 6}, "out_channels is 6; supported: 3"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'"),
        ("unet/config.json", {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types is"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types is"),
        ("unet/config.json", {"sample_size": [8, 16]}, "supported: square images"),
        ("unet/config.json", {"num_class_embeds": 10}, "does not say what its classes are"),
        ("unet/config.json", {"layers_per_block": 1}, "are not those of the network in its config.json"),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ("scheduler/scheduler_config.json", {"clip_sample": False}, "clip_sample is False; supported: True"),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": False}, "set_alpha_to_one is False"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding is True"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "linspace"}, "supported: 'leading', 'trailing'"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "2 trained_betas for 30"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_in_a_sentence(tmp_path, file, change, sentence):
    publish(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"\w") as error:
        load_pipeline(tmp_path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_damaged_and_absent_weights(tmp_path):
    publish(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="is damaged"):
        load_pipeline(tmp_path)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"as a pickle, which could run code; if you trust their author, convert them"):
        load_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_pipeline(tmp_path / "nothing here")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "pipeline"
    model_outputs.write_pipeline(folder)
    return load_pipeline(folder)


@pytest.mark.parametrize("sampler", OF_DIFFUSION)
def test_an_image_depends_on_its_seed_whatever_the_batch(conditional, sampler):
    seeds, labels = list(range(7)), [0, 1, 2, 0, 1, 2, 0]
    sampling = Sampling(sampler, 5, 1.0 if sampler == "ddim" else 0.0, 1.5)

    def draw(batch_size):
        return conditional.sample(seeds, labels, sampling, batch_size=batch_size)

    together = draw(7)
    for batch_size in (1, 2, 3, 5):
        assert np.abs(draw(batch_size) - together).max() < 1e-4
    alone = conditional.sample([5], [2], sampling)
    assert np.abs(alone[0] - together[5]).max() < 1e-4
    assert np.abs(together[0] - together[6]).max() > 1e-2


def test_the_noise_has_the_same_bits_whatever_the_batch(conditional):
    alone = noises([5], conditional, 3)
    assert np.array_equal(alone[:, 0], noises([4, 5, 6], conditional, 3)[:, 1])


def test_a_guide_that_is_the_network_itself_changes_nothing(conditional):
    own = replace(conditional, companions={"guide": conditional.network})
    auto = Sampling("ddim", 10, guidance_scale=3.0, guidance="auto")
    assert np.array_equal(own.sample([1, 2], [0, 1], auto), own.sample([1, 2], [0, 1], Sampling("ddim", 10)))


@pytest.mark.parametrize("conditions", [4, 0])
def test_a_saved_guide_is_what_autoguidance_compares_with(tmp_path, conditions):
    unet = UNet(replace(CONFIG, conditions=conditions))
    weights = random_weights(unet)
    early = {name: 0.9 * value for name, value in weights.items()}
    classes = ["a", "b", "c"] if conditions else []
    info = PipelineInfo("label" if classes else "none", 1, 8, "cosine", T, "sample", "", classes, conditions - 1)
    save_pipeline(tmp_path, unet, weights, schedules.betas("cosine", T), info, companions={"guide": early})
    loaded = load_pipeline(tmp_path)
    assert {name for name in loaded.info.files if name.startswith("guide/")} == {
        "guide/config.json",
        "guide/diffusion_pytorch_model.safetensors",
    }
    labels = [0, 2] if classes else None
    x, level = torch.randn(2, 1, 8, 8), loaded.path.level(T // 2)
    with torch.no_grad():
        strong = loaded.denoiser(labels)(x, level)
        unet.load_state_dict(early)
        weak = replace(loaded, network=unet.eval()).denoiser(labels)(x, level)
        auto = Sampling(guidance_scale=1.2, guidance="auto")
        guided = replace(loaded, scheduler=replace(loaded.scheduler, clip_sample=False)).denoiser(labels, None, auto)
        assert (strong - weak).abs().max() > 1e-3
        assert (strong.abs() < 1).all() and (weak.abs() < 1).all(), "a clipped output would hide the formula"
        assert torch.allclose(guided(x, level), weak + 1.2 * (strong - weak), atol=1e-6)


def test_a_guide_of_another_architecture_is_refused(tmp_path):
    unet = UNet(CONFIG)
    info = PipelineInfo("none", 1, 8, "cosine", T, "sample", train_key="", classes=[])
    weights = random_weights(unet)
    save_pipeline(tmp_path, unet, weights, schedules.betas("cosine", T), info, companions={"guide": weights})
    config = json.loads((tmp_path / "guide" / "config.json").read_text())
    (tmp_path / "guide" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(ValueError, match=r"guide holds another architecture than .*unet, and not weights of the same"):
        load_pipeline(tmp_path)


def test_guidance_acts_at_its_noise_levels_alone(conditional):
    def draw(scale, interval=None):
        return conditional.sample([1, 2], [0, 1], Sampling("ddim", 10, 0.0, scale, interval))

    assert np.array_equal(draw(3.0, (0.0, float("inf"))), draw(3.0))
    assert np.array_equal(draw(3.0, (1e6, 1e7)), draw(1.0))
    part = draw(3.0, (0.2, 2.0))
    assert np.abs(part - draw(3.0)).max() > 1e-3 and np.abs(part - draw(1.0)).max() > 1e-3
