"""The parts of the training example: data, network, targets, losses, evaluation, pictures."""


class UsageError(Exception):
    """A mistake in what the user gave; its message is the one sentence to print."""
