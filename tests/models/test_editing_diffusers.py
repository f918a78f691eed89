"""Image-to-image and inpainting in latents, against diffusers' pipelines of Stable Diffusion step by step."""

import numpy as np
import pytest
import torch

from models.editing import edit
from models.networks.network import build, config_of, load_weights
from models.noise import schedules
from models.noise.paths import DiffusionPath
from models.noise.samplers import Sampling, SchedulerConfig, SeededNoise
from models.pipeline import Pipeline, PipelineInfo
from tests.support.networks import randomised

T, STEPS, SIZE, SEEDS = 100, 10, 16, (5, 6)  # DDIM of diffusers needs steps that divide T
BETAS = schedules.betas("scaled_linear", T)
MODULES = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE), dtype=np.uint8)
MASK = np.zeros((2, SIZE, SIZE), bool)
MASK[0, :, 8:], MASK[1, 4:12, 4:12] = True, True  # aligned to latents, where diffusers' masks agree with ours


class FixedText:
    """Stands for a text encoder: prompt -> token embeddings drawn from it."""

    pooled = None

    def encode(self, prompts):
        drawn = [np.random.default_rng(len(prompt)).standard_normal((4, 8), np.float32) for prompt in prompts]
        return torch.from_numpy(np.stack(drawn))


def unet_config(channels):
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": SIZE // 2, "in_channels": channels, "out_channels": 4,
        "cross_attention_dim": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    """Return a random autoencoder, and random U-Nets of diffusers by their number of input channels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, sample_size=SIZE, **kinds)
    unets = {}
    for channels in (4, 9):
        given = {key: value for key, value in unet_config(channels).items() if key != "_class_name"}
        unets[channels] = randomised(UNet2DConditionModel(**given))
    return randomised(vae), unets


def ours_of(parts, channels, prediction="v_prediction"):
    vae, unets = parts
    network = build(config_of(unet_config(channels)))
    load_weights(network, unets[channels].state_dict())
    info = PipelineInfo(
        "text", 3, SIZE, "scaled_linear", T, prediction, "", ["a"], prompts=["a"], latent=(4, SIZE // 2)
    )
    scheduler = SchedulerConfig(DiffusionPath(schedules.alpha_bar(BETAS)), prediction, clip_sample=False)
    return Pipeline(network.eval(), scheduler, info, autoencoder=vae, text=FixedText())


def theirs_of(parts, channels, kind, sampler):
    import diffusers

    vae, unets = parts
    named = {"trained_betas": BETAS.tolist(), "num_train_timesteps": T, "prediction_type": "v_prediction"}
    named |= {"timestep_spacing": "trailing", "steps_offset": 1}
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(**named, clip_sample=False),
        "ddpm": lambda: diffusers.DDPMScheduler(**named, clip_sample=False),
        "dpm_solver_pp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**named),
    }[sampler]()
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        vae, None, None, unets[channels], scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trajectories(parts, channels, kind, sampler, strength, monkeypatch, mask=None):
    """Return x after each step of diffusers and of ours, from the same noise."""
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    draw, mode = SeededNoise(SEEDS, (4, SIZE // 2, SIZE // 2)), module.retrieve_latents

    def fed(*_, **__):
        return torch.from_numpy(draw())

    for name in (f"{MODULES}_{kind.lower()}.randn_tensor", "diffusers.schedulers.scheduling_ddpm.randn_tensor"):
        monkeypatch.setattr(name, fed)
    monkeypatch.setattr(  # ours takes the mean of the posterior
        f"{MODULES}_{kind.lower()}.retrieve_latents", lambda output, generator: mode(output, None, "argmax")
    )
    prompts, theirs, ours = ["four", "three"], [], []
    options = {} if mask is None else {"mask_image": torch.from_numpy(mask[:, None].astype(np.float32))}
    theirs_of(parts, channels, kind, sampler)(
        image=torch.from_numpy(PIXELS) / 255,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        prompt_embeds=FixedText().encode(prompts),
        negative_prompt_embeds=FixedText().encode(["", ""]),
        output_type="latent",
        callback_on_step_end=lambda _, i, t, named: theirs.append(named["latents"]) or {},
        **options,
    )
    edit(
        ours_of(parts, channels),
        SEEDS,
        PIXELS,
        strength,
        mask,
        prompts=prompts,
        sampling=Sampling(sampler, STEPS, guidance_scale=2.0),
        callback=lambda i, t, x, x0: ours.append(x),
    )
    return theirs, ours


def require_equal(theirs, ours, steps):
    assert len(theirs) == len(ours) == steps
    assert ours[0].std() > 0.1
    for expected, x in zip(theirs, ours, strict=True):
        assert float((expected - x).abs().max()) < 1e-4


@pytest.mark.parametrize(("strength", "steps"), [(0.35, 3), (0.8, 8), (1.0, 10)])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver_pp_2m"])
def test_image_to_image_equals_diffusers_after_every_step(parts, monkeypatch, sampler, strength, steps):
    require_equal(*trajectories(parts, 4, "Img2Img", sampler, strength, monkeypatch), steps)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(("strength", "steps"), [(0.55, 5), (1.0, 10)])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver_pp_2m"])
def test_inpainting_equals_diffusers_after_every_step(parts, monkeypatch, sampler, strength, steps, channels):
    """With 4 channels the known region is replaced, with 9 an inpainting U-Net sees it."""
    require_equal(*trajectories(parts, channels, "Inpaint", sampler, strength, monkeypatch, MASK), steps)
