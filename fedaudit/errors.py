"""The errors fedaudit raises at its boundaries: configuration, files, messages, budgets."""


class FedauditError(Exception):
    """Base of every error a user can cause or meet; its text is one sentence that says what to do."""


class ConfigError(FedauditError):
    """A configuration key, value or file is not usable."""


class DataError(FedauditError):
    """A dataset is missing, malformed or cannot be partitioned as asked."""


class RecordError(FedauditError):
    """A run folder or an audit record cannot be read or written."""


class BadUpdateError(FedauditError):
    """A client's reply breaks one of the rules an update must keep."""


class BudgetExhaustedError(FedauditError):
    """A client would exceed its privacy budget by training once more."""


class RunFailedError(FedauditError):
    """A federation stopped before its last round."""
