"""Conditioning on captions: the text encoder, the stages that use it, and what they refuse."""

import json

import numpy as np
import pytest
import torch

from tasks.codec import codec
from tasks.download import download
from tasks.encode import encode
from tasks.formats import latents
from tasks.ingest import ingest
from tasks.params import CodecParams, EncodeParams, ImageParams, TextParams
from tasks.runtime import atomic
from tests.support.data_inputs import contents, folder_params, ingest_params, picture, write_tree

FORM = ImageParams(resolution=8, channels=3)
TEXT = CodecParams(kind="identity", conditioning="text", text=TextParams(steps=20, width=32, length=8, words=600))
FILES = {f"{'cat' if seed % 2 else 'dog'}/{seed:02d}.png": picture(seed) for seed in range(60)}


@pytest.fixture
def through(tmp_path, monkeypatch):
    """Return a function that runs download, ingest, codec and encode, and returns their folder."""
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))

    def call(files=FILES, templates=("a {}", "one {} here"), where="first", params=TEXT):
        source, out = write_tree(tmp_path / "in", files), tmp_path / where
        download(out / "raw", folder_params(source))
        ingest(out / "raw", out / "images", out / "quarantine", ingest_params(caption_templates=templates))
        atomic.write_json(out / "accepted.json", {"verdict": "accepted"})
        codec(out / "images", out / "accepted.json", out / "codec", params, FORM)
        encode(out / "images", out / "accepted.json", out / "codec", out / "latents", EncodeParams(shard_size=1000))
        return out

    return call


def test_captions_become_token_sequences_each_of_them_once(through):
    from models.networks.text_encoder import load_text_encoder

    out = through()
    inputs = latents.load_latents(out / "latents", "train")
    distinct = ["a cat", "a dog", "one cat here", "one dog here"]
    assert inputs.texts.shape == (4, 8, 32) and inputs.texts.dtype == torch.bfloat16
    assert inputs.captions.shape == (inputs.count, 2)
    assert sorted({tuple(row) for row in inputs.captions.tolist()}) == [(0, 2), (1, 3)]
    assert json.loads((out / "codec" / "codec.json").read_text())["prompts"] == ["a cat", "a dog"]
    assert inputs.prompts.shape == (3, 8, 32)
    assert torch.equal(inputs.prompts[:2], inputs.texts[:2])
    encoder = load_text_encoder(out / "codec")
    assert torch.equal(encoder.encode(distinct).to(torch.bfloat16), inputs.texts)
    assert torch.equal(encoder.encode([""])[0].to(torch.bfloat16), inputs.prompts[2])


def test_the_encoder_is_what_stable_diffusion_pipelines_load(through):
    from transformers import CLIPTextModel, CLIPTokenizer

    from models.networks.text_encoder import load_text_encoder

    out = through()
    tokenizer = CLIPTokenizer.from_pretrained(out / "codec" / "tokenizer")
    model = CLIPTextModel.from_pretrained(out / "codec" / "text_encoder").eval()
    ids = tokenizer(
        ["a cat"], padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        hidden = model(ids)[0]
    ours = load_text_encoder(out / "codec").encode(["a cat"])
    assert torch.allclose(ours, hidden, atol=1e-5)
    for file in (out / "codec").rglob("*.json"):
        assert str(out) not in file.read_text()


def test_any_text_can_be_tokenised(through):
    from models.networks.text_encoder import load_text_encoder

    tokenizer = load_text_encoder(through() / "codec").tokenizer
    for text in ("Zebra!", "naïve ☃ 雪", "q"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.eos_token_id not in ids[:-1], text
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_an_embedding_does_not_depend_on_its_company(through):
    from models.networks.text_encoder import load_text_encoder

    encoder = load_text_encoder(through() / "codec")
    many = [f"one cat here and {n} more" for n in range(70)]
    embedded = encoder.encode(many)
    assert torch.equal(embedded[69], encoder.encode(many[69:])[0])
    lower = encoder.encode(many, "bf16")
    assert lower.dtype == torch.float32
    assert 1e-5 < (lower - embedded).square().mean().sqrt() / embedded.square().mean().sqrt() < 0.02
    assert encoder.on("meta").model.device.type == "meta" and encoder.model.device.type == "cpu"


def test_captions_are_divided_among_gpus_and_embedded_in_the_precision_of_encode(through, monkeypatch):
    from models import parallel
    from models.networks.text_encoder import TextEncoder
    from tasks.encoding import texts
    from tasks.encoding.rows import distinct_captions, read_rows
    from tasks.formats.codec_info import CodecInfo

    out = through()
    rows = read_rows(out / "images", [(8, 8)])
    captions = distinct_captions(rows)
    calls = []
    encode_texts = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "on", lambda encoder, name: calls.append(name) or encoder)
    monkeypatch.setattr(
        TextEncoder, "encode", lambda *a, precision: calls.append(precision) or encode_texts(*a, precision)
    )
    monkeypatch.setattr(parallel, "devices_of", lambda device: ("cpu:0", "cpu:1"))
    monkeypatch.setattr(texts, "PART", 2)

    def written(precision: str, folder: str) -> torch.Tensor:
        (out / folder).mkdir()
        calls.clear()
        embeddings = texts.Captions(out / "codec", CodecInfo.load(out / "codec"), captions, rows, precision=precision)
        embeddings.write(out / folder, 1000)
        return embeddings.blocks.take([texts._text_hash(text) for text in captions.strings("caption")])["embeddings"]

    known = written("no", "again")
    assert not calls, "nothing is new"
    lower = written("bf16", "lower")
    assert set(calls) == {"cpu:0", "cpu:1", "bf16"} and calls.count("bf16") == 3
    assert not torch.equal(known, lower) and torch.allclose(known.float(), lower.float(), atol=0.1)


def test_the_same_again_gives_the_same_bytes(through):
    first, second = through(), through(where="second")
    assert contents(first / "codec") == contents(second / "codec")
    assert contents(first / "latents") == contents(second / "latents")


def test_captions_need_no_classes(through):
    """Free captions of one's own: none of them stands for a class, and the number of them differs."""
    files = {f"{seed:02d}.png": picture(seed) for seed in range(40)}
    lines = [f'{seed:02d}.png,"picture {n} of {seed}"' for seed in range(40) for n in range(1 + seed % 3)]
    out = through(files | {"captions.csv": "\n".join(["image,caption", *lines]).encode()})
    inputs = latents.load_latents(out / "latents", "train")
    assert inputs.classes == 0
    prompts = latents.read_index(out / "latents").prompts
    assert 0 < len(prompts) <= 10 and len(inputs.prompts) == len(prompts) + 1
    assert sorted(set((inputs.captions >= 0).sum(1).tolist())) == [1, 2, 3]
    assert inputs.texts.shape[0] == len(lines)


def test_training_learns_to_distinguish_captions(through):
    """Cats are dark and dogs are light, so captions match visible properties."""
    from models.networks.text_encoder import load_text_encoder

    files = {}
    for seed in range(80):
        shade = np.random.default_rng(seed).integers(0, 60, (12, 12, 3), np.uint8)
        files[f"{'cat' if seed % 2 else 'dog'}/{seed:02d}.png"] = png(shade + (0 if seed % 2 else 180))
    longer = TEXT.model_copy(update={"text": TEXT.text.model_copy(update={"steps": 60})})
    out = through(files, params=longer)
    quality = json.loads((out / "codec" / "quality.json").read_text())
    assert quality["text_retrieval_accuracy"] > 0.9 > quality["text_retrieval_chance"]
    encoder = load_text_encoder(out / "codec")
    with torch.inference_mode():
        hidden = encoder.model(encoder.token_ids(["a cat", "one cat here", "a dog"])).pooler_output
    cat, other_cat, dog = hidden
    assert torch.dist(cat, other_cat) < torch.dist(cat, dog)


def png(pixels) -> bytes:
    import io

    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
