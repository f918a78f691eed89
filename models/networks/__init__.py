"""The networks that a model consists of, and their configuration in diffusers' format."""
