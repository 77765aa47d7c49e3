"""Three-dimensional bone image synthesis: the heavy code behind the notebooks."""


class InputError(ValueError):
    """A mistake in what the user gave. Its text is one sentence: the file or key, what was found, what is accepted."""
