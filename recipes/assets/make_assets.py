"""
Make everything in this folder: a small pretrained Llama and seven text tasks for it.

    python recipes/assets/make_assets.py                 # all of it: about six minutes on one CPU core
    python recipes/assets/make_assets.py --tasks-only    # rewrite tasks/*/*.jsonl only: seconds

The English below is synthetic: templates and word lists, drawn with a fixed seed. The same templates make the text the
backbone is pretrained on (where what follows "Answer:" is drawn at random) and the texts of the tasks:

    topic     what a note is about                folder    the colour of the folder for notes on that topic
    giver     who gave the thing away             receiver  who got it (the texts of `giver`, the other person)
    count     how many things are listed          day       the day that holds in the end
    intent    what a customer wants done

`topic` and `folder`, `giver` and `receiver` label the same kind of text by different rules, so one adapter trained on
them in sequence must forget. A task is used as prompt `text + "\\nAnswer:"` and completion `" " + label`; each label
is one token there.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm, trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# ---------------------------------------------------------------------------------------------------------------------
# Sizes

SEED = 0
FOLDER = Path(__file__).parent
TRAIN_EXAMPLES, TEST_EXAMPLES = 720, 200

VOCAB_SIZE = 1536
HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS, NUM_HEADS = 128, 384, 4, 4
ROPE_THETA, MAX_POSITIONS = 1000.0, 512  # the texts are short

STEPS, WARMUP_STEPS, DOCUMENTS_PER_STEP = 2400, 50, 32
PEAK_LR = 4e-3

# ---------------------------------------------------------------------------------------------------------------------
# Words

PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix"]
PRONOUNS = dict(zip(PEOPLE, ["she", "he"] * 3, strict=True))
COLOURS = ["red", "blue", "green", "yellow", "black", "white"]
NUMBERS = ["one", "two", "three", "four", "five", "six"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
THINGS = ["cup", "lamp", "key", "book", "clock", "basket", "mirror", "candle", "pillow", "hammer", "letter", "blanket"]
CLOTHES = ["coat", "scarf", "hat", "shirt", "dress", "jacket", "belt", "bag"]
PLACES = ["kitchen", "garden", "office", "library", "market", "park", "garage", "hall"]
EVENTS = ["meeting", "party", "lecture", "picnic", "wedding", "exam", "sale", "dinner"]
RENTALS = ["cabin", "boat", "van", "tent", "bike", "trailer", "piano", "car"]

# A topic's sentences: templates, and the words for their slots. No word of a slot is shared between topics.
TOPICS: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "animals": (
        [
            "The {size} {beast} {does} {where}.",
            "A {beast} and a {beast2} {do} {where}.",
            "{person} fed the {beast}, which {does} {where}.",
        ],
        {
            "size": ["hungry", "furry", "wild", "tame"],
            "beast": ["puppy", "kitten", "horse", "rabbit", "fox", "goat"],
            "beast2": ["sheep", "hen", "goose", "donkey", "cow", "mule"],
            "does": ["licked its paws", "shook its tail", "pricked up its ears", "dug a hole"],
            "do": ["lay down together", "sniffed each other", "shared the hay", "ran from the wolf"],
            "where": ["in the barn", "near the pond", "behind the fence", "on the farm"],
        },
    ),
    "food": (
        [
            "{person} {cooks} the {dish} with {extra}.",
            "The {dish} tasted of {extra} and {extra2}.",
            "{person} {cooks} a {taste} {dish}.",
        ],
        {
            "cooks": ["baked", "stirred", "fried", "salted", "served"],
            "dish": ["soup", "pie", "stew", "pasta", "omelette", "cake"],
            "extra": ["butter", "garlic", "honey", "cheese", "pepper"],
            "extra2": ["lemon", "ginger", "onions", "cream", "vinegar"],
            "taste": ["delicious", "spicy", "sweet", "crispy"],
        },
    ),
    "music": (
        [
            "{person} {plays} a {piece} on the {tool}.",
            "The {band} {plays} the {piece} {how}.",
            "A {tool} and a {tool2} began the {piece}.",
        ],
        {
            "plays": ["practised", "performed", "rehearsed", "recorded"],
            "piece": ["melody", "waltz", "ballad", "sonata", "tune"],
            "tool": ["violin", "flute", "guitar", "trumpet", "cello"],
            "tool2": ["drum", "harp", "clarinet", "banjo"],
            "band": ["choir", "orchestra", "quartet", "singer"],
            "how": ["out of tune", "in a minor key", "without a conductor", "with a slow rhythm"],
        },
    ),
    "sports": (
        [
            "The {player} {scores} {when}.",
            "{person} cheered as the {player} {scores}.",
            "The {team} won the {match} {when}.",
        ],
        {
            "player": ["striker", "goalkeeper", "runner", "champion", "swimmer"],
            "scores": [
                "scored a goal",
                "missed the penalty",
                "broke the record",
                "crossed the finish line",
                "lost the race",
            ],
            "team": ["league", "visitors", "athletes", "underdogs"],
            "match": ["final", "tournament", "cup tie", "relay"],
            "when": ["in extra time", "before the whistle", "at the stadium", "in front of the fans"],
        },
    ),
    "travel": (
        [
            "{person} {takes} the {vehicle} to the {goal}.",
            "The {vehicle} to the {goal} {late}.",
            "{person} packed a {luggage} and {takes} the {vehicle}.",
        ],
        {
            "takes": ["boarded", "waited for", "caught", "almost missed"],
            "vehicle": ["train", "ferry", "plane", "coach", "tram"],
            "goal": ["airport", "harbour", "border", "island", "capital"],
            "late": ["was delayed", "left the platform", "arrived on schedule", "was full of tourists"],
            "luggage": ["suitcase", "backpack", "passport", "map"],
        },
    ),
    "health": (
        [
            "The {doctor} {treats} the {part}.",
            "{person} went to the {clinic} with a {ill}.",
            "The {doctor} gave the patient {cure} for a {ill}.",
        ],
        {
            "doctor": ["nurse", "doctor", "surgeon", "dentist"],
            "treats": ["examined", "bandaged", "treated", "operated on"],
            "part": ["broken arm", "swollen knee", "sore throat", "injured ankle"],
            "clinic": ["hospital", "clinic", "pharmacy", "emergency room"],
            "ill": ["fever", "cough", "headache", "rash", "toothache"],
            "cure": ["pills", "an injection", "some medicine", "a vaccine"],
        },
    ),
}
FOLDER_OF_TOPIC = dict(zip(TOPICS, ["green", "white", "red", "black", "yellow", "blue"], strict=True))

INTENTS = {
    "booking": [
        "reserve the {r} for {d}",
        "keep the {r} free for us on {d}",
        "hold the {r} until {d}",
        "save me the {r} for {d}",
    ],
    "cancel": [
        "drop my order for the {r} on {d}",
        "withdraw my request for the {r}",
        "take my name off the list for the {r}",
        "give the {r} on {d} to somebody else",
    ],
    "payment": [
        "settle the bill for the {r}",
        "transfer the money for the {r} on {d}",
        "charge the {r} to my card",
        "accept cash for the {r} on {d}",
    ],
    "call": [
        "phone the owner of the {r}",
        "ring me about the {r} on {d}",
        "speak with the manager about the {r}",
        "let me talk to somebody about the {r}",
    ],
    "search": [
        "look for the {r} that went missing",
        "track down the {r}",
        "locate the {r} we lost on {d}",
        "tell me where the {r} is",
    ],
    "repair": [
        "fix the {r} before {d}",
        "mend the broken {r}",
        "replace the damaged parts of the {r}",
        "get the {r} working again by {d}",
    ],
}
INTENT_REPLIES = {
    "booking": ["Certainly, it is all yours then.", "Done, nobody else can have it."],
    "cancel": ["Understood, you will not be expected.", "Too bad, we hope to see you another time."],
    "payment": ["Thank you, here is the receipt.", "Thanks, then nothing is owed."],
    "call": ["Of course, what is the number?", "Sure, stay on the line."],
    "search": ["We will check every corner.", "We have not seen it, but we will ask around."],
    "repair": ["Our mechanic will bring the tools.", "It needs new screws, that takes an hour."],
}
LABELS = {
    "topic": list(TOPICS),
    "giver": PEOPLE,
    "intent": list(INTENTS),
    "count": NUMBERS,
    "folder": COLOURS,
    "day": DAYS,
    "receiver": PEOPLE,
    "shopping": COLOURS,  # the colour of what was bought
}
TASKS = [kind for kind in LABELS if kind != "shopping"]  # shopping is read in pretraining only

# ---------------------------------------------------------------------------------------------------------------------
# Texts: each function draws one text for a given label, and sentences that could follow it (pretraining only)

Text = tuple[str, list[str]]


def fill(rng: random.Random, template: str, slots: dict[str, list[str]]) -> str:
    return template.format(**{slot: rng.choice(words) for slot, words in slots.items()})


def about_topic(rng: random.Random, topic: str) -> Text:
    templates, slots = TOPICS[topic]
    slots = slots | {"person": PEOPLE}
    first, *more = [fill(rng, template, slots) for template in rng.sample(templates, 3)]
    aside = rng.choice(
        [
            f"It was a long {rng.choice(DAYS)}.",
            f"{rng.choice(PEOPLE)} told {rng.choice(['us', 'everyone', 'me'])} about it later.",
            f"That was {rng.choice(NUMBERS[1:])} {rng.choice(['days', 'weeks', 'years'])} ago.",
            f"We read it in the {rng.choice(PLACES)}.",
            "Nobody was surprised.",
        ]
    )
    return rng.choice([f"{first} {aside}", f"{aside} {first}", f"{first} {more[0]}"]), more[1:]


def about_gift(rng: random.Random, giver: str | None, receiver: str | None) -> Text:
    one, two, other = rng.sample([name for name in PEOPLE if name not in (giver, receiver)], 3)
    giver, receiver = giver or one, receiver or two
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    gift = rng.choice(
        [
            f"{giver} gave the {thing} to {receiver}",
            f"{giver} handed {receiver} the {thing}",
            f"{giver} brought {receiver} a {thing}",
            f"{receiver} got a {thing} from {giver}",
            f"{receiver} received the {thing} from {giver}",
            f"{receiver} was handed the {thing} by {giver}",
        ]
    )
    place = rng.choice(PLACES)
    text = rng.choice(
        [
            f"{gift}.",
            f"{gift} while {other} waited.",
            f"In the {place}, {gift}.",
            f"{gift}. {other} was in the {place}.",
            f"When {other} left, {gift}.",
        ]
    )
    endings = [
        f"Now {receiver} has the {thing}, and {giver} does not.",
        f"{receiver} thanked {giver} for it.",
        f"It was kind of {giver} to do this for {receiver}.",
        f"The {thing} that {giver} had belongs to {receiver} now.",
        f"Who has it now? {receiver} does. Who had it before? {giver} did.",
    ]
    return text, endings


def about_shopping(rng: random.Random, colour: str) -> Text:
    colours = [colour, *rng.sample([other for other in COLOURS if other != colour], 2)]
    bought, left, liked = [f"{c} {item}" for c, item in zip(colours, rng.sample(CLOTHES, 3), strict=True)]
    person, place = rng.choice(PEOPLE), rng.choice(["market", "shop", "sale"])
    pronoun = PRONOUNS[person]
    buys = rng.choice(["bought", "paid for", "chose"])
    leaves = rng.choice(["tried on", "looked at", "put back", "liked"])
    text = rng.choice(
        [
            f"At the {place}, {person} {leaves} a {left}, but {buys} a {bought}.",
            f"{person} {buys} the {bought} after {pronoun} {leaves} the {left} and the {liked}.",
            f"{person} {leaves} a {left}, then {buys} a {bought}.",
            f"At the {place}, {person} {buys} a {bought}, although {pronoun} {leaves} the {left} and the {liked}.",
        ]
    )
    endings = [
        f"So {person} went home with something {colour}.",
        f"The {bought} is at home now, the {left} is not.",
        f"{person} came home in {colour}.",
        f"Which of them is new? The {colour} one.",
    ]
    return text, endings


def about_list(rng: random.Random, number: str) -> Text:
    count = NUMBERS.index(number) + 1
    items = [f"a {thing}" for thing in rng.sample(THINGS, count)]
    listed = items[0] if count == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    person, other, place = *rng.sample(PEOPLE, 2), rng.choice(PLACES)
    text = rng.choice(
        [
            f"{person} put {listed} in the box.",
            f"{person} needed {listed} for the {rng.choice(EVENTS)}.",
            f"In the {place}, {person} and {other} found {listed}.",
            f"{person} carried {listed} to the {place}.",
        ]
    )
    aside = rng.choice(["", f" {other} helped.", f" It was {rng.choice(DAYS)}.", f" Then {other} left."])
    noun = "thing" if count == 1 else "things"
    return text + aside, [
        f"That makes {number} {noun}.",
        f"It was {number} {noun} in all.",
        f"So {person} had {number} {noun}.",
    ]


def about_day(rng: random.Random, day: str) -> Text:
    wrong, also = rng.sample([d for d in DAYS if d != day], 2)
    event, person, place = rng.choice(EVENTS), rng.choice(PEOPLE), rng.choice(PLACES)
    text = rng.choice(
        [
            f"The {event} in the {place} was moved from {wrong} to {day}.",
            f"The {event} is on {day}, not on {wrong} or {also}.",
            f"{person} planned the {event} for {wrong}, but it will be on {day}.",
            f"Instead of {wrong}, the {event} in the {place} is on {day}.",
            f"On {wrong} and {also} the {place} is closed, so {person} agreed to hold the {event} on {day}.",
        ]
    )
    endings = [
        f"{person} wrote {day} in the calendar.",
        f"So do not come on {wrong}, come on {day}.",
        f"When is the {event}? {day}.",
        f"{day} suits everybody.",
        f"{day} it is, not {wrong}.",
    ]
    return text, endings


def about_request(rng: random.Random, intent: str) -> Text:
    request = rng.choice(INTENTS[intent]).format(r=rng.choice(RENTALS), d=rng.choice(DAYS))
    person = rng.choice(PEOPLE)
    hello = rng.choice(
        ["Hello, ", "Good morning, ", f"{person} here, ", f"Hi, this is {person}, ", f"Hello {person}, "]
    )
    asks = rng.choice(["could you please", "can you", "would you", "I would like you to", "please"])
    return f"{hello}{asks} {request}{'.' if asks[0] in 'Ip' else '?'}", INTENT_REPLIES[intent]


TEXT_OF: dict[str, Callable[[random.Random, str], Text]] = {
    "topic": about_topic,
    "giver": lambda rng, label: about_gift(rng, label, None),
    "intent": about_request,
    "count": about_list,
    "folder": lambda rng, label: about_topic(rng, next(t for t, folder in FOLDER_OF_TOPIC.items() if folder == label)),
    "day": about_day,
    "receiver": lambda rng, label: about_gift(rng, None, label),
    "shopping": about_shopping,
}
PRETRAINING_WEIGHTS = {"day": 3, "shopping": 4, "giver": 2, "receiver": 2}  # looking back is learned last


def pretraining_document(rng: random.Random) -> str:
    """A text told twice, or with what follows from it, or with a quiz whose answer is drawn at random.

    The first kind teaches to look back, the second what the words mean together, and the third that after "Answer:"
    anything may come, so that the backbone starts every task at chance.
    """
    kind = rng.choices(list(TEXT_OF), [PRETRAINING_WEIGHTS.get(kind, 1) for kind in TEXT_OF])[0]
    text, endings = TEXT_OF[kind](rng, rng.choice(LABELS[kind]))
    form = rng.random()
    if form < 0.25:
        return f"{text} {rng.choice(['Once more:', 'Again:', 'As I said:'])} {text}"
    if form < 0.85:
        return " ".join([text, *rng.sample(endings, len(endings))])
    answer = rng.choice(LABELS[kind if rng.random() < 0.3 else rng.choice(list(LABELS))])
    question = rng.choice(
        ["", f" Now question {rng.choice(NUMBERS)} of the quiz.", f" Turn to page {rng.choice(NUMBERS)}."]
    )
    return f"{text}{question}\nAnswer: {answer}"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_tasks() -> None:
    """Balanced labels, no text twice, none in both files."""
    for task in tqdm(TASKS, desc="tasks"):
        rng = random.Random(f"{SEED} {task}")
        seen: set[str] = set()
        for split, size in (("train", TRAIN_EXAMPLES), ("test", TEST_EXAMPLES)):
            rows = []
            while len(rows) < size:
                label = LABELS[task][len(rows) % len(LABELS[task])]
                text, _ = TEXT_OF[task](rng, label)
                if text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "label": label})
            rng.shuffle(rows)
            path = FOLDER / "tasks" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # "Anna" is " Anna" wherever it stands
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    for label in itertools.chain(*LABELS.values()):
        if len(tokenizer.encode(" " + label)) != 1:
            raise ValueError(f"{label!r} takes more than one token: raise VOCAB_SIZE")
    return tokenizer


def batches_of(documents: list[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[torch.Tensor]:
    """Padded (DOCUMENTS_PER_STEP, length) tensors of documents of similar length, half of them begun with <s>."""
    rows = [
        [tokenizer.bos_token_id] * rng.randrange(2) + ids + [tokenizer.eos_token_id]
        for ids in tokenizer(documents)["input_ids"]
    ]
    batches = []
    for start in range(0, len(rows), 16 * DOCUMENTS_PER_STEP):
        pool = sorted(rows[start : start + 16 * DOCUMENTS_PER_STEP], key=len)
        batches += [pool[i : i + DOCUMENTS_PER_STEP] for i in range(0, len(pool), DOCUMENTS_PER_STEP)]
    rng.shuffle(batches)
    return [tokenizer.pad({"input_ids": batch}, return_tensors="pt")["input_ids"] for batch in batches]


def pretrained_model(
    batches: list[torch.Tensor], tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, float]:
    """The model, and its loss over the last twentieth of the steps: every document is seen once."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=INTERMEDIATE_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=HIDDEN_SIZE**-0.5,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / len(batches))),
    )
    losses = []
    progress = tqdm(batches, desc="pretrain")
    for batch in progress:
        seen = batch != tokenizer.pad_token_id
        loss = model(input_ids=batch, attention_mask=seen, labels=batch.masked_fill(~seen, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, len(batches) // 20) :]
    return model, sum(last) / len(last)


def size_in_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks-only", action="store_true", help="rewrite tasks/ and leave backbone/ unchanged")
    args = parser.parse_args()

    write_tasks()
    table = [(task, f"{len(labels)} labels", ", ".join(labels)) for task, labels in LABELS.items() if task in TASKS]

    if not args.tasks_only:
        start = time.perf_counter()
        torch.set_num_threads(1)  # so that the order of the sums does not depend on the number of cores
        torch.manual_seed(SEED)
        rng = random.Random(SEED)
        documents = [pretraining_document(rng) for _ in trange(STEPS * DOCUMENTS_PER_STEP, desc="documents")]
        tokenizer = trained_tokenizer(documents)
        batches = batches_of(documents, tokenizer, rng)
        model, loss = pretrained_model(batches, tokenizer)
        parameters = sum(weight.numel() for weight in model.parameters())
        model.to(torch.bfloat16).save_pretrained(FOLDER / "backbone")
        tokenizer.save_pretrained(FOLDER / "backbone")
        seen = sum(int((batch != tokenizer.pad_token_id).sum()) for batch in batches)
        table += [
            ("parameters", f"{parameters:,}", f"hidden {HIDDEN_SIZE}, {NUM_LAYERS} layers, {len(tokenizer)} tokens"),
            ("loss", f"{loss:.3f}", f"nats per token after {seen:,} tokens, each seen once"),
            ("runtime", f"{time.perf_counter() - start:.0f} s", "one CPU thread"),
        ]

    table += [(f"{name}/", f"{size_in_bytes(FOLDER / name):,}", "bytes") for name in ("backbone", "tasks")]
    for name, value, remark in table:
        print(f"{name:<12}{value:>12}  {remark}")
