"""Text to image in latents: from captioned images to a pipeline that diffusers loads, and an ONNX bundle."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import masks
from models.editing import edit
from models.images.pixels import to_uint8
from models.lora import FILE
from models.networks.text_unet import TextUNet, TextUNetConfig, merged
from models.noise.samplers import Sampling, SeededNoise
from models.pipeline import load_pipeline
from tasks.drawing.options import Options
from tasks.drawing.run import run
from tasks.drawing.settings import read_settings
from tasks.formats import latents
from tasks.params import AutoencoderParams, CodecParams, DitParams, ExportParams, TextParams
from tasks.runtime.errors import StageError
from tests.support import text_inputs
from tests.support.networks import randomised
from tests.support.text_inputs import MODEL, run_train
from tests.support.train_inputs import uniform

CODEC = CodecParams(
    kind="autoencoder",
    conditioning="text",
    autoencoder=AutoencoderParams(widths=(8, 16), latent_channels=2, steps=3, batch_size=8, horizontal_flip=True),
    text=TextParams(steps=3, width=32, layers=1, length=8, words=600),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory, migrated_database):
    """Return the folder in which the stages from `download` to `export` have run."""
    return text_inputs.through(tmp_path_factory.mktemp("text-to-image"), migrated_database, CODEC)


def test_the_pipeline_draws_images_by_prompt_and_differently_by_another(tree):
    model = load_pipeline(tree / "pipeline")
    assert (model.info.size, model.info.channels, model.info.input_shape) == (16, 3, (2, 8, 8))
    draw = {"sampling": Sampling("ddim", 4, guidance_scale=3.0)}
    bright, dark = (model.sample([5], prompts=[f"{word} picture of thing 1"], **draw) for word in ("bright", "dark"))
    assert bright.shape == (1, 3, 16, 16)
    assert not np.array_equal(bright, dark)
    assert np.array_equal(bright, model.sample([5], prompts=["bright picture of thing 1"], **draw))
    by_label = model.sample([5], [0], **draw)
    assert np.array_equal(by_label, model.sample([5], prompts=[model.info.prompts[0]], **draw))
    with pytest.raises(ValueError, match="a prompt, for each image"):
        model.sample([5], **draw)


def test_diffusers_loads_it_whole_and_draws_the_same(tree):
    """`DiffusionPipeline.from_pretrained` alone: our DDIM and theirs give the same picture from the same noise."""
    theirs, ours = text_inputs.drawn_by_both(tree / "pipeline", "StableDiffusionPipeline", 3.0)
    assert np.abs(theirs - ours).max() < 1e-4
    # a scale at which the prompts change the picture, though the network was trained for four steps only
    loud = tree / "pipeline", "StableDiffusionPipeline", 200.0
    theirs, ours = text_inputs.drawn_by_both(*loud, "bright picture")
    assert np.abs(theirs - ours).max() < 1e-3 < np.abs(ours - text_inputs.drawn_by_both(*loud)[1]).max() / 5


def test_the_command_draws_from_a_published_model_and_merges_adapters(tree, tmp_path, monkeypatch):
    """The folder as the hub has it, without the description of this project and with another scheduler."""
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    copy = tmp_path / "published"
    shutil.copytree(tree / "pipeline", copy, ignore=shutil.ignore_patterns("afterimage.json"))
    scheduler = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    changed = scheduler | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(changed))
    once = {"prompt": ["dark picture"], "negative_prompt": "bright", "sampler": "ddim", "steps": 4, "seed": [2]}
    for name, model in (("ours", tree / "pipeline"), ("published", copy)):
        run(Options(**once, model=str(model), guidance=7.5, out=tmp_path / f"{name}.png"))
    run(Options(**once, model=str(copy), out=tmp_path / "default.png"))
    drawn = {name: pixels(tmp_path / f"{name}.png") for name in ("ours", "published", "default")}
    assert np.array_equal(drawn["ours"], drawn["published"]) and np.array_equal(drawn["ours"], drawn["default"])
    with pytest.raises(StageError, match="this model draws text; give --prompt"):
        run(Options(model=str(copy), out=tmp_path / "none.png"))
    save_adapter(tmp_path / "style", load_pipeline(tree / "pipeline").network.state_dict())
    for weight in (0, 0.5):
        lora = [f"{tmp_path / 'style'}:{weight}"]
        run(Options(**once, model=str(copy), lora=lora, out=tmp_path / f"lora-{weight}.png"))
    assert np.array_equal(pixels(tmp_path / "lora-0.png"), drawn["default"])
    assert np.abs(pixels(tmp_path / "lora-0.5.png").astype(int) - drawn["default"]).max() > 2
    (stored,) = read_settings(tmp_path / "lora-0.5.png").lora
    assert stored.weight == 0.5 and len(stored.sha256) == 64


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def save_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write an adapter of the last convolution, whose effect even an untrained network shows."""
    folder.mkdir()
    (out, inside, *kernel) = weights["conv_out.weight"].shape
    state = {"lora_A": torch.ones(1, inside, *kernel), "lora_B": torch.ones(out, 1, 1, 1)}
    save_file({f"unet.conv_out.{name}.weight": value for name, value in state.items()}, folder / FILE)


def test_the_bundle_draws_by_prompt_what_the_pipeline_draws(tree):
    from models.bundle import Bundle

    bundle = Bundle(tree / "onnx")
    prompts = ["bright picture of thing 3", "something never seen"]
    draw = {"sampling": Sampling("dpm_solver_pp_2m", 4, guidance_scale=2.0), "prompts": prompts}
    ours = load_pipeline(tree / "pipeline").sample([1, 2], **draw)
    assert np.abs(bundle.sample([1, 2], **draw) - ours).max() < 1e-3
    given, mask = text_inputs.given_images(2, 16), masks.half(16, 16)
    for chosen in (None, mask):  # with the encoder of the bundle
        edited = edit(load_pipeline(tree / "pipeline"), [1, 2], given, 0.5, chosen, **draw)
        assert np.abs(bundle.edit([1, 2], given, 0.5, chosen, **draw) - edited).max() < 1e-3
    assert np.array_equal(to_uint8(edited)[..., ~mask], given[..., ~mask])
    loud = {"sampling": Sampling("dpm_solver_pp_2m", 4, guidance_scale=200.0), "prompts": prompts}
    avoiding = replace(load_pipeline(tree / "pipeline"), negative_prompt="dark picture").sample([1, 2], **loud)
    assert np.abs(bundle.sample([1, 2], **loud, negative_prompt="dark picture") - avoiding).max() < 1e-3
    assert np.abs(avoiding - bundle.sample([1, 2], **loud)).max() > 1e-2
    assert json.loads((tree / "export.json").read_text())["max_abs_difference"] < 1e-4


def test_training_draws_another_caption_and_mirror_each_epoch(tree):
    from tasks.training.batches import Batches, DrawConfig, open_conditioning
    from tasks.training.stores import open_store

    device = torch.device("cpu")
    conditioning = open_conditioning(tree / "latents", "device", device)
    config = DrawConfig(batch_size=36, timesteps=uniform(20), seed=0)
    store = open_store(tree / "latents", "train", "device", device)
    plain = Batches(store, conditioning, config, device).draw(0)
    without = replace(config, condition_dropout=1.0, horizontal_flip=True)
    dropped = Batches(store, conditioning, without, device).draw(0)
    assert plain.x0.shape == (36, 2, 8, 8) and plain.condition.shape == (36, 8, 32)
    assert torch.equal(dropped.condition, conditioning.null_text.expand(36, 8, 32))
    streamed = open_store(tree / "latents", "train", "stream", device)
    again = Batches(streamed, conditioning, config, device).draw(0)
    assert torch.equal(plain.x0, again.x0) and torch.equal(plain.condition, again.condition)
    assert len({tuple(row) for row in plain.condition.flatten(1).tolist()}) > 1


def test_captions_stored_as_tokens_train_the_same_network(tree, tmp_path, monkeypatch):
    """Embeddings of a batch and of the stage `encode` differ by rounding, seldom by a step of bfloat16 (2^-8)."""
    root = text_inputs.with_tokens(tree, tmp_path)
    texts = latents.open_texts(root / "latents")
    assert texts[0].keys() == {"ids"} and texts[0]["ids"].dtype == np.int32 and texts[0]["ids"].shape[1:] == (8,)
    stored, online = text_inputs.batches_of(tree), text_inputs.batches_of(root)
    for step in range(3):
        a, b = stored.draw(step), online.draw(step)
        assert torch.equal(a.x0, b.x0) and torch.equal(a.t, b.t)
        assert torch.allclose(a.condition, b.condition, rtol=2**-7, atol=1e-5)
        assert (a.condition == b.condition).float().mean() > 0.99
    assert torch.allclose(stored.conditions(5), online.conditions(5), rtol=2**-7, atol=1e-5)
    text_inputs.at_home(root, monkeypatch)
    run_train(root, "pipeline")
    ours, theirs = (load_pipeline(folder / "pipeline").network.state_dict() for folder in (root, tree))
    assert ours.keys() == theirs.keys() and all(torch.isfinite(value).all() for value in ours.values())
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-3


def test_captions_stored_as_tokens_are_encoded_in_the_precision_of_encode(tree, tmp_path, monkeypatch, capsys):
    """Without a GPU as well, where images and prompts are encoded with a warning if the CPU emulates bfloat16."""
    from models import device
    from models.networks.text_encoder import TextEncoder

    monkeypatch.setattr(device, "emulates_bf16", lambda device: True)
    root, asked = text_inputs.with_tokens(tree, tmp_path, "bf16"), []
    warning = "encode.precision: this CPU emulates bfloat16, which is slow; 'no' (float32) is faster\n"
    assert capsys.readouterr().out.count(warning) == 2
    encode_ids = TextEncoder.encode_ids
    monkeypatch.setattr(TextEncoder, "encode_ids", lambda *a: asked.append(a[2]) or encode_ids(*a))
    lower = text_inputs.batches_of(root).draw(0).condition
    exact = text_inputs.batches_of(tree).draw(0).condition
    assert set(asked) == {"bf16"} and latents.read_index(tree / "latents").text_precision is None
    assert 1e-5 < (lower - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 0.02


def test_the_first_network_can_be_trained_on_and_get_a_lora_adapter(tree, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tree / 'mlflow.db'}")
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tree / "scratch"))
    monkeypatch.chdir(tree)
    run_train(tree, "adapted", MODEL.model_copy(update={"lora_rank": 2}), init_from="pipeline", learning_rate=0.5)
    before, after = (load_pipeline(tree / name).network.state_dict() for name in ("pipeline", "adapted"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn" in name and name.endswith(".weight") for name in changed)
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-4) <= 2, name
    assert text_inputs.is_base_with_adapter(tree / "pipeline", tree / "adapted", torch.randn(1, 8, 32))
    assert not (tree / "pipeline" / "lora").exists()
    registered_adapter_is_that_of(tree)


def registered_adapter_is_that_of(tree):
    """MLflow's own flavour gives the adapter back, and with the base's place the pipeline that was trained."""
    import mlflow

    from tasks.registration import adapter
    from tasks.runtime import tracking

    client = tracking.connect()
    key = json.loads((tree / "report-adapted" / "run.json").read_text())["train_key"]
    run = tracking.find_run(client, tracking.TRAIN_KEY, key)
    assert adapter.register(client, "pictures", tree / "adapted", run) == "adapter pictures-lora version 1"
    assert adapter.register(client, "pictures", tree / "adapted", run) == "adapter pictures-lora version 1"
    assert adapter.register(client, "pictures", tree / "pipeline", run) is None
    loaded = mlflow.diffusers.load_model("models:/pictures-lora/1")
    assert (loaded.base_model, loaded.base_model_revision, loaded.adapter_type) == ("./pipeline", None, "lora")
    pipeline = loaded.load_pipeline(base_model=str(tree / "pipeline"), local_files_only=True)
    wanted = load_pipeline(tree / "adapted").network
    x, t, text = torch.randn(1, 2, 8, 8), torch.tensor([7]), torch.randn(1, 8, 32)
    with torch.inference_mode():
        theirs = pipeline.unet(x, t, text).sample
        assert torch.allclose(theirs, wanted(x, t, text), atol=1e-5)


@pytest.mark.slow
def test_a_transformer_is_trained_on_the_same_text_and_drawn_by_diffusers_and_onnx(tree, monkeypatch):
    """Diffusers' `PixArtAlphaPipeline` has another text encoder, so it gets the embeddings."""
    import onnx
    from diffusers import DDIMScheduler, DiffusionPipeline

    from models import onnx_graph
    from models.bundle import Bundle

    text_inputs.at_home(tree, monkeypatch)
    small = DitParams(patch_size=2, width=16, depth=2, heads=2)
    run_train(tree, "dit", MODEL.model_copy(update={"architecture": "dit", "dit": small}), learning_rate=0.1)
    model = load_pipeline(tree / "dit")
    prompts, sampling = ["dark picture of thing 2", "bright picture of thing 1"], Sampling("ddim", 4, guidance_scale=2)
    ours = model.sample([7, 8], prompts=prompts, sampling=sampling)
    assert not np.array_equal(ours, model.sample([7, 8], prompts=prompts[::-1], sampling=sampling))

    theirs = DiffusionPipeline.from_pretrained(tree / "dit", local_files_only=True)
    assert type(theirs).__name__ == "PixArtAlphaPipeline"
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, set_alpha_to_one=True)
    mask = torch.ones(2, model.text.length)
    drawn = theirs(
        prompt_embeds=model.text.encode(prompts),
        prompt_attention_mask=mask,
        negative_prompt=None,
        negative_prompt_embeds=model.text.encode(["", ""]),
        negative_prompt_attention_mask=mask,
        latents=torch.from_numpy(SeededNoise([7, 8], (2, 8, 8))()),
        guidance_scale=2.0,
        num_inference_steps=4,
        use_resolution_binning=False,
        output_type="np",
    ).images
    assert np.abs(drawn.transpose(0, 3, 1, 2) - np.clip((ours + 1) / 2, 0, 1)).max() < 1e-4

    for name, file in {"decoder_to_onnx": "decoder.onnx", "text_to_onnx": "text_encoder.onnx"}.items():
        monkeypatch.setattr(onnx_graph, name, lambda *_, file=file: onnx.load(tree / "onnx" / file))  # the same codec
    text_inputs.run_export(tree, "dit", "onnx-dit")
    assert np.abs(Bundle(tree / "onnx-dit").sample([7, 8], prompts=prompts, sampling=sampling) - ours).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_a_network_of_text_in_float16_passes_the_gate_of_export(tree, monkeypatch, architecture):
    """Its weights are random, because after a few steps many are nearly zero, as at first."""
    import onnx

    from models.networks.network import build
    from models.networks.text_dit import TextDiTConfig

    text_inputs.at_home(tree, monkeypatch)
    trained = load_pipeline(tree / "pipeline")
    shape = {"size": 8, "channels": 2, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "text_width": 32}
    transformer = TextDiTConfig(**shape, rope=True, qk_norm=True)
    network = randomised(build(trained.network.config if architecture == "unet" else transformer))
    monkeypatch.setattr("models.pipeline.load_pipeline", lambda *_: replace(trained, network=network))
    text_inputs.run_export(tree, bundle=f"onnx-{architecture}", precision="fp16")
    report = json.loads((tree / "export.json").read_text())
    assert report["precision"] == "fp16"
    assert report["max_abs_difference"] > 1e-5, "it was computed in float16"
    assert report["min_psnr_db"] > ExportParams().min_psnr
    graph = onnx.load(tree / f"onnx-{architecture}" / "unet.onnx")
    onnx.checker.check_model(graph, full_check=True)
    kinds = [weight.data_type for weight in graph.graph.initializer]
    assert kinds.count(onnx.TensorProto.FLOAT16) > len(list(network.parameters())) / 2


@pytest.mark.parametrize(("precision", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("tokens", [5, 40])
def test_the_network_is_that_of_diffusers_in_output_and_gradients(precision, limit, tokens):
    """Our attention takes different code paths for few tokens and in bfloat16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = TextUNetConfig(8, 2, 32, (8, 16), (True, True), 1, 4, attention_head_dim=8)
    ours = TextUNet(config)
    theirs = UNet2DConditionModel.from_config(config.to_diffusers())
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    x, t, text = torch.randn(2, 2, 8, 8), torch.tensor([3, 9]), torch.randn(2, tokens, 32)
    wanted = theirs(x, t, text, return_dict=False)[0]
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        found = ours(x, t, text)
    weigh = torch.randn(2, 2, 8, 8)
    for output in (found.float(), wanted):
        (output * weigh).sum().backward()
    assert (found - wanted).abs().max() < limit * wanted.abs().max()
    gradients = dict(ours.named_parameters())
    theirs_and_ours = [(its.grad, gradients[name].grad) for name, its in theirs.named_parameters()]
    assert len(theirs_and_ours) == len(gradients)
    for its, same in theirs_and_ours if precision == torch.float32 else ():
        assert (its - same).abs().max() <= limit * max(1, its.abs().max())
    its, same = (torch.cat([pair[side].flatten() for pair in theirs_and_ours]) for side in (0, 1))
    assert (its - same).norm() < limit * its.norm()


def test_a_lora_adapter_starts_at_zero_and_merges_exactly():
    torch.manual_seed(0)
    config = TextUNetConfig(8, 2, 32, (8, 16), (False, True), 1, 4, attention_head_dim=8)
    plain = TextUNet(config)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network = TextUNet(replace(config, lora_rank=2))
    network.load_published(plain.state_dict())
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([3, 9]), torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.allclose(network(*inputs), plain(*inputs), atol=1e-6)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in trained:
            torch.nn.init.normal_(parameter, std=0.3)
        assert not torch.allclose(network(*inputs), plain(*inputs), atol=1e-3)
        again = TextUNet(config)
        again.load_state_dict(merged(network.state_dict()))
        assert torch.allclose(again(*inputs), network(*inputs), atol=1e-5)
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in plain.parameters()) / 10


def test_without_classes_it_is_evaluated_by_the_captions_of_held_out_images(tree):
    import csv

    from tasks.evaluate import evaluate
    from tasks.judge import judge
    from tasks.params import EvaluateParams, ImageParams, JudgeParams
    from tasks.runtime import measures

    data, out = (tree / "images", tree / "accepted.json"), tree / "evaluated"
    brief = JudgeParams(classifier_steps=2, clip_steps=2, batch_size=8)
    judge(*data, tree / "judge", brief, ImageParams(resolution=16, channels=3))
    scales = {"guidance_scale": 2.0, "guidance_sweep": [1.0, 2.0], "n_sweep": 2}
    counts = {"n_distance": 4, "n_accuracy": 4, "n_compare": 2, "n_slowest": 2, "batch_size": 3, "allow_small_n": True}
    params = EvaluateParams.model_validate({"sampler": "ddim", "steps": 2, **scales, **counts})
    more = tree / "averages-pipeline", tree / "prior", out / "m.json", out / "report", out / "timing.json"
    evaluate(tree / "pipeline", *data, tree / "judge", *more, params)
    measured = measures.read(out / "report" / measures.FILE)
    assert {"frechet_distance", "clip_score"} <= measured.measures.keys() and measured.measures["clip_score"].real
    rows = list(csv.DictReader((out / "report" / "timesteps.csv").read_text().splitlines()))
    held_out = json.loads((tree / "images" / "index.json").read_text())["splits"]["test"]
    assert {row["n"] for row in rows} == {str(held_out)}
    assert [row["timestep"] for row in rows][:: len(rows) - 1] == ["0", "19"]
    assert len({row["squared_error"] for row in rows}) > 1 and all(float(row["squared_error"]) > 0 for row in rows)


def test_sample_grids_and_drawn_images_are_images(tree):
    grid = sorted((tree / "report-pipeline" / "samples").glob("*.png"))
    assert grid and grid[0].read_bytes().startswith(b"\x89PNG")
    drawn = to_uint8(load_pipeline(tree / "pipeline").sample([1], [0], Sampling("ddim", 2)))
    assert drawn.shape == (1, 3, 16, 16)
