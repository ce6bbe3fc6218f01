"""The things that a picture may show: name, kind, and the Unicode character that vendors draw.

Chosen by hand out of Unicode's list. Each is one concrete thing that two artists draw so that it can be told
from the others; no faces of people, flags, signs, clock faces or skin tones. Where the list has a thing
twice ("dog face" and "dog"), or a name contains another's thing ("car" and "police car"), one is left out.
Names are plain English, kinds exclude one another.

One name in ten of each kind is held out: no training scene shows it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

_TEST_EVERY = 10

_NAMES = {
    "animal": """
        1F436 dog, 1F431 cat, 1F43A wolf, 1F98A fox, 1F99D raccoon, 1F981 lion, 1F42F tiger, 1F406 leopard,
        1F434 horse, 1FACE moose, 1FACF donkey, 1F984 unicorn, 1F993 zebra, 1F98C deer, 1F9AC bison,
        1F42E cow, 1F437 pig, 1F417 boar, 1F40F ram, 1F411 sheep, 1F410 goat, 1F42A camel, 1F999 llama,
        1F992 giraffe, 1F418 elephant, 1F9A3 mammoth, 1F98F rhinoceros, 1F99B hippopotamus, 1F42D mouse,
        1F400 rat, 1F439 hamster, 1F430 rabbit, 1F43F-FE0F chipmunk, 1F9AB beaver, 1F994 hedgehog, 1F987 bat,
        1F43B bear, 1F428 koala, 1F43C panda, 1F9A5 sloth, 1F9A6 otter, 1F9A8 skunk, 1F998 kangaroo,
        1F9A1 badger, 1F435 monkey, 1F98D gorilla, 1F9A7 orangutan, 1F983 turkey, 1F414 chicken,
        1F413 rooster, 1F424 chick, 1F427 penguin, 1F54A-FE0F dove, 1F985 eagle, 1F986 duck, 1F9A2 swan,
        1F989 owl, 1F9A4 dodo, 1F9A9 flamingo, 1F99A peacock, 1F99C parrot, 1FABF goose, 1F438 frog,
        1F40A crocodile, 1F422 turtle, 1F98E lizard, 1F40D snake, 1F409 dragon, 1F995 dinosaur, 1F433 whale,
        1F42C dolphin, 1F9AD seal, 1F420 tropical fish, 1F421 pufferfish, 1F988 shark, 1F419 octopus,
        1FABC jellyfish, 1F980 crab, 1F99E lobster, 1F990 shrimp, 1F991 squid, 1F9AA oyster, 1F40C snail,
        1F98B butterfly, 1F41B caterpillar, 1F41C ant, 1F41D bee, 1FAB2 beetle, 1F41E ladybug,
        1F997 grasshopper, 1FAB3 cockroach, 1F577-FE0F spider, 1F982 scorpion, 1F99F mosquito, 1FAB0 fly,
        1FAB1 worm""",
    "plant": """
        1F490 bouquet, 1F338 cherry blossom, 1FAB7 lotus, 1F339 rose, 1F33A hibiscus, 1F33B sunflower,
        1F337 tulip, 1FABB hyacinth, 1F331 seedling, 1FAB4 potted plant, 1F332 pine tree, 1F333 leafy tree,
        1F334 palm tree, 1FABE bare tree, 1F335 cactus, 1F33E rice plant, 1F340 clover, 1F341 maple leaf""",
    "fruit": """
        1F347 grapes, 1F348 melon, 1F349 watermelon, 1F34A orange, 1F34B lemon, 1F34B-200D-1F7E9 lime,
        1F34C banana, 1F34D pineapple, 1F96D mango, 1F34E apple, 1F350 pear, 1F351 peach, 1F352 cherries,
        1F353 strawberry, 1FAD0 blueberries, 1F95D kiwi, 1F965 coconut""",
    "vegetable": """
        1F346 eggplant, 1F954 potato, 1F955 carrot, 1F33D corn, 1F336-FE0F chili pepper, 1FAD1 bell pepper,
        1F952 cucumber, 1F96C lettuce, 1F966 broccoli, 1F9C4 garlic, 1F9C5 onion, 1FAD8 beans, 1FADA ginger,
        1FADB peas, 1FADC turnip""",
    "savory food": """
        1F35E bread, 1F956 baguette, 1F968 pretzel, 1F96F bagel, 1F9C0 cheese, 1F356 meat on a bone,
        1F357 poultry leg, 1F969 steak, 1F953 bacon, 1F354 hamburger, 1F35F french fries, 1F355 pizza,
        1F32D hot dog, 1F96A sandwich, 1F32E taco, 1F32F burrito, 1FAD4 tamale, 1F9C6 falafel, 1F95A egg,
        1F373 fried egg, 1F372 stew, 1FAD5 fondue, 1F957 salad, 1F37F popcorn, 1F371 bento box,
        1F359 rice ball, 1F35B curry, 1F35C ramen, 1F35D spaghetti, 1F363 sushi, 1F364 fried shrimp,
        1F95F dumpling, 1F961 takeout box, 1F9C8 butter, 1F9C2 salt shaker""",
    "dessert": """
        1F366 ice cream, 1F367 shaved ice, 1F369 doughnut, 1F36A cookie, 1F382 birthday cake, 1F370 shortcake,
        1F9C1 cupcake, 1F967 pie, 1F36B chocolate bar, 1F36C candy, 1F36D lollipop, 1F36E pudding,
        1F36F honey, 1F95E pancakes, 1F9C7 waffle""",
    "drink": """
        1F95B milk, 2615 coffee, 1FAD6 teapot, 1F375 tea, 1F37E champagne, 1F377 wine, 1F378 cocktail,
        1F379 tropical drink, 1F37A beer, 1F943 whiskey, 1F964 soda, 1F9C3 juice box, 1F9C9 mate,
        1F37C baby bottle""",
    "vehicle": """
        1F682 steam engine, 1F685 bullet train, 1F68B tram, 1F68C bus, 1F691 ambulance, 1F692 fire engine,
        1F695 taxi, 1F697 car, 1F6FB pickup truck, 1F69A delivery truck, 1F69C tractor,
        1F3CD-FE0F motorcycle, 1F6F5 motor scooter, 1F6F4 kick scooter, 1F6B2 bicycle, 1F6FA rickshaw,
        26F5 sailboat, 1F6F6 canoe, 1F6A4 speedboat, 1F6F3-FE0F cruise ship,
        2708-FE0F airplane, 1F681 helicopter, 1F680 rocket, 1F6F8 flying saucer, 1F6F0-FE0F satellite""",
    "building": """
        1F3E0 house, 1F3E2 office building, 1F3E5 hospital, 1F3E6 bank, 1F3E8 hotel, 1F3EB school,
        1F3ED factory, 1F3F0 castle, 26EA church, 1F54C mosque, 1F6D5 temple, 1F3DF-FE0F stadium, 1F6D6 hut,
        26FA tent, 1F3AA circus tent, 1F5FC tower""",
    "sky object": """
        2600-FE0F sun, 1F319 moon, 2B50 star, 2601-FE0F cloud, 1F32A-FE0F tornado, 1F308 rainbow,
        26A1 lightning, 2744-FE0F snowflake, 2604-FE0F comet, 1FA90 planet""",
    "landscape": """
        1F30B volcano, 1F3D4-FE0F snowy mountain, 1F3DD-FE0F island, 1F3DC-FE0F desert, 1F3D6-FE0F beach,
        1F3DE-FE0F park, 1F30A wave, 1F305 sunrise, 1F3D9-FE0F city""",
    "sports item": """
        26BD soccer ball, 26BE baseball, 1F3C0 basketball, 1F3D0 volleyball, 1F3C8 football, 1F3C9 rugby ball,
        1F94F frisbee, 1F3B3 bowling pins, 1F3CF cricket bat, 1F3D1 field hockey stick,
        1F3D2 ice hockey stick, 1F94D lacrosse stick, 1F3D3 table tennis bat, 1F3F8 badminton racket,
        1F94A boxing glove, 1F94B martial arts uniform, 1F945 goal net, 26F3 golf flag, 26F8-FE0F ice skate,
        1F3A3 fishing rod, 1F93F diving mask, 1F3BD running shirt, 1F3BF skis, 1F6F7 sled,
        1F94C curling stone, 1F6F9 skateboard, 1F6FC roller skate, 1F3AF dartboard, 1F3B1 billiard ball""",
    "musical instrument": """
        1F3B7 saxophone, 1FA97 accordion, 1F3B8 guitar, 1F3B9 piano, 1F3BA trumpet, 1F3BB violin, 1FA95 banjo,
        1F941 drum, 1FA87 maracas, 1FA88 flute, 1FA89 harp""",
    "tool": """
        1F528 hammer, 1FA93 axe, 26CF-FE0F pickaxe, 1FA9A saw, 1F527 wrench, 1FA9B screwdriver,
        1F529 nut and bolt, 2699-FE0F gear, 1F5DC-FE0F clamp, 2696-FE0F scales, 1FA9D hook, 1F9F0 toolbox,
        1F9F2 magnet, 1FA9C ladder, 1FA8F shovel, 1F526 flashlight, 1F50D magnifying glass""",
    "household item": """
        1F6AA door, 1FA9E mirror, 1FA9F window, 1F6CF-FE0F bed, 1F6CB-FE0F couch, 1FA91 chair, 1F6BD toilet,
        1FAA0 plunger, 1F6BF shower, 1F6C1 bathtub, 1FA92 razor, 1F9F4 lotion bottle, 1F9F7 safety pin,
        1F9F9 broom, 1F9FA basket, 1F9FB toilet paper, 1FAA3 bucket, 1F9FC soap, 1FAA5 toothbrush,
        1F9FD sponge, 1F9EF fire extinguisher, 1F6D2 shopping cart, 1F56F-FE0F candle, 1F4A1 light bulb,
        1F511 key, 1F512 padlock, 1F9F6 yarn, 1F52A kitchen knife, 1F944 spoon""",
    "thing to wear": """
        1F453 glasses, 1F576-FE0F sunglasses, 1F97D goggles, 1F9BA safety vest, 1F454 necktie, 1F455 t-shirt,
        1F456 jeans, 1F9E3 scarf, 1F9E4 gloves, 1F9E5 coat, 1F9E6 socks, 1F457 dress, 1F458 kimono,
        1F97B sari, 1FA71 swimsuit, 1FA72 briefs, 1FA73 shorts, 1F459 bikini, 1F392 backpack,
        1FA74 flip flop, 1F45E brown shoe, 1F45F sneaker, 1F97E hiking boot, 1F460 high heel,
        1FA70 ballet shoes, 1F451 crown, 1F452 sun hat, 1F3A9 top hat, 1F393 graduation cap,
        1F9E2 baseball cap, 1FA96 helmet, 1F48D ring""",
    "electronic device": """
        1F4BB laptop, 1F5A5-FE0F desktop computer, 1F5A8-FE0F printer, 2328-FE0F keyboard, 1F4BE floppy disk,
        1F4BF compact disc, 1F50B battery, 1F50C plug, 1F4F1 mobile phone, 260E-FE0F telephone,
        1F4E0 fax machine, 1F4FA television, 1F4F7 camera, 1F4F9 camcorder, 1F4FC videotape,
        1F3A7 headphones, 1F3A4 microphone, 1F4FB radio, 1F3AE game controller, 1F579-FE0F joystick,
        231A watch, 23F0 alarm clock""",
    "office item": """
        1F4D6 book, 1F4F0 newspaper, 1F4DC scroll, 1F4CE paperclip, 1F4CC pushpin, 1F4CF ruler,
        2702-FE0F scissors, 1F4CB clipboard, 1F4C1 folder, 1F5D1-FE0F wastebasket, 270F-FE0F pencil,
        1F58A-FE0F pen, 1F58D-FE0F crayon, 1F58C-FE0F paintbrush, 1F4E6 package, 2709-FE0F envelope,
        1F4BC briefcase, 1F5C4-FE0F file cabinet, 1F4CA bar chart, 1F9EE abacus""",
    "party item": """
        1F388 balloon, 1F381 gift, 1F389 party popper, 1F386 fireworks, 1F9E8 firecracker,
        1F384 christmas tree, 1F383 jack-o-lantern, 1FA85 pinata, 1FAA9 disco ball, 1F380 bow""",
    "toy": """
        1F9F8 teddy bear, 1FA81 kite, 1FA80 yo-yo, 1F3B2 dice, 1F9E9 puzzle piece, 1FA86 nesting dolls,
        1FA84 magic wand""",
    "medical item": """
        1F489 syringe, 1F48A pill, 1FA79 bandage, 1FA7C crutch, 1FA7A stethoscope, 1FA7B x-ray,
        1F321-FE0F thermometer, 1F52C microscope, 1F9EA test tube, 1F9EB petri dish""",
}


@dataclass(frozen=True)
class Name:
    """One nameable thing.

    Attributes:
        text: its name, lower case: `polar bear`.
        kind: what it is one of, a key of `KINDS`: `animal`.
        code: the Unicode characters that vendors draw, in hexadecimal: `1F43B-200D-2744-FE0F`.
    """

    text: str
    kind: str
    code: str


def _read() -> tuple[Name, ...]:
    found = []
    for kind, listed in _NAMES.items():
        for entry in listed.split(","):
            code, text = entry.strip().split(" ", 1)
            found.append(Name(" ".join(text.split()), kind, code))
    return tuple(found)


NAMES: tuple[Name, ...] = _read()
KINDS: tuple[str, ...] = tuple(_NAMES)


def plural(kind: str) -> str:
    """`animal` → `animals`, `thing to wear` → `things to wear`."""
    return "things to wear" if kind == "thing to wear" else f"{kind}s"


def article(text: str) -> str:
    """The text with its article: `a dog`, `an apple`, `bread`, `jeans` (mass nouns and plurals take none)."""
    if text in _MASS or text in PLURALS:
        return text
    return f"{_AS_SPOKEN.get(text) or ('an' if text[0] in 'aeiou' else 'a')} {text}"


_AS_SPOKEN = {"unicorn": "a", "x-ray": "an"}
_MASS = {
    "ginger", "garlic", "lettuce", "broccoli", "corn", "bread", "cheese", "bacon", "popcorn", "ramen",
    "spaghetti", "sushi", "butter", "honey", "milk", "coffee", "tea", "champagne", "wine", "beer", "whiskey",
    "soda", "mate", "shaved ice", "lightning", "toilet paper", "soap", "yarn", "stew", "curry", "fondue",
    "ice cream", "candy", "pudding", "meat on a bone",
}  # fmt: skip
PLURALS = {
    "grapes", "cherries", "blueberries", "beans", "peas", "french fries", "pancakes", "bowling pins", "skis",
    "maracas", "scales", "glasses", "sunglasses", "goggles", "jeans", "gloves", "socks", "briefs", "shorts",
    "ballet shoes", "headphones", "scissors", "fireworks", "dice", "nesting dolls",
}  # fmt: skip


def verb(text: str) -> str:
    """`is`, or `are` for a plural: `jeans`."""
    return "are" if text in PLURALS else "is"


def held_out(names: Iterable[Name]) -> frozenset[str]:
    """The texts of names that no training scene shows: of each kind a tenth, at least one where it has five
    or more. The same whatever the seed, so that a tower and a data set agree."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.kind, []).append(name.text)
    out: set[str] = set()
    for texts in by_kind.values():
        number = round(len(texts) / _TEST_EVERY) or int(len(texts) >= 5)
        out |= set(sorted(texts, key=lambda text: (zlib.crc32(text.encode()), text))[:number])
    return frozenset(out)
