class DataError(ValueError):
    """Images that cannot be used. The message names the file and what is wrong with it."""
