"""README of a written demo catalogue."""

from __future__ import annotations

from mmsid.catalog.demo import users as model
from mmsid.catalog.demo.ads import DUPLICATE_SHARE, SECOND_CREATIVE_SHARE
from mmsid.catalog.demo.facts import BRANDS, COLORS, HEADLINES, MATERIALS, PATTERNS, PRODUCTS, SEASONS

_RANKERS = {
    "expected": "best achievable (oracle, exact)",
    "realised": "oracle on the drawn items",
    "standard_error": "standard error of the row above",
    "knowing_active_interest": "oracle that also knows the last active interest (unreachable)",
    "without_pictures": "oracle with picture facts averaged",
    "one_ranking_for_all": "best single ranking for all users",
}


def readme(items: int, users: int, seed: int, best: dict[str, dict] | None) -> str:
    """Markdown text. `best` is the result of `users.best_achievable`, or None without users."""
    return _facts(items, users, seed) + (_users(users) + _table(best) if best else "")


def _facts(items: int, users: int, seed: int) -> str:
    return f"""# Generated demo catalogue

{items:,} ads, {users:,} users, seed {seed}, written by `mmsid demo-catalog OUT --items {items} --users {users} --seed {seed}`. A program
generates all of it. No photo, brand or person in it is real. The same command writes data files with the same bytes. Only
`manifest.json` contains times.

| file | content |
|---|---|
| `items.parquet` | item_id, title, description, image (one or two paths), categories (root to leaf), attributes |
| `images/` | 96 px JPEG cards |
| `sequences.parquet` | user_id, items in time order, timestamps (unix seconds) |
| `truth.parquet` | every fact, element boxes per picture (px), true caption, true interests, `held_out` combination. For scoring only |
| `truth_users.parquet` | each user's interests, their weights, and the active interest of each step. For scoring only |
| `best_achievable.json` | best achievable ranking figures |

## Where each fact occurs

| fact | values | picture | title, description, attributes | categories |
|---|---|---|---|---|
| colour | {len(COLORS)} | **only here** | - | - |
| pattern | {len(PATTERNS)} | **only here** | - | - |
| brand (badge: outline, colour, letter) | {len(BRANDS)} | **only here** | - | - |
| price, hence price tier | 10-99 | **only here** | - | - |
| headline | {len(HEADLINES)} | **only here** | - | - |
| product | {len(PRODUCTS)} | yes | - | level 3 |
| category group | 10 | (follows from product) | yes | level 2 |
| material | {len(MATERIALS)} | - | **only here** | - |
| season | {len(SEASONS)} | - | **only here** | - |
| collection | 6 | - | **only here** | - |

All facts are drawn independently. {SECOND_CREATIVE_SHARE:.0%} of the ads have two creatives (same facts, different
layout). {DUPLICATE_SHARE:.0%} are exact copies of another ad with another id (`truth.parquet`, `duplicate_of`). `held_out` marks the
15 % of (product, colour, pattern) combinations that are excluded from the training data of the shipped captioner.
"""


def _users(users: int) -> str:
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in model.KINDS.items())
    return f"""
## The users

{users:,} users share a pool of about {model.POOL_SIZE} interests ({shares}). A *picture* interest is a pair of facts that only the
picture shows (colour and pattern; brand and price tier; headline and colour). A *text* interest is a pair of facts that only the text
contains. A *category* interest is a product and, with less weight, its group. Each user has two or three interests with weights
3 : 2 : 1. One interest is active at a time. It stays active with probability {model.STICKINESS}; otherwise the next one is drawn from
the weights. With active interest j, the next item is drawn from the *unseen* items in proportion to

    popularity(i) * exp(match of item i with interest j)

The match with a picture or text interest is {model.FACT_WEIGHT} for each of its facts that item i has, and {model.BOTH} more for both.
The match with a category interest is {model.PRODUCT_WEIGHT} for the product and {model.GROUP_WEIGHT} for the group. Popularity is
log-normal with spread {model.POPULARITY_SPREAD} and independent of the facts. Sequence lengths are
{model.MIN_LENGTH} + Poisson({model.MEAN_LENGTH - model.MIN_LENGTH}). No item occurs twice in a sequence, so seen items must be masked
in rankings.

## Best achievable ranking

The oracle knows the model, every item's facts and popularity, the user's interests with their weights, and the user's true history
(for test, including the valid item). It does not know the active interest, which it infers exactly by Bayes' rule. It ranks unseen items
by p(next item | interests, history). Given these, the next item does not depend on anything else that a recommender could use. A
ranking by the true probability maximises the expectation of every metric that decreases with rank. Therefore **no recommender exceeds
the row "best achievable" in expectation**. This catalogue contains a single draw of test items, whose figures differ from the expectation
by about the standard error. "Picture facts averaged" is a ranker that knows the user perfectly but does not use pictures. A recommender
that learns item ids can still infer the content of pictures from co-engagement, but not for new items.
"""


def _table(best: dict[str, dict]) -> str:
    names = ["HR@1", "HR@5", "HR@10", "HR@20", "HR@50", "NDCG@5", "NDCG@10"]
    text = ""
    for part in ("test", "valid"):
        text += f"\n| {part} | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
        for ranker, label in _RANKERS.items():
            text += f"| {label} | {' | '.join(f'{best[part][ranker][name]:.4f}' for name in names)} |\n"
    return text
