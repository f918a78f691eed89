"""What the README shows runs: the sampler, outside this project, on the weights as they are saved."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def save_random_pipeline(folder: Path) -> None:
    """An untrained class-conditional pipeline of the default preset's form."""
    import torch

    from models import schedules
    from models.networks.unet import UNet, UNetConfig
    from models.pipeline import save_pipeline

    torch.manual_seed(0)
    unet = UNet(UNetConfig(16, 1, (8, 16), (False, True), 1, 4, 8, conditions=11))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    info = {"conditioning": "label", "prediction": "v_prediction"}
    folder.mkdir(parents=True)
    save_pipeline(folder, unet, dict(unet.state_dict()), schedules.betas("cosine", 1000), info)


def test_sampler_runs_without_this_project(tmp_path):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "UNet2DModel" in b)
    assert len(block.strip().splitlines()) <= 20
    save_random_pipeline(tmp_path / "outputs" / "pipeline")
    code = (
        f"{block}\nassert images.shape == (10, 1, 16, 16) and 0 <= images.min() and images.max() <= 1\nprint('drawn')"
    )
    # -I: neither the current folder nor the environment adds to the path, so nothing of this project is found
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "drawn", done.stderr


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^\| `([a-z0-9_]+)` \|", README, re.M))))
def test_presets_exist(name):
    assert (ROOT / "tasks" / "presets" / f"{name}.yaml").exists()
