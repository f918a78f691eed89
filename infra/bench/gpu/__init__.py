"""`python -m infra.bench gpu`: what one GPU does in ten minutes, part by part.

Needs only torch (2.11 or later), diffusers, numpy, safetensors and pydantic, because many images for GPUs have no other
package. A part that needs more is skipped where that is missing. The data are random images of CIFAR-10's shape, so
nothing is downloaded.
"""
