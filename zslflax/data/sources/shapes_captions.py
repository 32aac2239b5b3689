"""Writes the captions of the built-in source: sentences about some of the shapes on an image."""

import random
from collections.abc import Sequence

from zslflax.data.sources.shapes_drawing import CLASS_NAMES

# Phrases about one shape; {0} is its colour and {1} its shape.
COLOUR_AND_SHAPE = ("a {0} {1}", "a {0} {1}", "one {0} {1}", "the {0} {1}", "a {1} that is {0}", "a {1} in {0}")
COLOUR_ONLY = ("something {0}", "a {0} thing", "a {0} shape", "one {0} object")
SHAPE_ONLY = ("a {1}", "a {1}", "one {1}", "the {1}")
JOINS = (" and ", " next to ", " with ", " beside ", " near ", ", ", " close to ", " together with ")
SENTENCES = (
    "{}",
    "{}.",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a small picture with {}",
    "here we see {}",
    "there is {}",
    "I can see {} in this picture",
    "look at {}",
    "somebody drew {}",
    "my drawing: {}",
    "a little sketch of {}",
    "it shows {}.",
    "a sticker of {}",
    "{} (drawing)",
)


def write_caption(labels: Sequence[int], rng: random.Random) -> str:
    """A sentence about some of the shapes on an image: of each the colour, the shape, or both.

    Args:
        labels: classes of the shapes, indices of `CLASS_NAMES`.
        rng: the source of randomness.
    """
    phrases = []
    for label in rng.sample(labels, rng.randint(1, len(labels))):
        forms = rng.choices((COLOUR_AND_SHAPE, COLOUR_ONLY, SHAPE_ONLY), (0.6, 0.2, 0.2))[0]
        phrase = rng.choice(forms).format(*CLASS_NAMES[label].split())
        words = phrase.split()
        phrases.append(f"an {' '.join(words[1:])}" if words[0] == "a" and words[1][0] in "aeiou" else phrase)
    text = phrases[0]
    for phrase in phrases[1:]:
        text += rng.choice(JOINS) + phrase
    return rng.choice(SENTENCES).format(text)
