"""Public data sets: the counts of the catalogues equal the counts in their READMEs."""

import pytest

from mmsid.catalog import CatalogConfig, SplitConfig, describe, load_picture, read_catalog, split_histories

MAPPED = {
    "fashion9k": {"categories": ["cat_l1", "cat_l2", "cat_l3"], "attributes": ["gender", "color", "season", "year", "usage"]},
    "ml_posters": {"attributes": ["genres", "year"], "timestamps": "timestamps"},
    "grocery": {"group_by": "class_id", "title": "class_name", "categories": ["cat_l1", "coarse_name", "class_name"]},
    "amazon_scientific": {"attributes": ["brand"]},
    "amazon_beauty": {  # one column contains the brand, if known, and then the category path
        "title": "name_generated",
        "categories": "attributes",
        "category_roots": ["Bath & Body", "Fragrance", "Hair Care", "Makeup", "Skin Care", "Tools & Accessories"],
        "attributes": ["attributes"],
    },
}


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fashion9k", {"items": 9583, "pictures": 9583, "items_with_text": 9583, "users": 0}),
        ("ml_posters", {"items": 2305, "pictures": 2305, "users": 1540, "interactions": 155605}),
        ("grocery", {"items": 81, "pictures": 5421, "items_with_categories": 81, "users": 0}),
        ("amazon_scientific", {"items": 4344, "pictures": 0, "users": 8317, "interactions": 58492}),
        ("amazon_beauty", {"items": 12101, "items_with_categories": 12101, "users": 22363, "interactions": 198502}),
    ],
)
def test_counts_are_those_of_the_readme(data_root, name, expected):
    folder = data_root / name
    if not (folder / "items.parquet").is_file():
        pytest.skip(f"{folder} is absent: set MMSID_DATA to the folder that holds it")
    sequences = folder / "sequences.parquet"
    config = CatalogConfig(items=folder / "items.parquet", sequences=sequences if sequences.is_file() else None, fields=MAPPED[name])
    catalog = read_catalog(config)
    split = split_histories(catalog, SplitConfig())
    facts = describe(catalog, split)
    assert {key: facts[key] for key in expected} == expected
    assert not any(code.startswith("picture_") or code == "unknown_item" for code in catalog.problems)
    if name == "fashion9k":  # the README counts names, and two of them have several parents
        assert [len({item.categories[depth] for item in catalog.items}) for depth in range(3)] == [6, 30, 75]
    if name == "grocery":
        assert facts["categories_per_depth"][:2] == [3, 43]
    if name == "amazon_beauty":
        assert facts["categories_per_depth"][0] == 6
    if facts["users"]:
        assert facts["split"]["test_users"] == facts["users"] and facts["split"]["target_seen_before"] == 0
    if name == "ml_posters":
        by_time = split_histories(catalog, SplitConfig(method="time"))
        assert 0 < len(by_time.users("test")) < 1540
    for item in catalog.items[:20]:
        for path in item.images[:2]:
            assert load_picture(path, config.pictures, config.root).mode == "RGB"
