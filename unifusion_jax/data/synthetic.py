"""Two small endless sources beside the shapes world: doodles for autoencoders and the names of emoji for tokenizers."""

import operator
import unicodedata
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter

from unifusion_jax.data.records import RECONSTRUCTION_PROMPT, Record

# Blocks of the Unicode standard that hold emoji and the symbols around them.
_EMOJI_BLOCKS = (
    (0x203C, 0x2139),
    (0x2190, 0x23FF),
    (0x2600, 0x27BF),
    (0x2B00, 0x2BFF),
    (0x3000, 0x303F),
    (0x1F000, 0x1FAFF),
)
# Words of emoji sequences, which have no code point and so no name of their own.
_PEOPLE = """
    astronaut cook detective farmer firefighter guard health worker judge mechanic office worker pilot police
    officer prince princess scientist singer student superhero teacher technologist artist construction worker elf
    fairy genie mage mermaid vampire zombie biking bouncing ball bowing cartwheeling facepalming frowning gesturing
    no gesturing ok getting haircut getting massage golfing in lotus position in steamy room in tuxedo juggling
    kneeling lifting weights mountain biking playing handball playing water polo pouting raising hand rowing boat
    running shaking hands shrugging standing surfing swimming tipping hand walking wearing turban with veil with
    white cane climbing holding hands kissing wrestling pushing beard curly hair red hair white hair bald blond
    hair feeding baby in motorized wheelchair
""".split()
_FLAGS = [
    name.strip()
    for name in """
    afghanistan, albania, algeria, american samoa, andorra, angola, anguilla, antarctica, antigua and barbuda,
    argentina, armenia, aruba, ascension island, australia, austria, azerbaijan, bahamas, bahrain, bangladesh,
    barbados, belarus, belgium, belize, benin, bermuda, bhutan, bolivia, bosnia and herzegovina, botswana,
    bouvet island, brazil, british indian ocean territory, british virgin islands, brunei, bulgaria, burkina faso,
    burundi, cambodia, cameroon, canada, canary islands, cape verde, cayman islands, central african republic,
    chad, chile, china, christmas island, cocos islands, colombia, comoros, congo, cook islands, costa rica,
    croatia, cuba, curacao, cyprus, czechia, denmark, djibouti, dominica, dominican republic, ecuador, egypt,
    el salvador, england, equatorial guinea, eritrea, estonia, eswatini, ethiopia, european union,
    falkland islands, faroe islands, fiji, finland, france, french guiana, french polynesia, gabon, gambia,
    georgia, germany, ghana, gibraltar, greece, greenland, grenada, guadeloupe, guam, guatemala, guernsey, guinea,
    guyana, haiti, honduras, hong kong, hungary, iceland, india, indonesia, iran, iraq, ireland, isle of man,
    israel, italy, jamaica, japan, jersey, jordan, kazakhstan, kenya, kiribati, kosovo, kuwait, kyrgyzstan, laos,
    latvia, lebanon, lesotho, liberia, libya, liechtenstein, lithuania, luxembourg, macao, madagascar, malawi,
    malaysia, maldives, mali, malta, marshall islands, martinique, mauritania, mauritius, mayotte, mexico,
    micronesia, moldova, monaco, mongolia, montenegro, montserrat, morocco, mozambique, myanmar, namibia, nauru,
    nepal, netherlands, new caledonia, new zealand, nicaragua, niger, nigeria, niue, norfolk island, north korea,
    north macedonia, norway, oman, pakistan, palau, palestinian territories, panama, papua new guinea, paraguay,
    peru, philippines, pitcairn islands, poland, portugal, puerto rico, qatar, romania, russia, rwanda,
    saint lucia, samoa, san marino, saudi arabia, scotland, senegal, serbia, seychelles, sierra leone, singapore,
    slovakia, slovenia, solomon islands, somalia, south africa, south korea, south sudan, spain, sri lanka,
    st helena, sudan, suriname, sweden, switzerland, syria, taiwan, tajikistan, tanzania, thailand, timor leste,
    togo, tokelau, tonga, trinidad and tobago, tunisia, turkey, turkmenistan, tuvalu, uganda, ukraine,
    united arab emirates, united kingdom, united nations, united states, uruguay, uzbekistan, vanuatu,
    vatican city, venezuela, vietnam, wales, western sahara, yemen, zambia, zimbabwe
""".split(",")
]
_SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


class _Endless(Sequence):
    """A source whose item k is a function of (seed, k)."""

    def __init__(self, *, seed: int = 0, length: int = 1_000_000):
        if length < 1 or seed < 0:
            raise ValueError(f"length must be at least 1 and seed at least 0, got {length} and {seed}")
        self.seed, self._length = seed, length

    def __len__(self) -> int:
        return self._length

    def _rng(self, index: int) -> np.random.Generator:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside a source of {self._length} examples")
        return np.random.default_rng([self.seed, index])


class DoodleSource(_Endless):
    """Random overlapping shapes, strokes and gradients in random colours: pictures that look like no particular world.

    An autoencoder trained on these beside the shapes also reproduces drawings it has never seen, such as emoji.
    """

    def __init__(self, *, size_px: int = 96, seed: int = 0, length: int = 1_000_000):
        super().__init__(seed=seed, length=length)
        self.size_px = size_px

    def __getitem__(self, index: int) -> Record:
        """The reconstruction record at an index."""
        image = self._draw(self._rng(index))
        return Record(
            id=f"doodles/{self.seed}/{index}",
            task="reconstruction",
            prompt=RECONSTRUCTION_PROMPT,
            target="",
            image=image,
            images=(image,),
        )

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        size = 2 * self.size_px  # drawn at twice the size and reduced, for smooth edges
        canvas = PIL.Image.new("RGB", (size, size), _colour(rng) if rng.random() < 0.5 else (255, 255, 255))
        if rng.random() < 0.3:
            canvas = PIL.Image.composite(
                PIL.Image.new("RGB", (size, size), _colour(rng)),
                canvas,
                PIL.Image.linear_gradient("L").resize((size, size)),
            )
        draw = PIL.ImageDraw.Draw(canvas)
        for _ in range(rng.integers(3, 13)):
            x, y = rng.uniform(0, size, 2)
            width, height = size * rng.uniform(0.04, 0.5, 2)
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            fill = _colour(rng)
            line = int(rng.integers(2, 9))
            # An outline thicker than the shape's half is more than Pillow can draw.
            outline = _colour(rng) if rng.random() < 0.5 and min(width, height) > 4 * line else None
            kind = rng.integers(5)
            if kind == 0:
                draw.ellipse(box, fill=fill, outline=outline, width=line)
            elif kind == 1:
                draw.rounded_rectangle(
                    box, radius=float(rng.uniform(0, 0.25)) * min(width, height), fill=fill, outline=outline, width=line
                )
            elif kind == 2:
                corners = rng.uniform(-0.5, 0.5, (int(rng.integers(3, 6)), 2)) * (width, height) + (x, y)
                draw.polygon([tuple(corner) for corner in corners], fill=fill, outline=outline, width=line)
            elif kind == 3:
                draw.line(
                    [tuple(point) for point in rng.uniform(0, size, (3, 2))], fill=fill, width=line, joint="curve"
                )
            else:
                start = float(rng.uniform(0, 360))
                draw.pieslice(box, start, start + float(rng.uniform(60, 300)), fill=fill, outline=outline, width=line)
        return np.asarray(canvas.resize((self.size_px, self.size_px), PIL.Image.Resampling.BOX))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def emoji_names() -> list[str]:
    """Names of emoji and their neighbours in the Unicode standard, in lower case, as this Python's database has them."""
    names = []
    for first, last in _EMOJI_BLOCKS:
        for point in range(first, last + 1):
            if name := unicodedata.name(chr(point), "").lower():
                names.append(name)
    return names


class EmojiNameSource(_Endless):
    """Captions such as "an emoji of grinning face": words for a tokenizer and a small language model to know.

    A caption is its own target description. There is no picture to draw: the image is one white pixel square.
    """

    def __init__(self, *, seed: int = 0, length: int = 1_000_000):
        super().__init__(seed=seed, length=length)
        self._names = emoji_names()

    def __getitem__(self, index: int) -> Record:
        """The text_to_image record at an index."""
        rng = self._rng(index)
        roll = rng.random()
        if roll < 0.6:
            name = str(rng.choice(self._names))
        elif roll < 0.75:
            name = f"flag for {rng.choice(_FLAGS)}"
        else:
            who = rng.choice(["man", "woman", "person", "people", "men", "women"])
            name = f"{who} {' '.join(rng.choice(_PEOPLE, int(rng.integers(1, 4))))}"
        if rng.random() < 0.25:
            name += f", with a {rng.choice(_SKIN_TONES)} skin tone"
        caption = f"an emoji of {name}"
        return Record(
            id=f"emoji_names/{self.seed}/{index}",
            task="text_to_image",
            prompt=caption,
            target=caption,
            image=np.full((8, 8, 3), 255, np.uint8),
        )
