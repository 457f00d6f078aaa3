"""The configuration of a run: one schema, the texts that its scalars hold, and the files it is read from."""

from fedaudit.config.files import load_config
from fedaudit.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]
