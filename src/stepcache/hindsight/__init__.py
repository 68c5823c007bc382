"""Our method, at the sampler's door: forecast the guided output, correct once a computed step shows how it went."""
