"""What can go wrong on a cluster. Each message says what to do."""


class ClusterError(ValueError):
    """A mistake of the user, or a resource that the cluster does not have."""


class SpaceError(ValueError):
    """A space of settings that cannot be searched."""


class GuideLostError(RuntimeError):
    """The guide's actor has lost its state, or serves a newer run of the workers.

    Training goes back to the last checkpoint.
    """


class GuideTimeoutError(RuntimeError):
    """The guide's actor did not answer in time."""


class ClusterLostError(RuntimeError):
    """The cluster has died under its driver."""


def first_line(error: object) -> str:
    """What an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
