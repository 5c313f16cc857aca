"""The README that lies inside a written demo catalogue."""

from __future__ import annotations

from mmsid.catalog.demo import users as model
from mmsid.catalog.demo.ads import DUPLICATE_SHARE, SECOND_CREATIVE_SHARE
from mmsid.catalog.demo.facts import BRANDS, COLORS, HEADLINES, MATERIALS, PATTERNS, PRODUCTS, SEASONS

_RANKERS = {
    "expected": "best achievable (oracle, exact)",
    "realised": "the oracle on the items that were drawn",
    "standard_error": "standard error of realised about expected",
    "knowing_active_interest": "oracle also told the last active interest (unreachable)",
    "without_pictures": "oracle, picture facts averaged away",
    "one_ranking_for_all": "best single ranking for all users",
}


def readme(items: int, users: int, seed: int, best: dict[str, dict] | None) -> str:
    """Markdown for the catalogue of this size; `best` is `users.optimum`'s answer, None without users."""
    return _facts(items, users, seed) + (_users(users) + _table(best) if best else "")


def _facts(items: int, users: int, seed: int) -> str:
    return f"""# A drawn demo catalogue

{items:,} ads, {users:,} users, seed {seed}; written by `mmsid demo-catalog OUT --items {items} --users {users} --seed {seed}`. All of it
is drawn by a program: no photo, brand or person in it is real. The same command writes the same data files byte for byte; only
`manifest.json` carries times.

| file | what |
|---|---|
| `items.parquet` | item_id, title, description, image (one or two paths), categories (root to leaf), attributes |
| `images/` | 96 px JPEG cards |
| `sequences.parquet` | user_id, items in time order, timestamps (unix seconds) |
| `truth.parquet` | every fact, element boxes per picture (px), true caption, true interests, `held_out` combination. For scoring only |
| `truth_users.parquet` | each user's interests, their weights, and which was active at each step. For scoring only |
| `best_achievable.json` | best achievable ranking figures |

## Where each fact can be seen

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

All facts are drawn independently of each other. {SECOND_CREATIVE_SHARE:.0%} of the ads have two creatives (same facts, other layout),
{DUPLICATE_SHARE:.0%} repeat another ad exactly under another id (`truth.parquet`, `duplicate_of`). `held_out` marks the 15 % of
(product, colour, pattern) combinations that the shipped captioner never saw in training.
"""


def _users(users: int) -> str:
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in model.KINDS.items())
    return f"""
## The users

{users:,} users share a pool of about {model.POOL_SIZE} interests ({shares}). A *picture* interest wants two facts that
only the picture shows (colour and pattern; brand and price tier; headline and colour), a *text* interest two facts that only the text
tells, a *category* interest a product and weakly its group. Each user holds two or three interests with weights 3 : 2 : 1. One interest
is active at a time: it stays with probability {model.STICKINESS}, else it is drawn anew from the weights. With interest j active the
next item is drawn from the *unseen* items in proportion to

    popularity(i) * exp(match of item i with interest j)

A picture or text interest: {model.FACT_WEIGHT} for each of its facts that i has, and {model.BOTH} more if it has both. A category interest:
{model.PRODUCT_WEIGHT} for the product, {model.GROUP_WEIGHT} for the group. Popularity is log-normal with spread
{model.POPULARITY_SPREAD} and independent of the facts. Lengths are
{model.MIN_LENGTH} + Poisson({model.MEAN_LENGTH - model.MIN_LENGTH}). No item repeats, so seen
items must be masked when ranking.

## Best achievable ranking

The oracle knows the model, every item's facts and popularity, the user's interests with their weights, and the user's true history
(for test: the valid item included). It does not know which interest was active; it infers that by Bayes' rule, exactly. It ranks unseen
items by p(next item | interests, history). Given these, the next item does not depend on anything else a recommender could see, and
ranking by the true probability maximises the expectation of every metric that falls with rank; so **no recommender can beat the row
"best achievable" in expectation**. On the one draw of test items that this catalogue holds, luck moves figures by about the standard
error. "Picture facts averaged away" is what remains for a ranker that knows the user perfectly but cannot see pictures (a recommender
that learns item ids can still infer what pictures show from who engages with them; on new items it cannot).
"""


def _table(best: dict[str, dict]) -> str:
    names = ["HR@1", "HR@5", "HR@10", "HR@20", "HR@50", "NDCG@5", "NDCG@10"]
    text = ""
    for position in ("test", "valid"):
        text += f"\n| {position} | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"
        for ranker, label in _RANKERS.items():
            text += f"| {label} | {' | '.join(f'{best[position][ranker][name]:.4f}' for name in names)} |\n"
    return text
