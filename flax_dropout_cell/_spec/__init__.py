"""Sites of noise: the spec, prefixes of noises, and noises that are resolved late."""
