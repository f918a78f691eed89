"""Latents: the autoencoder, its scaling, and an encoding that computes only what is new."""

import json
import re

import numpy as np
import pytest
import torch

from models import autoencoder_training as training
from models.autoencoder_training import AutoencoderConfig
from models.judges.fit import Recipe
from models.networks import autoencoder
from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.formats import latents
from tasks.ingest import ingest
from tasks.params import AutoencoderParams, CodecParams, EncodeParams, ImageParams
from tasks.pictures import images
from tasks.runtime import atomic
from tasks.runtime.errors import StageError
from tests.support.data_inputs import contents, folder_params, ingest_params, picture, write_tree

CONFIG = AutoencoderConfig(channels=3, latent_channels=2, widths=(8, 16), layers_per_block=1)
FORM = ImageParams(resolution=16, channels=3)
WANTED = AutoencoderParams(widths=(8, 16), latent_channels=2, steps=3, batch_size=8)
FILES = {f"{'cat' if seed % 3 else 'dog'}/{seed:02d}.png": picture(seed, (20, 16)) for seed in range(50)}


def two_colours(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Images whose upper half has one colour and whose lower half another."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 3, 2, 1), np.uint8)
    return np.repeat(np.repeat(colours, size // 2, axis=2), size, axis=3)


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return training.build(CONFIG).eval()


def test_training_teaches_reconstruction_and_is_reproducible():
    pixels = two_colours(64) // 128 * 255
    taught = training.train_autoencoder(pixels, CONFIG, Recipe(50, 8, seed=0))
    first, again = (training.train_autoencoder(pixels, CONFIG, Recipe(2, 8, seed=0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    learned, untaught = (
        training.quality(pixels, autoencoder.reconstruct(network, pixels))["psnr"] for network in (taught, first)
    )
    assert learned > untaught + 1


def test_quality_of_known_differences():
    pixels = np.full((2, 1, 16, 16), 100, np.uint8)
    assert training.quality(pixels, pixels)["ssim"] == pytest.approx(1)
    assert training.quality(pixels, pixels + 5)["psnr"] == pytest.approx(10 * np.log10(255**2 / 25))


def test_edges_cost_more_where_they_are_blurred(untrained):
    sharp = torch.zeros(1, 1, 4, 4)
    sharp[..., 2:] = 1
    shifted = sharp + 0.5  # as far off, its edges kept
    blurred = torch.full_like(sharp, 0.5)
    cost = [float(training.reconstruction_loss(image, sharp, CONFIG)) for image in (shifted, blurred)]
    assert cost[0] == pytest.approx(0.5)
    assert cost[1] == pytest.approx(0.5 + CONFIG.edge_weight / 3)  # one edge in three columns of differences


def test_folded_scaling_normalises_latents_and_leaves_images_as_they_were(untrained, tmp_path):
    pixels = two_colours(40)
    autoencoder.save_autoencoder(tmp_path / "vae", untrained)
    network = autoencoder.load_autoencoder(tmp_path / "vae")
    mean, std = training.measure_scaling(network, pixels)
    raw_mean, raw_std = autoencoder.encode(network, pixels[:8])
    decoded = autoencoder.decode(network, raw_mean)
    training.fold_scaling(network, mean, std)
    folded_mean, folded_std = autoencoder.encode(network, pixels[:8])
    shape = (1, -1, 1, 1)
    expected = (raw_mean - mean.float().reshape(shape)) / std.float().reshape(shape)
    assert torch.allclose(folded_mean, expected, atol=1e-5)
    assert torch.allclose(folded_std, raw_std / std.float().reshape(shape), atol=1e-5)
    assert torch.allclose(autoencoder.decode(network, folded_mean), decoded, atol=1e-5)
    again = training.measure_scaling(network, pixels)
    assert torch.allclose(again[0], torch.zeros(2).double(), atol=1e-5)
    assert torch.allclose(again[1], torch.ones(2).double(), atol=1e-5)
    assert network.config.scaling_factor == 1


def test_a_published_factor_is_heeded_and_can_be_folded_too(untrained, tmp_path):
    autoencoder.save_autoencoder(tmp_path / "vae", untrained)
    plain = autoencoder.load_autoencoder(tmp_path / "vae")
    scaled = autoencoder.load_autoencoder(tmp_path / "vae")
    scaled.register_to_config(scaling_factor=0.25)
    pixels = two_colours(20)
    for expected, found in zip(autoencoder.encode(plain, pixels), autoencoder.encode(scaled, pixels), strict=True):
        assert torch.allclose(found, expected / 4, atol=1e-6)
    latent = autoencoder.encode(scaled, pixels)[0]
    decoded = autoencoder.decode(scaled, latent)
    assert torch.allclose(decoded, autoencoder.decode(plain, latent * 4), atol=1e-5)
    training.fold_scaling(scaled, *training.measure_scaling(scaled, pixels))
    assert torch.allclose(autoencoder.decode(scaled, autoencoder.encode(scaled, pixels)[0]), decoded, atol=1e-5)


def test_large_images_pass_in_parts(untrained, monkeypatch):
    pixels = two_colours(5)
    whole = autoencoder.encode(untrained, pixels)
    decoded = autoencoder.decode(untrained, whole[0])
    monkeypatch.setattr(autoencoder, "CHUNK_PIXELS", 2 * 16 * 16)
    passed = []
    hook = untrained.encoder.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    in_parts = autoencoder.encode(untrained, pixels)
    hook.remove()
    assert passed == [2, 2, 1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(in_parts, whole, strict=True))
    assert torch.allclose(autoencoder.decode(untrained, whole[0]), decoded, atol=1e-6)


def test_bfloat16_decodes_nearly_the_same_images_and_float16_in_float32(untrained):
    latents = autoencoder.encode(untrained, two_colours(4))[0]
    exact, lower, half = (autoencoder.decode(untrained, latents, precision) for precision in ("no", "bf16", "fp16"))
    assert lower.dtype == torch.float32 and not torch.equal(lower, exact)
    assert 30 < 10 * torch.log10(4 / (lower - exact).square().mean()) < 100
    assert torch.equal(half, exact), "float16 overflows in some autoencoders"
    assert {weights.dtype for weights in untrained.parameters()} == {torch.float32}


def test_as_many_latents_are_decoded_at_once_as_the_memory_holds(untrained):
    one = autoencoder.DECODE_MAPS * CONFIG.widths[0] * 4 * 16 * 16
    latents, passed = torch.zeros(5, 2, 8, 8), []
    assert autoencoder.downscale_factor(untrained) == 2
    hook = untrained.decoder.register_forward_hook(lambda _, inputs, __: passed.append(len(inputs[0])))
    for held in (1, 2.5, 1000):
        memory = int(held * one / autoencoder.MEMORY_SHARE) + 1
        assert autoencoder.decode(untrained, latents, memory=memory).shape == (5, 3, 16, 16)
    hook.remove()
    assert passed == [1] * 5 + [2, 2, 1] + [5]


class Chain:
    """Run download, ingest, codec and encode, each time in the same folders and with the same scratch folder."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def make_codec(self, files=FILES, wanted=WANTED, conditioning="label", image=FORM):
        source = write_tree(self.folder / "in", files)
        download(self.folder / "raw", folder_params(source))
        ingest(self.folder / "raw", self.images, self.folder / "quarantine", ingest_params())
        atomic.write_json(self.folder / "accepted.json", {"verdict": "accepted"})
        params = CodecParams(kind="autoencoder", conditioning=conditioning, autoencoder=wanted)
        codec(self.images, self.folder / "accepted.json", self.codec, params, image)

    def encode(self, **params):
        """Encode; returns what was printed."""
        self.capsys.readouterr()
        encode(self.images, self.folder / "accepted.json", self.codec, self.latents, EncodeParams(**params))
        return self.capsys.readouterr().out

    images = property(lambda self: self.folder / "images")
    codec = property(lambda self: self.folder / "codec")
    latents = property(lambda self: self.folder / "latents")


@pytest.fixture
def chain(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    return Chain(tmp_path, capsys)


def test_the_codec_writes_what_diffusers_reads_and_says_how_good_it_is(chain):
    from diffusers import AutoencoderKL

    chain.make_codec()
    document = json.loads((chain.codec / "codec.json").read_text())["autoencoder"]
    assert (document["channels"], document["size"], document["scaling"]) == (2, 8, "measured")
    assert len(document["measured_std"]) == 2
    quality = json.loads((chain.codec / "quality.json").read_text())
    assert 3 < quality["autoencoder_psnr"] < 40 and -1 < quality["autoencoder_ssim"] < 1
    assert (chain.codec / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    assert AutoencoderKL.from_pretrained(chain.codec / "vae").config.scaling_factor == 1
    assert str(chain.folder) not in (chain.codec / "vae" / "config.json").read_text()
    before = contents(chain.codec)
    chain.make_codec()
    assert contents(chain.codec) == before


def test_latents_are_those_of_the_autoencoder_in_the_units_of_the_model(chain):
    chain.make_codec()
    chain.encode()
    index = latents.read_index(chain.latents)
    assert (index.channels, index.size, index.image.model_dump()) == (2, 8, {"channels": 3, "size": 16})
    samples = images.load_pixels(chain.images, "train", FORM)
    its = latents.load_latents(chain.latents, "train")
    network = autoencoder.load_autoencoder(chain.codec / "vae")
    mean, std = autoencoder.encode(network, samples.pixels)
    assert its.mean.dtype == its.std.dtype == torch.bfloat16
    assert its.mean.shape == (len(samples.keys), 1, 2, 8, 8)
    assert torch.allclose(its.mean[:, 0].float(), mean, rtol=2**-7, atol=1e-4)
    assert torch.allclose(its.std[:, 0].float(), std, rtol=2**-7, atol=1e-4)
    drawn = its.mean.double() + its.std.double() * torch.randn(its.mean.shape, dtype=torch.float64)
    assert drawn.mean().abs() < 0.1 and abs(drawn.std() - 1) < 0.1
    assert np.array_equal(its.labels, samples.labels)
    assert its.pixels is None and its.count == len(samples.keys)


def test_mirrored_copies_are_the_latents_of_mirrored_images(chain):
    chain.make_codec()
    chain.encode(horizontal_flip=True)
    its = latents.load_latents(chain.latents, "train")
    pixels = images.load_pixels(chain.images, "train", FORM).pixels
    network = autoencoder.load_autoencoder(chain.codec / "vae")
    mirrored = autoencoder.encode(network, np.ascontiguousarray(pixels[..., ::-1]))[0]
    assert its.mean.shape[1] == 2
    assert torch.allclose(its.mean[:, 1].float(), mirrored, rtol=2**-7, atol=1e-4)
    assert not torch.allclose(its.mean[:, 0].float().flip(3), mirrored, atol=1e-2)  # a network is no mirror


def test_only_what_is_new_is_encoded(chain):
    chain.make_codec()
    said = chain.encode()
    assert "50 images to encode, 0 known" in said
    assert re.search(r"100,000 images take 51\.2 MB, and as much in the scratch folder", said)
    assert said.index("100,000") < said.index("to encode")
    before = contents(chain.latents)

    assert "0 images to encode, 50 known" in chain.encode()
    assert contents(chain.latents) == before

    write_tree(chain.folder / "in", {"cat/01.png": picture(1000, (20, 16))})
    download(chain.folder / "raw", folder_params(chain.folder / "in"))
    ingest(chain.folder / "raw", chain.images, chain.folder / "quarantine", ingest_params())
    assert "1 images to encode, 49 known" in chain.encode()
    edited = contents(chain.latents)
    assert edited != before

    said = chain.encode(horizontal_flip=True)
    assert "changed since the last time: mirrored copies; all images are encoded anew" in said
    assert "50 images to encode" in said


def test_a_damaged_block_is_made_again(chain):
    chain.make_codec()
    chain.encode()
    before = contents(chain.latents)
    (block,) = (chain.folder / "scratch" / "encode" / "images").rglob("*.safetensors")
    block.write_bytes(block.read_bytes()[:-100])
    said = chain.encode()
    assert f"{block} is damaged" in said and "50 images to encode, 0 known" in said
    assert contents(chain.latents) == before


def test_another_autoencoder_is_named_as_what_changed(chain):
    chain.make_codec()
    chain.encode()
    chain.make_codec(wanted=WANTED.model_copy(update={"steps": 4}))
    said = chain.encode()
    assert "changed since the last time: autoencoder; all images are encoded anew" in said


def test_neither_workers_nor_interruption_nor_history_change_a_byte(chain, tmp_path, monkeypatch):
    """One worker, three workers, an edit that is reverted, and a killed run end in the same bytes."""
    chain.make_codec(FILES | {f"more/{seed}.png": picture(seed, (20, 16)) for seed in range(100, 240)})
    chain.encode(workers=1)
    expected = contents(chain.latents)

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "other"))
    chain.encode(workers=3)
    assert contents(chain.latents) == expected

    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "killed"))
    from tasks.encoding.blocks import Blocks

    add, added = Blocks.add, []

    def add_once(self, *arguments):
        if added:
            raise KeyboardInterrupt
        added.append(add(self, *arguments))

    monkeypatch.setattr(Blocks, "add", add_once)
    with pytest.raises(KeyboardInterrupt):
        chain.encode()
    monkeypatch.setattr(Blocks, "add", add)
    assert contents(chain.latents) == expected  # the old output stays until the new one is complete
    assert "126 images to encode, 64 known" in chain.encode()
    assert contents(chain.latents) == expected


def test_with_a_gpu_the_workers_only_decode_and_no_latent_changes(chain, monkeypatch):
    """Both ways of sharing the work, on the CPU, whose number makes it a device like a GPU."""
    from concurrent.futures import ThreadPoolExecutor

    from tasks.encoding.encoder import Encoder
    from tasks.encoding.transform import Chunk

    chain.make_codec()
    chunks = [Chunk((16, 16), [("hash", picture(seed, (20, 16)), 320)] * 3) for seed in range(9)]
    network = autoencoder.load_autoencoder(chain.codec / "vae")
    monkeypatch.setattr("tasks.encoding.encoder.memory_of", lambda _: 1 << 30)
    with ThreadPoolExecutor(2) as pool:
        shared, fed = (
            list(Encoder(pool, 2, network, 3, False, device).encoded(iter(chunks))) for device in ("cpu", "cpu:0")
        )
    assert [chunk for chunk, _ in shared] == [chunk for chunk, _ in fed] == chunks
    assert all(torch.equal(a["mean"], b["mean"]) for (_, a), (_, b) in zip(shared, fed, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_encoding_at_most_of_what_decoder_and_encoder_allow(chain, tmp_path, monkeypatch):
    """At least 80% of 1 / (1 / decode + 1 / encode) on a CPU, where both share the cores; on a GPU of the slower one.

    The best of three runs counts, because other load on the machine may slow only one of the measurements.
    """
    photos = {f"{seed}.jpg": picture(seed, (240, 200), "JPEG") for seed in range(640)}
    wanted = AutoencoderParams(steps=2)
    chain.make_codec(photos, wanted, "none", ImageParams(resolution=64, channels=3))
    shares = []
    for turn in range(3):
        monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / f"scratch-{turn}"))
        said = chain.encode()
        assert "640 images to encode, 0 known" in said
        shares.append(int(re.search(r"(\d+)% of what the two allow", said).group(1)))
        if shares[-1] >= 80:
            return
    pytest.fail(f"{shares}% of what the two allow")


def test_published_weights_are_used_as_they_are_and_pinned(chain, untrained):
    published = chain.folder / "published" / "vae"
    untrained.register_to_config(scaling_factor=0.5)
    autoencoder.save_autoencoder(published, untrained)
    untrained.register_to_config(scaling_factor=1.0)
    from models.hashing import file_sha256

    pin = file_sha256(published / "diffusion_pytorch_model.safetensors")
    given = {"weights": str(chain.folder / "published"), "pin": pin, "widths": (8, 16), "latent_channels": 2}
    chain.make_codec(wanted=AutoencoderParams(**given, scaling="published"))
    document = json.loads((chain.codec / "codec.json").read_text())["autoencoder"]
    assert document["scaling"] == "published"
    kept = autoencoder.load_autoencoder(chain.codec / "vae")
    assert kept.config.scaling_factor == 0.5
    assert all(
        torch.equal(a, b) for a, b in zip(kept.state_dict().values(), untrained.state_dict().values(), strict=True)
    )
    for change, sentence in (
        ({"pin": "0" * 64}, "and not the pinned"),
        ({"widths": (8, 16, 16)}, "set it to the widths of the weights"),
        ({"latent_channels": 4}, "make 2 latent channels"),
        ({"weights": str(chain.folder / "nowhere")}, "are not a local folder"),
    ):
        with pytest.raises(StageError, match=sentence):
            chain.make_codec(wanted=AutoencoderParams(**(given | change)))
    described = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(described | {"latents_mean": [0.1, 0.2]}))
    with pytest.raises(StageError, match=r"by a latents_mean as well as a scaling factor, .*; choose other weights"):
        chain.make_codec(wanted=AutoencoderParams(**given, scaling="published"))


def test_a_tiny_autoencoder_keeps_its_published_scaling(chain):
    from diffusers import AutoencoderTiny

    from models.hashing import file_sha256

    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    )
    tiny.save_pretrained(chain.folder / "tiny", safe_serialization=True)
    pin = file_sha256(chain.folder / "tiny" / "diffusion_pytorch_model.safetensors")
    given = {"weights": str(chain.folder / "tiny"), "pin": pin, "widths": (8, 16), "latent_channels": 2}
    with pytest.raises(StageError, match=r"set codec\.autoencoder\.scaling to 'published'"):
        chain.make_codec(wanted=AutoencoderParams(**given))
    chain.make_codec(wanted=AutoencoderParams(**given, scaling="published"))
    chain.encode()
    its = latents.load_latents(chain.latents, "train")
    assert its.mean.abs().sum() > 0 and its.std.abs().sum() == 0
