"""Triton's interpreter, made quick enough for tests."""

import triton.runtime.interpreter as interpreter


def patch_language_once() -> None:
    """The interpreter patches triton.language at every call of a jitted function, which is most of its time: once will
    do."""
    patch, patched = interpreter._patch_lang, {}

    class Kept:
        def restore(self):
            pass

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched[id(fn.__globals__)] = (fn, patch(fn))
        return Kept()

    interpreter._patch_lang = patch_once
