"""Checks of the prompts of DreamBooth against the tokenizers of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from models.networks.text_encoder import AnyEncoder
    from tasks.params import PriorParams


def check(text: AnyEncoder | None, params: PriorParams) -> None:
    """Print a warning if a tokenizer splits the rare token into several.

    Raises:
        StageError: if a prompt is longer than the text encoder reads, so that a part of it would be ignored.
    """
    assert text is not None and params.instance_prompt is not None, "checked when the parameters are loaded"
    tokenizer = text.towers[0].tokenizer
    pieces = tokenizer.tokenize(params.token)
    if len(pieces) > 1:
        shown = ", ".join(piece.removesuffix("</w>") for piece in pieces)
        print(
            f"prior: warning: prior.token '{params.token}' is {len(pieces)} tokens ({shown}), which other words share "
            "and which are trained together all the same; a word that is one rare token binds to the subject better",
            flush=True,
        )
    for prompt in (params.instance_prompt, params.class_prompt or "", *params.contexts):
        needed = len(tokenizer(prompt)["input_ids"])
        if needed > text.length:
            raise StageError(
                f"the prompt {prompt!r} of the section prior has {needed} tokens, and the text encoder reads "
                f"{text.length}; shorten it"
            )
