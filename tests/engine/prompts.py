"""Prompts of an exact number of tokens, in English, each beginning differently."""

import random
from pathlib import Path

_NAMES = [
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Pavel",
]
_PLACES = [
    "Paris",
    "Lima",
    "Oslo",
    "Cairo",
    "Delhi",
    "Quito",
    "Turin",
    "Kyoto",
    "Accra",
    "Leeds",
    "Porto",
    "Basel",
    "Minsk",
    "Perth",
    "Osaka",
    "Davos",
]
_THINGS = [
    "apples",
    "lamps",
    "books",
    "chairs",
    "radios",
    "boats",
    "kettles",
    "violins",
    "carpets",
    "clocks",
    "maps",
    "hats",
    "knives",
    "bells",
]
_FORMS = (
    "{a} bought {n} {t} in {p} and gave {m} of them to {b}.",
    "On day {n}, {a} travelled from {p} to {q} with {m} {t}.",
    "{b} does not like {t}, but {a} has {n} of them at home in {p}.",
    "The train to {p} left at {m} o'clock; {a} and {b} were late by {n} minutes.",
    "In {q} a box of {t} costs {n} coins, in {p} only {m}.",
)


class Prompts:
    def __init__(self, tokenizer_file: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text).ids)

    def make(self, seed: int, tokens: int) -> tuple[int, ...]:
        """A story. Equal seeds give equal beginnings."""
        rng = random.Random(seed)
        text, ids = f"Story {seed}. ", ()
        while len(ids) < tokens:
            a, b = rng.sample(_NAMES, 2)
            p, q = rng.sample(_PLACES, 2)
            n, m = rng.randrange(2, 9000), rng.randrange(2, 900)
            text += rng.choice(_FORMS).format(a=a, b=b, p=p, q=q, n=n, m=m, t=rng.choice(_THINGS)) + " "
            ids = self.encode(text) if len(text) > 2 * tokens else ids
        return ids[:tokens]

    def batch(self, first_seed: int, lengths: list[int]) -> list[tuple[int, ...]]:
        return [self.make(first_seed + index, length) for index, length in enumerate(lengths)]
