"""What can be wrong with a backbone or its adapters, and told to the user."""


class ModelError(ValueError):
    """A backbone cannot be loaded, or does not fit its use."""
