"""Words that name what a COCO detector finds, and words that name a part of it. Singular, lower case.

A word may name several categories: "vehicle" is an object if any of them is in the image.
"""

from collections.abc import Iterable

PERSON = "person"
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
VEHICLES = ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat")
FRUIT = ("banana", "apple", "orange")
FOOD = (*FRUIT, "sandwich", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake")
APPLIANCES = ("microwave", "oven", "toaster", "refrigerator", "hair drier")
DEVICES = ("tv", "laptop", "mouse", "remote", "keyboard", "cell phone")
FURNITURE = ("chair", "couch", "bed", "dining table", "bench")
TABLEWARE = ("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl")
TOYS = ("teddy bear", "frisbee", "sports ball", "kite")

# Category -> further words for it, space-separated; words of two or more parts are joined by "_".
_SYNONYMS = {
    "person": """
        human people man men woman women boy girl child children kid baby infant toddler teen teenager adult youth
        youngster guy gentleman gentlemen lady gal fellow dude bloke senior elder
        father mother dad mom mum parent son daughter brother sister sibling grandfather grandmother grandpa grandma
        husband wife couple family twin friend buddy boyfriend girlfriend classmate teammate colleague
        rider driver biker bicyclist cyclist motorcyclist skier snowboarder skateboarder skater surfer swimmer diver
        boarder sailor rower kayaker hiker climber runner jogger walker pedestrian passerby bystander commuter
        passenger traveler traveller tourist visitor shopper customer diner guest onlooker spectator fan audience
        crowd player batter catcher pitcher umpire referee goalie goalkeeper quarterback golfer boxer wrestler athlete
        gymnast dancer ballerina opponent competitor contestant racer team coach baseball_player tennis_player
        worker employee laborer builder carpenter mechanic welder farmer fisherman fishermen cook chef baker waiter
        waitress bartender barista server vendor seller salesman clerk cashier businessman businessmen businesswoman
        student pupil teacher professor instructor doctor nurse dentist patient surgeon scientist officer policeman
        policemen policewoman cop police fireman firemen firefighter soldier guard marine pilot conductor cowboy
        cowgirl jockey artist painter photographer cameraman musician guitarist drummer singer performer actor
        actress model clown magician speaker presenter reporter bride groom bridesmaid groomsman priest monk nun
        king queen prince princess hipster hippie member leader volunteer neighbor neighbour
        individual figure character somebody someone anyone everyone
    """,
    "bicycle": "bike cycle tricycle tandem",
    "car": "automobile sedan suv taxi cab jeep limousine convertible hatchback minivan van hearse police_car",
    "motorcycle": "motorbike motor_bike scooter moped dirt_bike harley chopper",
    "airplane": "plane aeroplane jet airliner aircraft biplane seaplane jetliner propeller_plane glider",
    "bus": "double_decker minibus school_bus tour_bus coach trolley shuttle",
    "train": "locomotive railcar subway tram monorail train_car streetcar freight_train engine",
    "truck": "lorry pickup pickup_truck fire_truck firetruck semi dump_truck tow_truck trailer van",
    "boat": "ship sailboat canoe kayak raft ferry yacht rowboat gondola barge dinghy vessel speedboat catamaran",
    "traffic light": "traffic_signal stoplight stop_light street_light signal light",
    "fire hydrant": "hydrant fireplug",
    "stop sign": "sign",
    "parking meter": "meter",
    "bench": "park_bench seat pew",
    "bird": """
        pigeon seagull gull duck goose geese swan parrot eagle hawk owl crow sparrow chicken hen rooster turkey
        penguin flamingo peacock pelican ostrich heron crane stork duckling chick robin finch parakeet cockatoo
        fowl flock
    """,
    "cat": "kitten kitty feline tabby tomcat",
    "dog": """
        puppy pup canine hound poodle terrier retriever labrador bulldog collie dalmatian husky chihuahua dachshund
        beagle spaniel greyhound pug shepherd mutt doggy
    """,
    "horse": "pony foal mare stallion colt mule donkey",
    "sheep": "lamb ram ewe goat flock",
    "cow": "cattle bull calf calves ox oxen steer bovine buffalo heifer",
    "elephant": "elephant calf",
    "bear": "polar_bear grizzly cub panda grizzly_bear brown_bear black_bear",
    "zebra": "",
    "giraffe": "",
    "backpack": "bag rucksack knapsack pack",
    "umbrella": "parasol",
    "handbag": "purse bag tote pocketbook",
    "tie": "necktie bowtie bow_tie",
    "suitcase": "luggage baggage bag briefcase trunk",
    "frisbee": "disc disk",
    "skis": "ski",
    "snowboard": "board",
    "sports ball": "ball baseball basketball football soccer_ball tennis_ball volleyball softball beach_ball",
    "kite": "parasail",
    "baseball bat": "bat",
    "baseball glove": "glove mitt catcher's_mitt",
    "skateboard": "skate_board longboard board",
    "surfboard": "surf_board board wakeboard paddleboard",
    "tennis racket": "racket racquet tennis_racquet",
    "bottle": "wine_bottle beer_bottle water_bottle",
    "wine glass": "glass goblet wineglass",
    "cup": "mug glass tumbler teacup coffee",
    "fork": "utensil silverware cutlery",
    "knife": "knives blade utensil silverware cutlery",
    "spoon": "utensil silverware cutlery ladle",
    "bowl": "dish",
    "banana": "plantain",
    "apple": "",
    "sandwich": "burger hamburger cheeseburger sub panini wrap blt toast",
    "orange": "tangerine clementine mandarin citrus",
    "broccoli": "vegetable veggie",
    "carrot": "vegetable veggie",
    "hot dog": "hotdog sausage wiener bratwurst frankfurter chili_dog",
    "pizza": "pie slice",
    "donut": "doughnut pastry bagel",
    "cake": "cupcake dessert cheesecake pastry birthday_cake",
    "chair": "armchair stool recliner seat lawn_chair highchair rocker",
    "couch": "sofa loveseat settee futon sectional",
    "potted plant": "plant houseplant flower_pot pot planter flower",
    "bed": "mattress bunk bunkbed cot crib bunk_bed",
    "dining table": "table desk picnic_table tabletop",
    "toilet": "urinal commode toilet_seat",
    "tv": "television monitor screen tv_set television_set tv_screen flat_screen computer_monitor computer_screen computer",
    "laptop": "computer notebook macbook laptop_computer",
    "mouse": "computer_mouse",
    "remote": "remote_control controller wii_remote wiimote wii_controller game_controller",
    "keyboard": "computer_keyboard",
    "cell phone": "phone cellphone smartphone mobile_phone iphone mobile telephone",
    "microwave": "microwave_oven",
    "oven": "stove stovetop range stove_top",
    "toaster": "toaster_oven",
    "sink": "basin washbasin wash_basin",
    "refrigerator": "fridge freezer",
    "book": "novel textbook notebook magazine",
    "clock": "clock_face",
    "vase": "flower_vase urn pot jar",
    "scissors": "scissor shear",
    "teddy bear": "teddy stuffed_bear stuffed_animal bear toy_bear plush",
    "hair drier": "hairdryer hair_dryer blow_dryer hairdrier dryer",
    "toothbrush": "tooth_brush brush",
}

_WIDER = {
    "animal": ANIMALS,
    "creature": ANIMALS,
    "pet": ("cat", "dog", "bird"),
    "herd": ("horse", "sheep", "cow", "elephant", "zebra", "giraffe"),
    "vehicle": VEHICLES,
    "traffic": VEHICLES,
    "food": FOOD,
    "meal": (*FOOD, *TABLEWARE),
    "lunch": FOOD,
    "dinner": FOOD,
    "breakfast": FOOD,
    "snack": FOOD,
    "fruit": FRUIT,
    "appliance": APPLIANCES,
    "electronics": DEVICES,
    "device": DEVICES,
    "furniture": FURNITURE,
    "toy": TOYS,
}

# Parts of a category: inside its box, so no part of the background where it is an object.
_BODY = """
    head face hair eye ear nose mouth lip tongue tooth teeth cheek chin beard mustache moustache neck shoulder arm
    elbow hand finger fist chest stomach belly back waist hip leg knee foot feet toe skin body arms smile
"""
_ANIMAL_PARTS = (
    "paw tail horn trunk tusk mane fur hoof hooves beak wing feather snout leash collar saddle harness"
)
_CLOTHING = """
    clothes clothing outfit attire uniform costume shirt t-shirt tshirt blouse sweater sweatshirt hoodie jacket coat
    vest suit tuxedo dress gown skirt jeans pants trousers shorts leggings sock shoe boot sandal sneaker heel slipper
    hat cap helmet hood beanie visor headband scarf glove mitten belt apron robe swimsuit bikini wetsuit trunk
    bathing_suit wet_suit sunglasses glasses goggles eyeglass mask watch bracelet necklace earring ring jewelry
    headphone headphones earphone wig veil crown pocket sleeve jersey overall overalls pajamas tank_top vest tattoo
    lipstick makeup
"""
_VEHICLE_PARTS = "wheel tire windshield headlight handlebar propeller engine sail mast hood bumper"

# Heads that only measure or arrange what follows their "of".
QUANTITIES = frozenset(
    [
        "group",
        "pair",
        "couple",
        "lot",
        "bunch",
        "herd",
        "flock",
        "crowd",
        "line",
        "row",
        "set",
        "pile",
        "stack",
        "number",
        "variety",
        "piece",
        "slice",
        "bit",
        "part",
        "kind",
        "type",
        "plate",
        "bowl",
        "cup",
        "glass",
        "bottle",
        "basket",
        "box",
        "tray",
        "bag",
        "platter",
        "tub",
        "can",
        "jar",
        "assortment",
        "collection",
        "stand",
        "swarm",
        "school",
        "pack",
        "team",
        "cluster",
        "series",
        "array",
        "dozen",
        "hundred",
        "thousand",
    ]
)
# Heads that name the picture, or a place in it, and nothing that can be seen.
PLACES_AND_PICTURES = frozenset(
    [
        "photo",
        "photograph",
        "picture",
        "image",
        "view",
        "shot",
        "scene",
        "snapshot",
        "portrait",
        "closeup",
        "close-up",
        "close",
        "selfie",
        "front",
        "back",
        "top",
        "side",
        "bottom",
        "middle",
        "center",
        "centre",
        "edge",
        "end",
        "corner",
        "left",
        "right",
        "background",
        "foreground",
        "distance",
        "inside",
        "outside",
        "next",
        "way",
        "day",
        "time",
        "air",
    ]
)
# Verbs whose object is in the hand, in the mouth or on the body of their subject.
CONTACT_VERBS = frozenset(
    [
        "wear",
        "hold",
        "carry",
        "eat",
        "drink",
        "use",
        "swing",
        "throw",
        "catch",
        "hit",
        "kick",
        "read",
        "smoke",
        "brush",
        "chew",
        "bite",
        "lick",
        "blow",
        "grab",
        "grip",
        "touch",
        "pull",
        "push",
        "drag",
        "lift",
        "wave",
        "raise",
        "play",
        "fly",
        "toss",
        "wield",
        "cut",
        "sip",
        "text",
        "talk",
        "taste",
        "feed",
        "dress",
        "hug",
        "pet",
        "balance",
        "display",
    ]
)
# A word that is not listed above and ends so may well be a person when it does something.
PERSON_ENDINGS = ("er", "or", "ist", "ian", "man", "men", "woman", "women", "boy", "girl", "person", "eer")


def _words() -> dict[str, frozenset[str]]:
    names: dict[str, set[str]] = {}

    def add(words: str, categories: Iterable[str]) -> None:
        for word in words.split():
            names.setdefault(word.replace("_", " "), set()).update(categories)

    for category, words in _SYNONYMS.items():
        names.setdefault(category, set()).add(category)
        add(words, (category,))
    for word, categories in _WIDER.items():
        add(word, categories)
    add(_BODY, (PERSON, *ANIMALS, "teddy bear"))
    add(_ANIMAL_PARTS, (*ANIMALS, "teddy bear"))
    add(_CLOTHING, (PERSON,))
    add(_VEHICLE_PARTS, VEHICLES)
    return {word: frozenset(categories) for word, categories in names.items()}


COCO_CATEGORIES = tuple(_SYNONYMS)
# Word, or words with a space between -> the categories that it may name or be a part of.
CATEGORIES_OF = _words()
LONGEST_NAME = max(len(name.split()) for name in CATEGORIES_OF)


def categories_named(words: list[str]) -> frozenset[str]:
    """Categories that the end of a noun phrase names; its words lower case.

    >>> sorted(categories_named(["big", "red", "fire", "hydrants"]))
    ['fire hydrant']
    >>> categories_named(["bus", "station"])
    frozenset()
    """
    for count in range(min(LONGEST_NAME, len(words)), 0, -1):
        *first, last = words[-count:]
        for form in _singulars(last):
            found = CATEGORIES_OF.get(" ".join([*first, form]))
            if found:
                return found
    return frozenset()


def _singulars(word: str) -> list[str]:
    """The word, and what it may be the regular plural of; irregular plurals are in the table."""
    forms = [word]
    if word.endswith("s"):
        forms.append(word[:-1])
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    return forms
