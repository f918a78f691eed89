"""The mathematics: networks, diffusion, samplers, metrics. Imports neither MLflow nor DVC nor Prefect."""
