"""Our method, at the sampler step: forecast the guided output, correct the latent at the next computed step."""
