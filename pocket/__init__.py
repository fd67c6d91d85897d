"""The model in the box: a small Stable Diffusion that runs anywhere, and the world it was trained on."""
