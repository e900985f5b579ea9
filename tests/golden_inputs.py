"""What the adapters of the golden vectors share: reading a case's inputs."""


def only(inputs, key, *known):
    """Fails for a value of `key` that the project has no counterpart of, in place of ignoring it.

    A case without the key means the first of `known`.
    """
    value = inputs.get(key, known[0])
    assert value in known, f"{key} = {value!r}: implemented for {', '.join(map(repr, known))}"


def floor_of(inputs, default):
    """The channels that every layer keeps, under any of the names that the vectors have for it."""
    names = ("min_channels", "min_channels_per_layer", "min_keep", "minimum")
    return next((inputs[name] for name in names if name in inputs), default)
