"""What a user's data can have wrong with it."""


class DataError(ValueError):
    """Data that cannot be used; says what is wrong, where, and what to do."""
