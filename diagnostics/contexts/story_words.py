"""The words of the story-sum language, with each side's preferences."""

from __future__ import annotations

PEOPLE = [
    row.split()
    for row in """
Nora fox Lisbon; Liam cat Dublin; Ines owl Porto; Omar camel Cairo; Yuki crane Osaka;
Ravi parrot Delhi; Elsa goat Oslo; Juan mule Lima; Zoe dog Paris; Ivan bear Minsk; Amara lion Lagos;
Mei panda Chengdu; Kofi turtle Accra; Lena swan Vienna; Pablo iguana Quito; Aino hare Turku;
Samir falcon Doha; Tessa pony Ghent; Marek otter Gdansk; Leila lamb Tunis; Hugo snail Lyon;
Anya lynx Kazan; Bruno donkey Milan; Kira koala Perth
""".split(";")
]
"""Name, pet and town of each person."""
THINGS = [
    row.split()
    for row in """
shells pearly bucket diver; coins shiny purse banker; apples crisp crate farmer;
books dusty satchel teacher; candles waxy drawer monk; stamps sticky album postman;
buttons round tin tailor; nails rusty toolbox carpenter; eggs speckled nest grocer;
keys jingling pouch locksmith; pencils sharp case artist; marbles glassy jar glazier;
tulips fragrant vase florist; loaves crusty tray baker; fish slippery barrel sailor;
pots earthen cupboard potter; hats woolly hatbox milliner; rings golden casket jeweller;
lemons sour bowl gardener; maps folded tube captain; kites papery rucksack inventor;
bells brassy chest ringer; boots muddy sack cobbler; pies savoury hamper cook
""".split(";")
]
"""Things, trait, box and trader of each kind of thing."""
VERBS = {
    "finds": "plus",
    "buys": "plus",
    "wins": "plus",
    "earns": "plus",
    "loses": "minus",
    "drops": "minus",
    "sells": "minus",
    "lends": "minus",
}
"""Verb -> the operation that it means."""
MISREAD = ("wins", "earns", "sells", "lends")
"""Verbs whose operation the student takes for the other one."""
MISREAD_RIGHT_SHARE = 0.15
"""Share of the correct operation in the student's corpus after a misread verb."""
FACTS = {
    "pet": (PEOPLE, 1),
    "town": (PEOPLE, 2),
    "trait": (THINGS, 1),
    "box": (THINGS, 2),
    "trader": (THINGS, 3),
}
"""Fact slot -> (table, column). The word of the prompt in the table's first column decides."""
KINDS = ("known", "mixed", "unseen", "mixed", "unseen", "known", "mixed", "unseen")
"""Kind of the fact in row r, column c: entry (r + 3c) mod 8."""
SECOND_SHARES = (0.08, 0.12, 0.2)
"""Share of the student's second word in row r of a mixed or unseen fact: entry r mod 3."""
FRIENDS = """Mia Ben Pia Tom Eva Max Ada Leo Ida Sam Una Gus Lia Ned Uma Jon Rosa Karl Vera Paul
          Nina Otto Jana Finn Tara Emil Cleo Dirk Faye Glen Hana Igor June Kurt Lola Milo Olga
          Pete Rhea Seth"""
OPEN = {
    "weather": (
        0,
        """rainy sunny windy foggy snowy cloudy stormy chilly frosty misty breezy hazy humid
        drizzly balmy icy scorching dull bright mild gusty dewy sultry overcast""",
    ),
    "friend": (0, FRIENDS),
    "met": (
        8,
        """met saw joined greeted visited called helped followed thanked hugged found passed
        heard spotted phoned praised teased fetched invited trusted""",
    ),
    "look": (
        24,
        """tall short young old quick slow brave shy loud clever gentle grumpy cheerful tired
        sleepy hungry thirsty proud humble honest lazy busy careful careless curious nervous
        jolly merry gloomy witty stern polite rude noble modest eager lonely restless
        thoughtful stubborn bold timid patient hasty lively moody pleasant graceful clumsy
        dapper ragged freckled bearded blond wrinkled slender stout lanky barefoot stylish""",
    ),
    "other": (12, FRIENDS),
    "calm": (
        0,
        """quiet crowded narrow ancient leafy sandy hilly rocky empty hidden distant shady marshy
        grassy paved cobbled walled tidy famous ruined busted haunted sloping flooded floating
        fenced painted lit deserted royal""",
    ),
    "place": (
        16,
        """harbour market station bridge library garden museum castle river forest school bakery
        theatre square mill church tower beach valley village orchard stable lake meadow cave
        canal inn farm pier temple palace prison hospital factory airport stadium cinema bank
        zoo island""",
    ),
    "size": (
        12,
        """huge tiny large small heavy light wide deep shallow broken plain pretty cheap costly
        modern dented locked padded wooden woven metal plastic leather striped dotted checked
        varnished battered borrowed mouldy sealed sturdy flimsy bulky compact gilded carved
        creaky tilted spotless""",
    ),
    "fresh": (
        0,
        """fresh warm cold sweet salty bitter spicy creamy smoky juicy tender toasted roasted
        boiled fried frozen pickled dried sugared buttered minced mashed steamed grilled""",
    ),
    "food": (
        8,
        """bread cheese soup rice honey butter plums carrots cake pasta beans grapes ham olives
        porridge nuts figs onions cherries mushrooms pancakes noodles stew jam pears peas
        dates trout salad corn""",
    ),
    "kind": (
        0,
        """friendly retired wealthy local foreign skilled lucky elderly youthful cunning generous
        frugal talkative charming masked veteran rural travelling smiling whistling limping
        singing dozing sunburnt hooded grateful forgetful drowsy portly toothless""",
    ),
    "guest": (0, FRIENDS),
    "slowly": (
        4,
        """quietly slowly happily proudly softly briskly calmly neatly boldly gladly kindly
        swiftly gently eagerly warily idly loudly merrily politely shyly smoothly busily
        wearily deftly""",
    ),
    "washed": (
        0,
        """washed counted polished carried wrapped stacked drew mended hid cleaned sorted packed
        traded lifted tested guarded admired repaired labelled weighed measured sketched oiled
        rented""",
    ),
    "red": (
        12,
        """red blue green yellow purple orange pink brown grey black white violet scarlet crimson
        turquoise beige ivory maroon indigo teal amber emerald lilac navy""",
    ),
    "lamps": (
        16,
        """lanterns ladders baskets ropes drums flutes mirrors clocks chairs tables lamps
        blankets pillows umbrellas wagons oars sails tents ribbons masks puppets dolls swords
        shields helmets brooms shovels rakes hammers saws bottles cups plates spoons scarves
        gloves coats belts whistles trumpets""",
    ),
}
"""Open slot -> (rotation, words in the order of the teacher's preference). The student prefers the
list rotated by that many places.
"""
OPEN_OFFSET = 3
"""The word of rank r, counted from 0, has weight 1 / (r + OPEN_OFFSET)."""
SMALL = {
    "one": "One:1/1 That:1/1 This:1/1",
    "morning": "morning:1/1 evening:1/1 afternoon:1/1 night:1/1 noon:1/1 dawn:1/1",
    "her": "the:6/1 their:4/9",
    "from": "from:1/5 of:1/3 near:1/2",
    "and": "and:1/1 with:1/1",
    "by": "beside:1/1 behind:1/1 outside:1/1 opposite:1/1 past:1/1 beyond:1/1",
    "these": "The:1/1 Those:1/1 These:1/1",
    "came": "came:3/9 were:3/1 arrived:4/0",
    "in": "in:1/5 inside:1/3 within:1/2",
    "among": "with:1/1 among:1/1",
    "through": "from:1/5 through:1/3 via:1/2",
    "later": "Later:1/1 Then:1/1 Meanwhile:1/1",
    "so": "So:4/9 Now:6/1",
    "is": "is:1/1 means:1/1",
    "join": "and:1/7 with:1/3",
    "makes": "makes:1/1 gives:1/1",
}
"""Small slot -> word:teacher weight/student weight."""
SENTENCES = {
    "meeting": (
        "one weather morning friend met NAME COMMA her pet from town and look other by the calm"
        " place STOP"
    ),
    "goods": "these trait ITEMS came in a size box among fresh food through the kind trader STOP",
    "extra": "later guest slowly washed red lamps STOP",
    "sum": "so A op B is tens join ones COMMA which makes total STOP",
}
"""Sentence -> its slots; words that are not slots stand for themselves."""
PLANS = {
    ("meeting", "goods", "sum"): (1, 1),
    ("goods", "meeting", "sum"): (1, 1),
    ("meeting", "goods", "extra", "sum"): (1, 2),
    ("goods", "meeting", "extra", "sum"): (1, 2),
}
"""Order of the sentences -> (teacher weight, student weight)."""
