"""What the command line turns into one line on stderr."""


class TrainError(Exception):
    """Something the user gave cannot be used; the message says what it was and what is expected."""


class Interrupted(Exception):
    """Ctrl-C; the message says where the run was kept."""
