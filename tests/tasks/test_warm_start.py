"""Published weights as a start: another architecture, prediction type or noise schedule is found before training."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from models.networks.dit import DiT, DiTConfig
from models.networks.text_unet import TextUNet, TextUNetConfig
from tasks.params import DiffusionParams
from tasks.runtime.errors import StageError
from tasks.training import warm_start
from tests.support.text_inputs import train_params

CONFIG = TextUNetConfig(8, 4, 32, (8, 16), (False, True), 1, 4, attention_head_dim=8)
FLOW = DiffusionParams(schedule="rectified_flow", timesteps=1000, prediction="flow_prediction")
STABLE = DiffusionParams(schedule="scaled_linear", timesteps=1000, prediction="epsilon")
# As in runwayml/stable-diffusion-v1-5: without prediction_type, whose default is epsilon.
PNDM = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture
def published(tmp_path):
    """Return a function that writes a published network with a scheduler and changes of its config.json."""

    def call(scheduler=PNDM, **network):
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / "config.json").write_text(json.dumps(CONFIG.to_diffusers() | network))
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not read")
        if scheduler is not None:
            (tmp_path / "scheduler").mkdir(exist_ok=True)
            (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        found = warm_start.initial_weights(train_params(init_from=str(tmp_path)), "unet")
        assert found is not None
        return found

    return call


def warning(initial, diffusion, capsys) -> str:
    warm_start.check(initial, CONFIG, diffusion)
    return capsys.readouterr().out


def test_stable_diffusion_is_accepted_without_a_warning(published, capsys):
    assert warning(published(), STABLE, capsys) == ""
    euler = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "use_karras_sigmas": False}
    assert warning(published(PNDM | euler), STABLE, capsys) == ""


def test_another_prediction_is_refused(published):
    wrong = STABLE.model_copy(update={"prediction": "v_prediction"})
    with pytest.raises(StageError, match=r"predicts epsilon, not v_prediction; set diffusion\.prediction to epsilon"):
        warm_start.check(published(), CONFIG, wrong)
    with pytest.raises(StageError, match=r"predicts v_prediction, not epsilon"):
        warm_start.check(published(PNDM | {"prediction_type": "v_prediction"}), CONFIG, STABLE)


@pytest.mark.parametrize(
    ("ours", "theirs", "remedy"),
    [
        ({"schedule": "cosine"}, {}, "set diffusion.schedule to 'scaled_linear' to keep"),
        ({"timesteps": 100}, {}, "set diffusion.timesteps to 1000 to keep"),
        (
            {"zero_terminal_snr": True, "prediction": "v_prediction"},
            {"prediction_type": "v_prediction"},
            "set diffusion.zero_terminal_snr to false to keep",
        ),
        ({}, {"beta_end": 0.02}, "choose a diffusion.schedule nearer to it"),
    ],
)
def test_another_noise_schedule_triggers_a_warning_with_its_remedy(published, capsys, ours, theirs, remedy):
    line = warning(published(PNDM | theirs), STABLE.model_copy(update=ours), capsys)
    assert line.startswith("train: warning: ") and "learned another noise" in line and remedy in line
    assert len(line.splitlines()) == 1


def test_without_a_scheduler_a_warning_names_the_assumed_prediction(published, capsys):
    assert "is trained as diffusion.prediction 'epsilon'" in warning(published(None), STABLE, capsys)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_data": 0.5},
        PNDM | {"prediction_type": "flow_prediction"},
        PNDM | {"beta_schedule": "laplace"},
    ],
)
def test_another_kind_of_diffusion_is_refused(published, scheduler):
    """Playground 2.5 has the network of Stable Diffusion XL with another diffusion process."""
    with pytest.raises(StageError, match=r"cannot be trained here: (its|the) .* supported.*; choose another"):
        warm_start.check(published(scheduler), CONFIG, STABLE)


def test_a_flow_is_not_trained_on_a_noise_schedule(published):
    wanted = r"'rectified_flow', not 'scaled_linear'; .*schedule to 'rectified_flow' and .*to 'flow_prediction'"
    with pytest.raises(StageError, match=wanted):
        warm_start.check(published({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}), CONFIG, STABLE)


def test_a_flow_continues_a_flow_whatever_its_sampling(published, capsys):
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    warm_start.check(published(scheduler), CONFIG, FLOW)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "difference",
    [
        {"time_cond_proj_dim": 256},  # distilled, conditioned on the guidance scale
        {"flip_sin_to_cos": False},
        {"mid_block_type": None},
        {"only_cross_attention": True},
        {"out_channels": 8},
    ],
)
def test_an_unsupported_architecture_is_refused_even_if_all_weights_fit(published, difference):
    (name,) = difference
    with pytest.raises(StageError, match=f"cannot be trained here: the network's {name} is"):
        published(**difference)


def test_weights_are_loaded_whatever_their_precision_and_those_of_another_network_refused(published):
    from safetensors.torch import save_file

    initial = published()
    halves = {name: torch.randn(value.shape).half() for name, value in TextUNet(CONFIG).state_dict().items()}
    save_file(halves, initial.folder / "unet" / "diffusion_pytorch_model.safetensors")
    network = TextUNet(CONFIG)
    warm_start.load(network, initial)
    assert all(torch.equal(value, halves[name].float()) for name, value in network.state_dict().items())
    other = TextUNet(CONFIG).state_dict()
    other["conv_in.weight"] = other["conv_in.weight"][:4].contiguous()
    save_file(other, initial.folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(StageError, match=r"is not of the network that its config\.json describes"):
        warm_start.load(TextUNet(CONFIG), initial)
    (initial.folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(StageError, match=r"damaged .* fetch it again"):
        warm_start.load(TextUNet(CONFIG), initial)


def test_published_transformers_are_continued_without_their_variance(tmp_path):
    """A folder as diffusers writes that of facebook/DiT-XL-2-256, scaled down."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    config = DiTConfig(size=8, channels=2, patch_size=2, width=16, depth=2, heads=2, conditions=4)
    theirs = DiTTransformer2DModel.from_config(config.to_diffusers() | {"out_channels": 4})
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "transformer")
    DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(tmp_path / "scheduler")
    initial = warm_start.initial_weights(train_params(init_from=str(tmp_path)), "dit")
    linear = STABLE.model_copy(update={"schedule": "linear"})
    warm_start.check(initial, config, linear)
    network = DiT(config)
    warm_start.load(network, initial)
    x, t, labels = torch.randn(2, 2, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 3])
    with torch.no_grad():
        assert torch.allclose(network(x, t, labels), theirs.eval()(x, t, class_labels=labels).sample[:, :2], atol=1e-5)

    deeper, turned = replace(config, depth=3), replace(config, rope=True)
    with pytest.raises(StageError, match=r"is another network \(num_layers 2 -> 3\); set the section model to fit it"):
        warm_start.check(initial, deeper, linear)
    with pytest.raises(StageError, match=r"is another network \(.*rope"):
        warm_start.check(initial, turned, linear)
    with pytest.raises(StageError, match=r"another kind of network \(DiT, not TextUNet\); set model\.architecture and"):
        warm_start.check(initial, CONFIG, linear)
