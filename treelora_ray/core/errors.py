"""What a user of the core can get wrong, each a ValueError with a message that says what to do."""


class LayoutError(ValueError):
    """Tensors do not fit the layout, or hold NaN or infinite values."""


class SettingError(ValueError):
    """A setting has a value that makes no sense."""


class GuideError(ValueError):
    """A call does not fit the state of the guide (unknown task, insert without begin, ...)."""


class SnapshotError(ValueError):
    """A snapshot is of another layout, configuration or version, or is damaged."""
