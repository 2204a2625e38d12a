"""Names for apps whose owner did not choose one: three words picked by a number. Pure.

The numbers come from a sequence. A keyed permutation spreads them, so that names look random and still never repeat
until every combination has been used; after that they start over, and the caller skips those in use.
"""

from __future__ import annotations

import hashlib


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    """
    able amber ancient apt arctic autumn azure bold brave breezy bright brisk calm candid careful cheerful chief
    clever cool copper coral cosmic crisp curious daring dawn deep eager early easy electric emerald fair famous
    fancy fast fearless fine firm fleet fond free fresh frosty gentle giant glad gold grand green handy happy hardy
    hidden honest humble icy ideal ivory jade jolly keen kind large late lean light lively local lone long loud
    loyal lucid lucky lunar magic major marble mellow merry mighty mild misty modest neat nimble noble northern
    novel olive open orange patient pearl plain polar polite prime proud purple quick quiet rapid rare ready robust
    royal ruby rustic sage scarlet serene sharp shiny silent silver simple sleek smart smooth snowy solar solid
    southern spare spry steady still strong sturdy subtle summer sunny super sure swift tall tame tidy tiny topaz
    tranquil true upbeat urban useful valid vast velvet vivid warm western whole wild willing winter wise witty
    young zesty
    """
)

ANIMALS = _words(
    """
    adder alpaca ant antelope badger bat bear beaver bee beetle bison boar bobcat buffalo butterfly camel canary
    caribou cat cheetah chicken cicada clam cobra cod condor corgi cougar coyote crab crane cricket crow deer dingo
    dolphin donkey dove dragonfly duck eagle eel egret elephant elk emu ermine falcon ferret finch firefly fish
    flamingo fox frog gazelle gecko gibbon giraffe gnu goat goose gopher grouse gull hamster hare hawk hedgehog
    heron hippo hornet horse hound hyena ibex ibis iguana impala jackal jaguar jay kestrel kiwi koala lark lemming
    lemur leopard lion lizard llama lobster lynx macaw magpie mallard manatee mantis marlin marmot marten mink mole
    mongoose monkey moose mouse mule newt octopus okapi orca oriole osprey otter owl ox oyster panda panther parrot
    partridge pelican penguin perch pheasant pigeon pike plover pony porpoise puffin puma quail rabbit raccoon ram
    raven reindeer robin salmon sardine seal shark sheep shrew shrimp skylark sloth snail sparrow spider squid
    squirrel starling stork sturgeon swallow swan tapir tern thrush tiger toad toucan trout turtle viper vole walrus
    wasp weasel whale wolf wombat woodpecker wren yak zebra
    """
)

PLACES = _words(
    """
    abbey arch atoll bank barn basin bay beach bend bluff bog bridge brook camp canal canyon cape castle cave
    channel cliff coast cove crater creek crossing dale dam delta den desert dock dune falls farm fen field fjord
    ford forest fork garden gate geyser glacier glade glen gorge grove gulch gulf harbor heath hill hollow inlet
    island isle jetty junction knoll lagoon lake landing ledge lodge marina marsh meadow mesa mill moor mountain
    oasis ocean orchard park pass pasture path peak pier pine plain plateau pond port prairie quarry quay range
    rapids ravine reef ridge river road rock sand shoal shore slope sound spring square station steppe strait stream
    summit swamp terrace tower trail tundra valley village vista wharf wood yard
    """
)

COMBINATIONS = len(ADJECTIVES) * len(ANIMALS) * len(PLACES)
_ROUNDS = 4
_HALF_BITS = 12  # two halves: 2**24 numbers, the next power of four above the combinations


def app_name(number: int, seed: bytes) -> str:
    """Return the name belonging to a sequence number; distinct for `COMBINATIONS` numbers in a row."""
    index = _permuted(number % COMBINATIONS, seed)
    index, place = divmod(index, len(PLACES))
    adjective, animal = divmod(index, len(ANIMALS))
    return f"{ADJECTIVES[adjective]}-{ANIMALS[animal]}-{PLACES[place]}"


def _permuted(number: int, seed: bytes) -> int:
    """Map a number below `COMBINATIONS` to another: a Feistel network, repeated until the result is in range."""
    while True:
        left, right = number >> _HALF_BITS, number & ((1 << _HALF_BITS) - 1)
        for turn in range(_ROUNDS):
            digest = hashlib.blake2b(right.to_bytes(2, "big") + bytes([turn]), key=seed, digest_size=2).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & ((1 << _HALF_BITS) - 1))
        number = left << _HALF_BITS | right
        if number < COMBINATIONS:
            return number
