# %% [markdown]
"""A tour from data to digits, on the files that `make repro` has written.

This page is a notebook: `docs/tour.py` holds its cells, and `make docs` executes them. Pictures show pixels enlarged,
without interpolation.
"""

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from models import masks
from models.editing import edit
from models.images.pictures import grid
from models.images.pixels import to_uint8
from models.judges.judge import load_judge
from models.judges.metrics import frechet_distance, nearest
from models.noise import samplers
from models.noise.samplers import Sampling, SeededNoise
from models.noise.schedules import path_of
from models.pipeline import load_pipeline
from tasks.params import ImageParams
from tasks.pictures.images import load_pixels

torch.set_num_threads(1)  # more threads only wait for each other at so small images
model = load_pipeline(Path("outputs/pipeline"))
side, channels, classes = model.info.size, model.info.channels, model.info.classes
parameters = sum(parameter.numel() for parameter in model.network.parameters())
print(f"{parameters:,} parameters, {model.info.schedule}, {model.info.prediction}")
print(f"{len(classes)} classes:", *classes)

# %% [markdown]
# ## The data
#
# `ingest` has split the images by a hash of their names: `train` is learned, `test` is held out and only measured
# with. Each column is a class.

# %% alt="Five held-out images of each class"
held_out = load_pixels(Path("data/images"), "test", ImageParams(resolution=side, channels=channels))
train = load_pixels(Path("data/images"), "train", ImageParams(resolution=side, channels=channels))
print(f"{len(train.pixels)} training images, {len(held_out.pixels)} held out, {side} x {side} pixels")

by_class = [held_out.pixels[held_out.labels == label][:5] for label in range(len(classes))]
grid(np.stack(by_class, axis=1).reshape(-1, channels, side, side), len(classes), 4, column_titles=classes)

# %% [markdown]
# ## The forward process
#
# $x_t = \alpha_t x_0 + \sigma_t \varepsilon$: one image at nine noise levels, with the same noise $\varepsilon$
# ([theory](theory/forward.md)).

# %% alt="One digit with increasing noise"
x0 = model.encode(held_out.pixels[:1])
eps = SeededNoise([0], model.info.input_shape)()
levels = [model.path.level(t) for t in np.linspace(1, model.info.timesteps - 1, 9).round().tolist()]
noisy = np.concatenate([level.alpha * x0.numpy() + level.sigma * eps for level in levels])
grid(to_uint8(noisy), len(levels), 4, column_titles=[f"t {level.t:.0f}" for level in levels])

# %% [markdown]
# The log of the signal-to-noise ratio says how hard the task is at each timestep: at 0 there is as much noise as
# signal.

# %% alt="Log SNR by timestep for the model's path and two noise schedules"
figure, axis = plt.subplots(figsize=(7, 3))
times = np.arange(1, 999)
for name in (model.info.schedule, "cosine", "linear"):
    path = path_of(name, 1000)
    axis.plot(times, [path.level(t).log_snr for t in times], label=name)
axis.set(xlabel="timestep t", ylabel="log SNR, nats", ylim=(-12, 12))
axis.legend(frameon=False)
axis.grid(alpha=0.3)

# %% [markdown]
# ## What the network predicts
#
# One evaluation of the network at each of these noisy images, converted to the clean image that it predicts. With
# little noise it is nearly exact; in pure noise it is the mean of the class.

# %% alt="Noisy images above and predicted clean images below"
denoise = model.denoiser(labels=[int(held_out.labels[0])])
with torch.inference_mode():
    predicted = np.concatenate([denoise(torch.from_numpy(noisy[i : i + 1]), level) for i, level in enumerate(levels)])
grid(to_uint8(np.concatenate([noisy, predicted])), len(levels), 4, ["noisy", "predicted"])

# %% [markdown]
# The error of that prediction over all held-out images, by noise level, as `evaluate` has measured it:

# %% alt="Mean squared error of the predicted clean image by timestep"
errors = pd.read_csv("reports/evaluation/timesteps.csv")
figure, axis = plt.subplots(figsize=(7, 3))
axis.plot(errors["timestep"], errors["squared_error"], marker="o")
axis.set(xlabel="timestep t", ylabel="mean squared error of x0", ylim=0)
axis.grid(alpha=0.3)

# %% [markdown]
# ## Training
#
# The loss of the network's output, which is the velocity $\varepsilon - x_0$ here. Most of it cannot be removed:
# several images are possible behind the same noise ([objectives](theory/objectives.md)).

# %% alt="Training loss and held-out loss by step"
history = pd.read_csv("reports/train/history.csv")
measured = history.dropna(subset=["held_out_loss"])
figure, axis = plt.subplots(figsize=(7, 3))
axis.semilogy(history["step"], history["loss"], label="training")
axis.semilogy(measured["step"], measured["held_out_loss"], marker="o", label="held out")
axis.set(xlabel="step", ylabel="loss")
axis.legend(frameon=False)
axis.grid(alpha=0.3, which="both")

# %% [markdown]
# ## Sampling
#
# Noise becomes digits. `callback` receives every step: above $x_t$, below the predicted $x_0$ ([reverse
# process](theory/reverse.md)).

# %% alt="The steps of sampling one digit, noisy above and predicted below"
steps = []
model.sample([4], [4], Sampling("euler", 10), callback=lambda i, t, x, x0: steps.append((t, x.numpy(), x0.numpy())))
times, states, predictions = zip(*steps, strict=True)
both = to_uint8(np.concatenate([*states, *predictions]))
grid(both, len(steps), 4, ["x after the step", "predicted"], [f"t {t:.0f}" for t in times])

# %% [markdown]
# Fewer steps are cheaper and blur the result, since each step follows a straight line. The noise is the same in each
# row.

# %% alt="The same ten digits drawn in 1, 2, 5, 10 and 20 steps"
counts = [1, 2, 5, 10, 20]
seeds, labels = list(range(100, 110)), list(range(10))
rows = [model.sample(seeds, labels, Sampling("euler", count)) for count in counts]
grid(to_uint8(np.concatenate(rows)), 10, 4, [f"{count} steps" for count in counts], classes)

# %% [markdown]
# ## Guidance
#
# The difference that the condition makes, multiplied by $w$. Digits become clearer and more alike
# ([guidance](theory/guidance.md)).

# %% alt="The same ten digits at guidance scales 1, 1.5, 3 and 5"
scales = [1.0, 1.5, 3.0, 5.0]
rows = [model.sample(seeds, labels, Sampling("euler", 10, guidance_scale=scale)) for scale in scales]
grid(to_uint8(np.concatenate(rows)), 10, 4, [f"w = {scale:g}" for scale in scales], classes)

# %% [markdown]
# ## Between two noises
#
# Sampling without added noise is a smooth function of the first noise. On the great circle between two of them, every
# point looks like noise, and every image like a digit.

# %% alt="Digits on the way between two noises, for three classes"
first, second = SeededNoise([1, 2], model.info.input_shape)()
angles = np.linspace(0, np.pi / 2, 9)
between = np.stack([np.cos(a) * first + np.sin(a) * second for a in angles]).astype(np.float32)

rows = []
for label in (0, 3, 8):
    start = torch.from_numpy(between)
    with torch.inference_mode():
        denoise = model.denoiser(labels=[label] * len(angles))
        rows.append(samplers.sample(denoise, lambda start=start: start, model.scheduler, Sampling("euler", 20)).numpy())
grid(to_uint8(np.concatenate(rows)), len(angles), 4, ["zero", "three", "eight"])

# %% [markdown]
# ## Editing
#
# Sampling can begin at an image with noise in place of pure noise. At strength 0.9 little of the image remains, and
# the digit becomes the one asked for. With a mask, only the masked part is drawn.

# %% alt="Held-out digits changed to the next digit at three strengths, and with their right half repainted"
chosen = [int((held_out.labels == label).argmax()) for label in range(10)]
given = held_out.pixels[chosen]
following = [(label + 1) % 10 for label in range(10)]
sampling = Sampling("dpm_solver_pp_2m", 10)
rows = [
    to_uint8(edit(model, seeds, given, strength, labels=following, sampling=sampling)) for strength in (0.3, 0.6, 0.9)
]
filled = edit(model, seeds, given, 1.0, masks.half(side, side), labels=labels, sampling=sampling, resampling=2)
titles = ["given", "next, 0.3", "next, 0.6", "next, 0.9", "right half"]
grid(np.concatenate([given, *rows, to_uint8(filled)]), 10, 4, titles)

# %% [markdown]
# ## Measuring
#
# Distances need many images. This is the distance of training images to the held-out ones, by their number
# ([traps](theory/evaluation.md)), in the features of the classifier that `judge` trained.

# %% alt="Frechet distance of training images to held-out images by their number"
judge = load_judge(Path("outputs/judge"))
reference, features = judge.features(held_out.pixels), judge.features(train.pixels)
order = np.random.default_rng(0).permutation(len(features))
numbers = [64, 128, 256, 512, 1024]
figure, axis = plt.subplots(figsize=(7, 3))
axis.plot(numbers, [frechet_distance(features[order[:n]], reference) for n in numbers], marker="o")
axis.set(xlabel="number of images", ylabel="Frechet distance", xscale="log", ylim=0, xticks=numbers)
axis.set_xticklabels(numbers)
axis.minorticks_off()
axis.grid(alpha=0.3)

# %% [markdown]
# The measures of this model, as `evaluate` has written them:

# %%
samples = pd.read_csv("reports/evaluation/samplers.csv")
print(samples[["sampler", "steps", "guidance_scale", "n", "frechet_distance", "label_accuracy"]].to_string(index=False))

# %% [markdown]
# ## Near copies
#
# Samples, and below each the training image that is nearest in features. A model that only remembers would show the
# same twice.

# %% alt="Samples above and their nearest training images below"
drawn = to_uint8(model.sample(seeds, labels, Sampling("euler", 10)))
index, distance = nearest(judge.features(drawn), features)
grid(np.concatenate([drawn, train.pixels[index]]), 10, 4, ["sample", "nearest"], [f"{d:.1f}" for d in distance])
