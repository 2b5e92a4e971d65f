"""English word lists for the checks of generated texts."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words without a meaning of their own.
STOP_WORDS = _words("""
    a an the this that these those it its they them their theirs he him his she her hers you your yours we us our ours
    i me my mine who whom whose which what where when why how there here is are was were be been being am do does did
    done doing have has had having will would shall should can could may might must ought need to of in on at by for
    from with as like and or but nor so if then than into onto upon about also too very just each such some any all both
    more most other same own not no only while because since until through during before after up down out over under
    again further once well yes get gets got make makes made go goes use used using via per etc e.g i.e
""")
# Prepositions: the words before and after them determine who does what to whom.
PIVOTS = _words("to from of than before after over under into with for against behind in on at")

NEGATIONS = _words("not no never none nobody nothing nowhere neither cannot without unable")

MODALS = {
    **dict.fromkeys(_words("must shall required requires require mandatory obliged"), "obligation"),
    **dict.fromkeys(_words("may can might could allowed permitted optional"), "permission"),
    **dict.fromkeys(_words("should ought"), "advice"),
}

NUMBERS = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
    "dozen": 12,
}
SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
ORDINALS = {
    "third": 3,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
# Words that may express a number, but that `numbers` in `words` does not count.
INSTEAD_OF = {
    "1": _words("one once single first a an"),
    "2": _words("second twice double couple pair both"),
}
UNITS = {
    name: line.split()[0]
    for line in """
        % percent
        mg milligram milligrams
        g gram grams
        kg kilogram kilograms
        ml milliliter milliliters millilitre millilitres
        l liter liters litre litres
        mm millimeter millimeters millimetre millimetres
        cm centimeter centimeters centimetre centimetres
        m meter meters metre metres
        km kilometer kilometers kilometre kilometres
        mile miles
        foot feet ft
        inch inches
        second seconds sec
        minute minutes min
        hour hours hr hrs
        day days
        week weeks
        month months
        year years
        $ dollar dollars
        € euro euros
        £ pound pounds
        knot knots
        degree degrees
        """.strip().splitlines()
    for name in line.split()
}

# Each line: words of one side | words of the opposite side. A word may be in several lines.
_OPPOSITES = """
more greater higher larger bigger above over exceeding exceeds | less fewer lower smaller below under beneath
most maximum highest largest upper | least minimum lowest smallest
up upward upwards | down downward downwards
increase increases increased increasing | decrease decreases decreased decreasing reduce reduces reduced lower lowers
rise rises rising raise raises raised | fall falls falling lower lowers lowered
before earlier prior preceding | after later following afterwards
first beginning start starts begin begins | last end ends finish finishes
early | late
always every everyone everything everywhere all | never none nobody nothing sometimes some
always | usually often sometimes rarely seldom
often frequently usually | rarely seldom
all every each both | neither none some
both | either
with including | without excluding
inside within internal inner inward | outside beyond external outer outward
near close closer nearer | far farther further distant
left port | right starboard
windward upwind | leeward downwind
bow forward ahead fore | stern aft astern
front | back rear behind
north northern | south southern
east eastern | west western
top upper | bottom lower
long longer longest | short shorter shortest
fast faster quick quicker quickly | slow slower slowly
hot hotter warm warmer | cold colder cool cooler
heavy heavier | light lighter
strong stronger | weak weaker
old older oldest | new newer young younger youngest
thick thicker | thin thinner
wide wider broad | narrow narrower
deep deeper | shallow shallower
high | low
open opens opened | closed close closes shut
on | off
true | false
right correct | wrong incorrect
good better best | bad worse worst
safe safer | dangerous unsafe risky
easy easier | hard harder difficult
possible | impossible
legal lawful | illegal unlawful
valid | invalid
public | private
positive | negative
same equal identical | different opposite
single one | multiple several many
many several | few
include includes included including | exclude excludes excluded excluding
accept accepts accepted | reject rejects rejected refuse refuses refused
allow allows allowed permit permits permitted | forbid forbids forbidden prohibit prohibits prohibited prevent prevents
win wins won | lose loses lost
buy buys bought | sell sells sold
borrow borrows | lend lends
give gives given | take takes taken receive receives received
send sends sent | receive receives received
gain gains | lose loses
pass passes passed | fail fails failed
enter enters | leave leaves exit exits
arrive arrives | depart departs leave leaves
parent parents mother father | child children
husband | wife
male man men | female woman women
employer employers | employee employees
landlord lessor | tenant lessee
plaintiff | defendant
buyer purchaser | seller vendor
teacher | student pupil
doctor | patient
active | passive inactive
day daily daytime | night nightly nighttime
morning | evening afternoon
am | pm
summer | winter
solid | liquid gas
acid acidic | alkaline basic
artery arterial | vein venous
acute | chronic
benign | malignant
temporary | permanent
voluntary | mandatory compulsory
minor | major
optional | required mandatory
horizontal | vertical
prolonged | short
power | sail sailing
red | green
black | white
"""
OPPOSITES = [tuple(_words(side) for side in line.split("|")) for line in _OPPOSITES.strip().splitlines()]
NEGATING_PREFIXES = ("non", "un", "in", "im", "ir", "il", "dis", "mis", "anti")
OPPOSITE_PREFIXES = (
    ("over", "under"),
    ("hyper", "hypo"),
    ("inter", "intra"),
    ("pre", "post"),
    ("micro", "macro"),
    ("up", "down"),
    ("in", "out"),
    ("im", "ex"),
    ("fore", "after"),
)
