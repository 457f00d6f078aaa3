"""What every measure asks of its options."""


def check_at_least(measure: object, **least: int) -> None:
    """Raise a ValueError, in the words of a spec, unless each named option is as large as it must be.

    Args:
        measure: has the options as attributes.
        **least: the smallest value of each.

    >>> from types import SimpleNamespace
    >>> check_at_least(SimpleNamespace(local_steps=0), local_steps=1)
    Traceback (most recent call last):
    ValueError: local-steps must be at least 1, got 0: raise it
    """
    for option, smallest in least.items():
        value = getattr(measure, option)
        if value < smallest:
            written = option.replace("_", "-")
            raise ValueError(f"{written} must be at least {smallest}, got {value}: raise it")
