"""Questions with known answers, out of tokenised chats or pairs: what a model is asked, and what is expected."""

from typing import NamedTuple

import numpy as np

from specjax.data.loader import Data


class Question(NamedTuple):
    """The last thing asked in a document.

    Attributes:
      prompt: ids of all that stands before the answer, as the model is given them when it is asked.
      answer: ids of the known answer, the token that ends it among them where that is trained.
    """

    prompt: list[int]
    answer: list[int]


def questions(data: Data, most: int) -> list[Question]:
    """The last question of each of the first `most` documents, in the data's order.

    A document whose every token trains, as raw text's do, asks nothing and is passed over.
    """
    found: list[Question] = []
    if data.together > 1:  # pairs of answers, of which one is rejected
        return found
    for start, stop in zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True):
        if len(found) == most:
            break
        # The mask is aligned with targets: token t + 1 trains where it is set at t.
        asked = np.flatnonzero(~np.append(False, data.loss_mask[start : stop - 1]))
        trained = np.flatnonzero(data.loss_mask[start : stop - 1]) + 1
        if len(asked) < 2 or not len(trained):  # a text's first token is no target either
            continue
        last = int(trained[-1]) + 1
        first = int(asked[asked < last][-1]) + 1
        ids = data.tokens[start:stop].tolist()
        found.append(Question(ids[:first], ids[first:last]))
    return found
